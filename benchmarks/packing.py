"""Tokens per second with padded, grouped and packed rows, on the shipped rows and on rows of very different lengths.

    python benchmarks/packing.py [--turns 12] [--rows 8] [--model smollm2]

The layouts take turns, a training step of LoRA each on the same model, so that what else a machine does meets all of
them; speeds are means over the turns, and the ratio to padded rows is the median of the turns' ratios. How many
places in a batch hold no token is counted over a whole epoch. The result goes to `packing.md` beside this file.

The long-tailed rows are made here: 600 rows of random words, of lognormal length (median 48 words, σ = 0.9: half of
the rows are short, every tenth is over 3 times the median, and the longest fill a sequence of 512 tokens).
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from handtuned.training import data, loop
from handtuned.training.logging import processor
from handtuned.training.models import add_adapters, load_base_and_rows
from handtuned.training.settings import FinetuneSettings

LAYOUTS = {"padded": {}, "grouped": {"group_by_length": True}, "packed": {"packing": True}}
WORDS = ["time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child", "work"]


def write_long_tailed(path, count=600):
    """Rows of prompt and completion, as JSON Lines."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            total = int(np.clip(rng.lognormal(np.log(48), 0.9), 4, 420))
            words = rng.choice(WORDS, total).tolist()
            asked = max(1, int(total * rng.uniform(0.2, 0.6)))
            row = {"prompt": " ".join(words[:asked]), "completion": " ".join(words[asked:])}
            file.write(json.dumps(row) + "\n")


def empty_places(examples, training, settings):
    """The share of the places in an epoch's batches that hold no token."""
    lengths = [len(example.input_ids) for example in examples]
    size, tokens, places = settings.per_device_train_batch_size, 0, 0
    for step in range(len(examples) // size):
        grouped = lengths if settings.group_by_length else None
        rows = [examples[i] for i in data.batch_indices(step, len(examples), size, settings.seed, grouped)]
        places += data.collate(rows, 0, bins=training.layout(rows))["input_ids"].numel()
        tokens += sum(len(row.input_ids) for row in rows)
    return 1 - tokens / places


def measure(settings, turns):
    """Layout → (share of empty places, tokens per second, ratio to padded); and the rows' lengths in tokens."""
    base = load_base_and_rows(settings, torch.device("cpu"), "cpu")
    add_adapters(base.model, settings)
    runs, empty, steps = {}, {}, {}
    for name, flags in LAYOUTS.items():
        own = dataclasses.replace(settings, **flags)
        training = loop.prepare(base, own, 10**6)
        empty[name] = empty_places(base.examples, training, own)
        runs[name] = loop.train(training)
    for turn in range(turns + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            row = next(run)
            if turn:  # the first is a warm-up
                steps.setdefault(name, []).append((row["tokens_per_second"], time.perf_counter() - started))
    speed = {name: sum(rate * s for rate, s in taken) / sum(s for _, s in taken) for name, taken in steps.items()}
    ratio = {
        name: statistics.median(a / b for (a, _), (b, _) in zip(taken, steps["padded"], strict=True))
        for name, taken in steps.items()
    }
    found = {name: (empty[name], speed[name], ratio[name]) for name in LAYOUTS}
    return found, np.array([len(example.input_ids) for example in base.examples])


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8, help="per forward pass")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args(words)
    lines = [
        "# Padded, grouped and packed rows",
        "",
        f"Written by `python benchmarks/packing.py --turns {arguments.turns} --rows {arguments.rows}`: a training step "
        f"of {arguments.model}, LoRA r 8 on all linear layers, fp32, {arguments.rows} rows, {arguments.turns} turns; "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s) of {processor('model name')[0]}.",
        "",
        "| rows | tokens per row: median, mean, longest | layout | empty places | tokens per second | against padded |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        long_tailed = str(Path(place) / "rows.jsonl")
        write_long_tailed(long_tailed)
        for what, path in (("shipped", None), ("long-tailed", long_tailed)):
            settings = FinetuneSettings(
                model=arguments.model, data=path, method="lora", device="cpu", dtype="float32", learning_rate=1e-4,
                per_device_train_batch_size=arguments.rows, eval_samples=1,
            )  # fmt: skip
            found, lengths = measure(settings, arguments.turns)
            of_rows = f"{np.median(lengths):.0f}, {lengths.mean():.0f}, {lengths.max()}"
            lines += [f"| {what} | {of_rows} | {name} | {empty:.1%} | {speed:.0f} | {ratio:.2f} × |"
                      for name, (empty, speed, ratio) in found.items()]  # fmt: skip
    page = "\n".join([*lines, ""])
    print(page)
    arguments.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
