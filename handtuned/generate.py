"""`handtuned generate`: answer a prompt with a trained adapter."""

import sys

import torch

from .adapted import add_adapter_arguments, load_adapted
from .answers import write_answers


def add_arguments(parser) -> None:
    add_adapter_arguments(parser)
    parser.add_argument("prompt", nargs="*", help="prompts; read from standard input, one a line, when there are none")
    parser.add_argument("--system", help="system prompt (default: the one in the training data, if it had just one)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=int, default=42, help="seed of sampling (default: 42)")


def run(args) -> int:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or above, got {args.temperature}")
    prompts = args.prompt or [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give one as an argument or on standard input")
    model, tokenizer, record = load_adapted(args)
    system = args.system if args.system is not None else record.get("system_prompt")
    opening = [{"role": "system", "content": system}] if system else []
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    for prompt in prompts:
        chat = [*opening, {"role": "user", "content": prompt}]
        print(write_answers(model, tokenizer, [chat], args.max_new_tokens, **sampling)[0])
    return 0
