"""The variants of LoRA side by side on the shipped task: same rows in the same order, same steps, same seeds.

    python benchmarks/variants.py [--steps 25] [--rows 4] [--seeds 3] [--held-out 60] [--only LoRA DoRA]

Each is `handtuned finetune` with the flags in VARIANTS. Runs are kept in `--record` (JSON) as they end, and one that
stands there is not run again: a table that was stopped goes on by the same command. `variants.md` beside it shows all
runs of equal length that are kept there.

Every run starts from SmolLM2-135M-Instruct with r 8 and alpha 16 on all seven projections and a peak
learning rate of 1e-3. LoRA+ has two rates, of ratio 16, whose geometric mean is 1e-3. The
variants that need dense weights stand beside LoRA on the fp32 base, LoftQ beside LoRA on the NF4 base.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from handtuned.nn import lora_parameters
from handtuned.nn.adapters import save_adapter
from handtuned.nn.files import write_json

from handtuned.training import loop
from handtuned.training.models import add_adapters, load_base_and_rows
from handtuned.training.settings import FinetuneSettings

RATE, RATIO = 1e-3, 16.0
READING = """\
How to read it: the runs stop on purpose while the task is half learnt. So this shows how fast each starts with
everything else equal, not which is best after a tuned run. rsLoRA at the same alpha is LoRA with a scale 2.8 times
as large (16 / √8 against 16 / 8), and in LoRA+ B learns 4 times as fast as in LoRA (and A a quarter as fast): both
say that the plain setting could take larger steps here. What lies within the spread over the seeds is luck."""
VARIANTS = {  # the settings in which each differs from plain LoRA on the fp32 base
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "LoRA+": {"loraplus_lr_ratio": RATIO, "learning_rate": RATE / math.sqrt(RATIO)},
    "LoRA-FA": {"lora_fa": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "DoRA": {"use_dora": True},
    "LoRA on NF4": {"method": "qlora"},
    "LoftQ on NF4": {"method": "qlora", "init_lora_weights": "loftq"},
}


def one_run(settings):
    """Train once; a dict of what the table shows."""
    base = load_base_and_rows(settings, torch.device("cpu"), "cpu")
    started = time.process_time()
    add_adapters(base.model, settings)
    preparing = time.process_time() - started
    training = loop.prepare(base, settings, settings.max_steps)
    started = time.process_time()
    losses = [row["loss"] for row in loop.train(training)]
    seconds = time.process_time() - started
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(base.model, directory)
        size = (Path(directory) / "adapter_model.safetensors").stat().st_size
    return {
        **training.lm.score(base.held_out.examples),
        "train_loss": statistics.mean(losses[-5:]),
        "trained": sum(p.numel() for p in lora_parameters(base.model) if p.requires_grad),
        "file": size,
        "prepare": preparing,
        "step": seconds / settings.max_steps,
    }


def table(results):
    lines = [
        "| variant | runs | trained | adapter file | preparation | CPU time per step | last 5 losses "
        "| held-out loss | right tokens | exact match |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        low, high = (pick(run["loss"] for run in runs) for pick in (min, max))
        lines.append(
            f"| {variant} | {len(runs)} | {mean['trained']:,.0f} | {mean['file'] / 1e6:.1f} MB "
            f"| {mean['prepare']:.1f} s | {mean['step']:.2f} s | {mean['train_loss']:.3f} "
            f"| {mean['loss']:.3f} ({low:.3f} to {high:.3f}) | {mean['token_accuracy']:.1%} "
            f"| {mean['exact_match']:.1%} |"
        )
    return "\n".join(lines)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant; the table shows means")
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args(words)

    budget = f"{arguments.model}, {arguments.steps} steps of {arguments.rows} rows, {arguments.held_out} held-out rows"
    record = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
    runs = record.setdefault(budget, {})
    for seed in range(arguments.seeds):
        for variant in arguments.only:
            if str(seed) in runs.setdefault(variant, {}):
                continue
            plain = {"method": "lora", "learning_rate": RATE}
            run = one_run(FinetuneSettings(
                model=arguments.model, max_steps=arguments.steps, per_device_train_batch_size=arguments.rows, seed=seed,
                eval_samples=arguments.held_out, device="cpu", dtype="float32", **plain | VARIANTS[variant],
            ))  # fmt: skip
            runs[variant][str(seed)] = run
            write_json(arguments.record, record)
            print(f"{variant}, seed {seed}: loss {run['loss']:.3f}, exact {run['exact_match']:.1%}, "
                  f"{run['step']:.2f} s per step", file=sys.stderr, flush=True)  # fmt: skip
    page = "\n".join([
        "# Variants of LoRA on the shipped task",
        "",
        f"Written by `python benchmarks/variants.py --steps {arguments.steps} --rows {arguments.rows} "
        f"--seeds {arguments.seeds} --held-out {arguments.held_out}`: {budget}; torch {torch.__version__} in fp32 on "
        f"{torch.get_num_threads()} thread(s) of an {platform.machine()} CPU; times are CPU time.",
        "",
        table({variant: list(runs[variant].values()) for variant in VARIANTS if runs.get(variant)}),
        "",
        READING,
        "",
    ])  # fmt: skip
    print(page)
    arguments.record.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
