"""One small language model, seven ways to train it: which of them learn, and how well?

A two-layer byte-level Transformer reads the questions and answers of the shipped data set. All runs
see the same batches from the same start; FP32 is repeated with other seeds to show how much two
equally good runs differ.

    python benchmarks/precision_curves.py

writes precision_curves.json and precision_curves.svg beside this file. Runs that are in the JSON
already are not repeated, so an interrupted call may be given again. It takes some ten minutes on two CPU
cores, nearly all of it for FP16 products, which such a CPU has no instructions for.

A mean over n tokens makes every gradient 1/n as large, so large batches underflow first. One run
therefore has the loss scale 2⁻¹⁰: its gradients have the size of those in a batch of 2 million tokens.
"""

import argparse
import json
import math
import platform
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from handtuned.amp import GradScaler, MixedPrecisionTrainer
from handtuned.amp.formats import FP16
from handtuned.nn.transformer import Transformer
from handtuned.optim import AdamW, GradientAccumulationTrainer, cosine_with_warmup

BATCH, LENGTH, LR = 32, 64, 3e-3
FIXED_SCALES = {"fp16 without scaling": 1.0, "fp16 without scaling, as in a batch of 2M tokens": 2.0**-10}
PRECISIONS = ["fp32", "bf16", "fp16 + scaler", *FIXED_SCALES, "fp16 weights + masters", "fp16 weights alone"]


def text(name):
    """All questions and answers of a split, a line each, as a tensor of bytes."""
    lines = resources.files("handtuned").joinpath("datasets", f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    parts = [message["content"] for line in lines for message in json.loads(line)["messages"][1:]]
    return torch.tensor(list("\n".join(parts).encode()))


def windows(data, count, seed):
    """`count` random stretches: (count, LENGTH) inputs and the bytes that follow them."""
    starts = torch.randint(len(data) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    block = data[starts + torch.arange(LENGTH + 1)]
    return block[:, :-1], block[:, 1:]


def new_model(seed):
    torch.manual_seed(seed)
    return Transformer(vocab_size=256, num_layers=2, d_model=64, num_heads=4, d_ff=128)


class PlainHalf:
    """FP16 weights in the optimizer itself: no FP32 copy, no loss scale. What mixed precision is there to avoid."""

    def __init__(self, model, optimizer, scheduler):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def train_step(self, inputs, labels):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(inputs).flatten(0, 1).float(), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()


def trainer_for(precision, model, steps):
    """The trainer of one run, its optimizer and schedule included."""
    if precision.startswith("fp16 weights"):
        model.half()
    optimizer = AdamW(model.parameters(), lr=LR)
    schedule = cosine_with_warmup(optimizer, steps, warmup_ratio=0.05)
    if precision == "fp32":
        return GradientAccumulationTrainer(model, optimizer, accumulation_steps=1, scheduler=schedule)
    if precision == "fp16 weights alone":
        return PlainHalf(model, optimizer, schedule)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    trainer = MixedPrecisionTrainer(model, optimizer, dtype=dtype, scheduler=schedule)
    if precision in FIXED_SCALES:
        trainer.scaler = GradScaler(init_scale=FIXED_SCALES[precision], growth_interval=10**9)
    return trainer


def logits_in_fp32(model, inputs):
    """Of the weights as they are."""
    copy = new_model(0)
    copy.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return copy(inputs)


@torch.no_grad()
def evaluate(model, batch):
    inputs, labels = batch
    return F.cross_entropy(logits_in_fp32(model, inputs).flatten(0, 1), labels.flatten()).item()


def run(precision, seed, steps, data, held_out):
    model = new_model(seed)
    trainer = trainer_for(precision, model, steps)
    curve = [evaluate(model, held_out)]
    for step in range(steps):
        trainer.train_step(*windows(data, BATCH, seed * 1_000_000 + step))
        if (step + 1) % (steps // 20) == 0:
            curve.append(evaluate(model, held_out))
    print(f"{precision}, seed {seed}: {curve[-1]:.4f}", flush=True)
    final = curve[-1] if math.isfinite(curve[-1]) else None
    share = {} if final is None else lost(model, data)
    return {"curve": [c if math.isfinite(c) else None for c in curve], "final": final, "lost": share}


def lost(model, data):
    """Share of the nonzero FP32 gradients of the logits that FP16 makes zero, at these weights and each fixed scale."""
    inputs, labels = windows(data, BATCH, 1)
    logits = logits_in_fp32(model, inputs)
    logits.retain_grad()
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    sizes = logits.grad[logits.grad != 0].abs()
    return {
        str(scale): (sizes * scale <= FP16.underflow_threshold).double().mean().item()
        for scale in (65536.0, *FIXED_SCALES.values())
    }


def draw(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for name, runs in results["runs"].items():
        for i, one in enumerate(runs):
            curve = [math.nan if loss is None else min(loss, 6.0) for loss in one["curve"]]
            x = [j * results["steps"] / (len(curve) - 1) for j in range(len(curve))]
            label = name if i == 0 else None
            axes.plot(x, curve, label=label, **({"color": "black", "alpha": 0.4} if name == "fp32" else {}))
    axes.set(xlabel="step", ylabel="held-out loss (nats a byte)", title="The same small model in seven precisions")
    axes.legend(fontsize="small")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="FP32 runs, for the noise")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    machine = f"{platform.machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    results = {"steps": args.steps, "batch": [BATCH, LENGTH], "lr": LR, "machine": machine, "runs": {}}
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        results = saved if saved["steps"] == args.steps else results
    data, held_out = text("home_train"), windows(text("home_eval"), 128, 0)
    for name in PRECISIONS:
        runs = results["runs"].setdefault(name, [])
        while len(runs) < (args.seeds if name == "fp32" else 1):
            runs.append(run(name, len(runs), args.steps, data, held_out))
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
