"""The variants of LoRA side by side on the shipped task: same rows in the same order, same steps, same seeds.

    python benchmarks/variants.py [--steps 25] [--rows 4] [--seeds 1] [--held-out 100] [--only LoRA DoRA]

The runs are kept in `--record` (JSON), and `variants.md` beside it shows all runs of equal length that are
kept there, so that the variants may be run one after the other.

Every run starts from SmolLM2-135M-Instruct with r 8 and alpha 16 on all seven projections and a peak
learning rate of 1e-3. LoRA+ has two rates, of ratio 16, whose geometric mean is 1e-3. The
variants that need dense weights stand beside LoRA on the fp32 base, LoftQ beside LoRA on the NF4 base.
PiSSA and LoftQ use the randomized decomposition, which takes seconds instead of minutes.
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
from handtuned.amp import GradScaler
from handtuned.nn import apply_lora_to_model, lora_parameters
from handtuned.nn.adapters import save_adapter
from handtuned.nn.files import write_json
from handtuned.nn.variants import dora_init, freeze_A, loftq_init, lora_plus_groups, pissa_init, use_rslora
from handtuned.optim import AdamW, cosine_with_warmup

from handtuned.training import data
from handtuned.training.evaluation import CausalLM
from handtuned.training.loop import Training, train
from handtuned.training.models import load_base
from handtuned.training.settings import FinetuneSettings

RATIO = 16.0
READING = """\
How to read it: the runs stop on purpose while the task is half learnt. So this shows how fast each starts with
everything else equal, not which is best after a tuned run. rsLoRA at the same alpha is LoRA with a scale 2.8 times
as large (16 / √8 against 16 / 8), and in LoRA+ B learns 4 times as fast as in LoRA (and A a quarter as fast): both
say that the plain setting could take larger steps here. One run of each cannot tell small differences from luck:
LoRA has more exact matches on the NF4 base than on the fp32 base, which nothing else explains."""
ITERATIONS = 16  # of the randomized decompositions


def groups(model, rate):
    return [{"params": [p for p in lora_parameters(model) if p.requires_grad]}]


def plus_groups(model, rate):
    return lora_plus_groups(model, rate / math.sqrt(RATIO), RATIO)


def nothing(model, source):
    pass


VARIANTS = {  # name: (base, what to do after apply_lora_to_model, parameter groups)
    "LoRA": ("lora", nothing, groups),
    "rsLoRA": ("lora", lambda model, source: use_rslora(model), groups),
    "LoRA+": ("lora", nothing, plus_groups),
    "LoRA-FA": ("lora", lambda model, source: freeze_A(model), groups),
    "PiSSA": ("lora", lambda model, source: pissa_init(model, ITERATIONS), groups),
    "DoRA": ("lora", lambda model, source: dora_init(model), groups),
    "LoRA on NF4": ("qlora", nothing, groups),
    "LoftQ on NF4": ("qlora", lambda model, source: loftq_init(model, source, ITERATIONS), groups),
}


def one_run(variant, settings, rows):
    """Train once; a dict of what the table shows."""
    method, prepare, make_groups = VARIANTS[variant]
    model, tokenizer = load_base(settings.model, method)
    examples, held_out = (data.encode_rows(part, tokenizer, settings.max_seq_length).examples for part in rows)
    original = {}
    if method == "qlora":
        dense, _ = load_base(settings.model, "lora")
        original = dense.state_dict()
    torch.manual_seed(settings.seed)
    apply_lora_to_model(model, settings.lora_r, settings.lora_alpha, settings.target_modules)
    started = time.process_time()
    prepare(model, original)
    preparing = time.process_time() - started
    del original

    trained = [p for p in lora_parameters(model) if p.requires_grad]
    optimizer = AdamW(make_groups(model, settings.learning_rate), lr=settings.learning_rate)
    schedule = cosine_with_warmup(optimizer, settings.max_steps, settings.warmup_ratio)
    lm = CausalLM(model, examples[0].input_ids[None, :8])
    training = Training(lm, optimizer, schedule, GradScaler(enabled=False))
    started = time.process_time()
    losses = [row["loss"] for row in train(training, examples, settings.max_steps, settings)]
    seconds = time.process_time() - started
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(model, directory)
        size = (Path(directory) / "adapter_model.safetensors").stat().st_size
    return {
        **training.lm.score(held_out),
        "train_loss": statistics.mean(losses[-5:]),
        "trained": sum(p.numel() for p in trained),
        "file": size,
        "prepare": preparing,
        "step": seconds / settings.max_steps,
    }


def table(results):
    lines = [
        "| variant | runs | trained | adapter file | preparation | CPU time a step | last 5 losses "
        "| held-out loss | right tokens | exact match |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, runs in results.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"| {variant} | {len(runs)} | {mean['trained']:,.0f} | {mean['file'] / 1e6:.1f} MB "
            f"| {mean['prepare']:.1f} s | {mean['step']:.2f} s | {mean['train_loss']:.3f} "
            f"| {mean['loss']:.3f} | {mean['token_accuracy']:.1%} | {mean['exact_match']:.1%} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant; the table shows means")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()

    budget = f"{arguments.steps} steps of {arguments.rows} rows, {arguments.held_out} held-out rows"
    record = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
    runs = record.setdefault(budget, {})
    for variant in arguments.only:
        for seed in range(arguments.seeds):
            settings = FinetuneSettings(
                max_steps=arguments.steps, per_device_train_batch_size=arguments.rows, learning_rate=1e-3, seed=seed,
                eval_samples=arguments.held_out, device="cpu", dtype="float32",
            ).with_defaults()  # fmt: skip
            run = one_run(variant, settings, data.load_chats(settings)[:2])
            runs.setdefault(variant, {})[str(seed)] = run
            write_json(arguments.record, record)
            print(f"{variant}, seed {seed}: loss {run['loss']:.3f}, exact {run['exact_match']:.1%}, "
                  f"{run['step']:.2f} s a step", file=sys.stderr, flush=True)  # fmt: skip
    page = "\n".join([
        "# Variants of LoRA on the shipped task",
        "",
        f"Written by `python benchmarks/variants.py --steps {arguments.steps} --rows {arguments.rows} "
        f"--held-out {arguments.held_out}`: {budget}; torch {torch.__version__} in fp32 on {torch.get_num_threads()} "
        f"thread(s) of an {platform.machine()} CPU; times are CPU time.",
        "",
        table({variant: list(runs[variant].values()) for variant in VARIANTS if variant in runs}),
        "",
        READING,
        "",
    ])  # fmt: skip
    print(page)
    arguments.record.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
