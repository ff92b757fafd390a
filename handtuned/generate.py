"""`handtuned generate`: answer a prompt with a trained adapter, or a model that was trained whole."""

import sys

import torch

from .training import evaluation
from .training.models import add_adapter_flags, load_with_adapter


def add_arguments(parser) -> None:
    add_adapter_flags(parser)
    parser.add_argument("prompt", nargs="*", help="prompts (default: the lines of standard input)")
    parser.add_argument("--system", help="system prompt (default: the one in the training data, if it had just one)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=int, default=42, help="seed of sampling (default: 42)")


def run(args) -> int:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.temperature != 0 and not 1e-30 <= args.temperature < float("inf"):  # logits are divided by it in fp32
        raise ValueError(f"--temperature must be 0, or finite and at least 1e-30, got {args.temperature}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2^63), got {args.seed}")
    prompts = args.prompt or [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give one as an argument or on standard input")
    model, tokenizer, record = load_with_adapter(args)
    system = args.system if args.system is not None else record.get("system_prompt")
    opening = [{"role": "system", "content": system}] if system else []
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    for prompt in prompts:
        chat = [*opening, {"role": "user", "content": prompt}]
        print(evaluation.generate(model, tokenizer, [chat], args.max_new_tokens, **sampling)[0])
    return 0
