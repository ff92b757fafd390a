"""A whole training step of SmolLM2-135M, ours against peft: time and peak memory on this machine.

    python tests/bench_finetune.py [--rounds 5] [--json FILE]

Each contestant trains in a process of its own (so that its peak memory is its own), on
the same batch of 4 × 128 tokens, r 8 and alpha 16 on all seven projections, fp32. The
processes take turns, step by step (A B A B), one running at a time, so that a slow
spell of the machine falls on all alike.

    handtuned qlora   NF4 base with double quantization: what `handtuned finetune` does
    peft fp32         peft LoRA on the fp32 model, logits and loss by transformers
    peft nf4          the same on bitsandbytes NF4 with double quantization

A third of each row is the answer, as in the shipped data set.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

ROWS, TOKENS, RANK, ALPHA = 4, 128, 8, 16
CONTESTANTS = ("handtuned qlora", "peft fp32", "peft nf4")


def batch():
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (ROWS, TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, : -(TOKENS // 3)] = -100
    return ids, labels


def handtuned_step():
    """(step function, bytes a parameter of the quantized linears)"""
    import torch
    from handtuned.nn import apply_lora_to_model, lora_parameters
    from handtuned.optim import AdamW
    from handtuned.quant import NF4Linear

    from handtuned.answers import AnswerModel
    from handtuned.models import load_base

    model, _ = load_base("smollm2", "qlora")
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    stored = sum(module.quantized.nbytes for module in packed)
    share = stored / sum(module.in_features * module.out_features for module in packed)
    apply_lora_to_model(model, RANK, ALPHA, "all-linear")
    model.train()
    parameters = list(lora_parameters(model))
    optimizer = AdamW(parameters, lr=1e-4)
    ids, labels = batch()
    answers = AnswerModel(model, ids[:1, :8])
    count = int((labels[:, 1:] != -100).sum())

    def step():
        loss = answers.loss({"input_ids": ids, "labels": labels}) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, share


def peft_step(four_bit):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from handtuned.models import smollm2

    options = {}
    if four_bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32, **options)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    ids, labels = batch()

    def step():
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, None


def serve(name):
    """Child process: prepare, then one step for every line on standard input."""
    step, share = handtuned_step() if name == "handtuned qlora" else peft_step(name == "peft nf4")
    print(json.dumps({"share": share}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}), flush=True)


def check(first_losses):
    """Both NF4 contestants start from the same weights; quantization may move the loss of the fp32 one a little."""
    reference = first_losses.get("peft nf4", first_losses.get("handtuned qlora"))
    for name, loss in first_losses.items():
        allowed = 0.1 if name == "peft fp32" else 1e-3
        if reference and abs(loss - reference) > allowed * reference:
            raise SystemExit(f"the contestants do not compute the same: first losses {first_losses}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the result here")
    parser.add_argument("--only", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)

    children, notes, turns = {}, {}, {name: [] for name in args.only}
    for name in args.only:
        children[name] = subprocess.Popen([sys.executable, __file__, "--serve", name],
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        notes[name] = json.loads(children[name].stdout.readline())
    for _ in range(args.rounds + 1):
        for name, child in children.items():
            child.stdin.write("go\n")
            child.stdin.flush()
            turns[name].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.stdin.close()
        child.wait()

    check({name: taken[0]["loss"] for name, taken in turns.items()})
    results = {
        name: {
            "median_s": statistics.median(turn["seconds"] for turn in taken[1:]),
            "min_s": min(turn["seconds"] for turn in taken[1:]),
            "peak_rss_mb": taken[-1]["peak"] / 1e6,
            "first_loss": taken[0]["loss"],
        }
        for name, taken in turns.items()
    }
    rival = results.get("peft fp32")
    for name, row in results.items():
        ratio = f"  {row['median_s'] / rival['median_s']:.2f}x of peft fp32" if rival else ""
        print(f"{name:16} {row['median_s']:6.2f} s a step (min {row['min_s']:.2f})  "
              f"peak RSS {row['peak_rss_mb']:6.0f} MB{ratio}")  # fmt: skip
    if share := notes.get("handtuned qlora", {}).get("share"):
        print(f"quantized linears: {share:.4f} byte a parameter")
        results["handtuned qlora"]["bytes_a_parameter"] = share
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
