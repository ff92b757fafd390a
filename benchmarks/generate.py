"""Tokens per second of greedy generation with an adapter on a 4-bit model, beside PEFT on bitsandbytes and dense torch.

    python benchmarks/generate.py [--turns 5] [--prompt 64] [--new 64] [--model smollm2]

LoRA of r 8 on all linear layers, a prompt of random tokens, a key-value cache, no token that ends the answer early. The
models take turns, so that what else a machine does meets all of them. The result goes to `generate.md` beside this
file.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from handtuned.nn import apply_lora_to_model

from handtuned.training.loading import load_base
from handtuned.training.logging import processor
from handtuned.training.sources import find, resolve


def ours(model, method, dtype):
    base, _ = load_base(model, method, dtype, "cpu")
    apply_lora_to_model(base, 8, 16, "all-linear")
    return base


def peft_on_bitsandbytes(model, dtype):
    from peft import LoraConfig, get_peft_model

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    place = find(resolve(model)).directory
    base = transformers.AutoModelForCausalLM.from_pretrained(place, quantization_config=config, dtype=dtype)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def seconds(model, prompt, new):
    started = time.perf_counter()
    with torch.no_grad():
        answer = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=new,
            max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
    assert answer.shape[1] == prompt.shape[1] + new
    return time.perf_counter() - started


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args(words)
    torch.manual_seed(0)
    models = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        models[f"NF4 and LoRA, {name}"] = ours(arguments.model, "qlora", dtype)
        models[f"PEFT on bitsandbytes, {name}"] = peft_on_bitsandbytes(arguments.model, dtype)
        models[f"dense and LoRA, {name}"] = ours(arguments.model, "lora", dtype)
    prompt = torch.randint(next(iter(models.values())).config.vocab_size, (1, arguments.prompt))
    taken = {name: [] for name in models}
    for turn in range(arguments.turns + 1):
        for name, model in models.items():
            each = seconds(model.eval(), prompt, arguments.new)
            if turn:  # the first is a warm-up
                taken[name].append(each)
    lines = [
        "# Generating with an adapter",
        "",
        f"Written by `python benchmarks/generate.py --turns {arguments.turns} --prompt {arguments.prompt} "
        f"--new {arguments.new}`: {arguments.model}, LoRA r 8 on all linear layers; medians over the turns, ratios "
        f"turn by turn to PEFT on bitsandbytes in the same dtype; torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s) of {processor('model name')[0]}, "
        f"{torch.backends.cpu.get_cpu_capability()}.",
        "",
        "| model | tokens per second | against PEFT on bitsandbytes |",
        "|---|---|---|",
    ]
    for name, own in taken.items():
        rival = taken[f"PEFT on bitsandbytes, {name.rpartition(' ')[2]}"]
        ratio = statistics.median(theirs / mine for mine, theirs in zip(own, rival, strict=True))
        lines.append(f"| {name} | {arguments.new / statistics.median(own):.1f} | {ratio:.2f} × |")
    page = "\n".join([*lines, ""])
    print(page)
    arguments.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
