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
# # 05. How do I trade time for memory?
#
# The backward pass needs the activations of the forward pass. [Lesson 04](04_where_memory_goes.ipynb) showed how many there are. *Gradient checkpointing* throws most of them away and computes them again when they are needed. In this lesson you write it yourself, find out where the simplest version is silently wrong, repair it, and see that the famous √n is the wrong number of checkpoints for a transformer.
#
# The claims come from document 001 (efficient training), which recommends the technique, and document 002 (efficient network training), which advises against it.
#
# Terms: gradient checkpointing 梯度检查点, activation checkpointing 激活检查点, recompute 重算, trade time for space 时间换空间, peak memory 峰值显存

# %%
import math

import numpy as np
import torch
from handtuned import lessons, memory
from handtuned.nn import (
    CheckpointedTransformerLayer,
    TransformerBlock,
    checkpoint,
    checkpoint_sequential,
    manual_checkpoint_forward,
)
from handtuned.nn.checkpoint import _RecomputeFunction, _Surroundings
from handtuned.nn.checkpoint_plan import plan_checkpoints
from handtuned.nn.live_memory import LiveMemory
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

GB, GIB = 10**9, 2**30

# %% [markdown]
# ## On four numbers
#
# A chain of four layers, `h ← tanh(w · h)`, with one number each. The gradient of layer *i* needs its input, so the plain way keeps four of them. The thrifty way keeps two, the *checkpoints*: the input of layer 0 and that of layer 2. When backward arrives in a segment, it runs that segment's forward again.
#
# **Write down your guess:** how many tanh does the thrifty way compute, if the plain one computes four?

# %%
lessons.guess("05.a", "how many tanh does the thrifty way compute?")
w = np.array([0.9, -1.3, 0.7, 1.1])
calls = 0


def layer(i, h):
    global calls
    calls += 1
    return np.tanh(w[i] * h)


def back(i, h_in, h_out, grad):
    """(gradient of w[i], gradient of the layer's input)"""
    slope = grad * (1 - h_out**2)
    return slope * h_in, slope * w[i]


def plain(x):
    h = [x]
    for i in range(4):
        h.append(layer(i, h[-1]))
    grad, dw = 1.0, np.zeros(4)
    for i in reversed(range(4)):
        dw[i], grad = back(i, h[i], h[i + 1], grad)
    return dw, len(h) - 1  # the output belongs to whoever called


def thrifty(x, length=2):
    checkpoints, h = [], x
    for i in range(4):
        if i % length == 0:
            checkpoints.append(h)
        h = layer(i, h)
    grad, dw = 1.0, np.zeros(4)
    for start in reversed(range(0, 4, length)):
        inside = [checkpoints[start // length]]
        for i in range(start, start + length):  # forward once more, this segment only
            inside.append(layer(i, inside[-1]))
        for i in reversed(range(start, start + length)):
            dw[i], grad = back(i, inside[i - start], inside[i - start + 1], grad)
    return dw, len(checkpoints)


for way in (plain, thrifty):
    calls = 0
    dw, kept = way(0.5)
    print(f"{way.__name__:8} keeps {kept} numbers, computes {calls} tanh, gradient {dw.round(6)}")
lessons.measured("05.a", f"{calls}")

# %% [markdown]
# Same gradient, half the numbers, twice the tanh. But forward is only a third of the work: backward computes two products where forward computes one (the gradient of the input and that of the weight). Twice the forward is 4 units of work instead of 3.
#
# ## The same as an autograd function
#
# Document 001 shows the smallest version, and the library has it too. Forward runs without gradients, so autograd keeps nothing from inside. Backward runs the function again, with gradients.

# %%
lessons.source(_RecomputeFunction)

# %%
def mlp(width, dropout=0.0):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))


def gradients(run, module, x, seed=7):
    """Gradients of x and of every parameter, for the sum of squares of `run(module, x)`."""
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    run(module, x).square().sum().backward()
    return [t.grad for t in (x, *module.parameters()) if t.requires_grad]


def relative_error(found, expected):
    difference = math.sqrt(sum((0 if f is None else f - e).square().sum() if f is not None else e.square().sum()
                               for f, e in zip(found, expected, strict=True)))
    return difference / math.sqrt(sum(e.square().sum() for e in expected))


torch.manual_seed(0)
module, x = mlp(32), torch.randn(64, 32, requires_grad=True)
expected = gradients(lambda f, x: f(x), module, x)
found = gradients(manual_checkpoint_forward, module, x)
print("bit-equal gradients:", all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)))
for name, run in (("plain", lambda: module(x)), ("checkpointed", lambda: manual_checkpoint_forward(module, x))):
    counted = memory.measure(run)
    print(f"{name:13} leaves {counted.after - counted.before:7,} bytes behind after forward")

# %% [markdown]
# Exact, for an MLP. The output itself (64 × 32 floats) is all that is left.
#
# **Write down your guess** for three harder cases. What happens (a) with dropout, which draws a random mask in every call, (b) with an argument that is not a tensor, such as a factor, (c) when the input needs no gradient, as with the first layer of a model?

# %%
lessons.guess("05.b", "what happens with dropout, with a number as argument, with an input that needs no gradient?")
noisy = mlp(32, dropout=0.5)
expected = gradients(lambda f, x: f(x), noisy, x)
dropout_error = relative_error(gradients(manual_checkpoint_forward, noisy, x), expected)
print(f"(a) dropout: relative error of the gradient {dropout_error:.0%}, and no message")

try:
    manual_checkpoint_forward(lambda x, factor: module(x) * factor, x, 2.0)
    refused = None
except TypeError as error:
    refused = error
print(f"(b) a plain number: TypeError: {refused}")

data = torch.randn(64, 32)  # no gradient wanted
silent = manual_checkpoint_forward(module, data)
print(f"(c) input without gradient: the result's requires_grad is {silent.requires_grad}, so no parameter would learn")

lessons.measured("05.b", f"a gradient off by {dropout_error:.0%} without a word; refused; nothing is trained")
lessons.claim(
    40,
    measured=f"for a plain MLP the gradients are equal to the bit; with dropout they are off by {dropout_error:.0%} with no "
    "error message, a plain number as argument is refused, and with an input that needs no gradient nothing is trained",
    holds=0.5 < dropout_error < 1.5 and refused is not None and not silent.requires_grad,
)

# %% [markdown]
# Case (a) is the nasty one. Backward drew *another* mask: the gradient belongs to a network that was never run.
#
# ## Repairing it
#
# The recomputation must find the world as the forward pass found it. So the state of the random generator is noted before forward and restored around the recomputation, and the same for autocast:

# %%
lessons.source(_Surroundings.restored)

# %% [markdown]
# The library's `checkpoint` also drops the autograd node. It runs the function with gradients on and lets `saved_tensors_hooks` (you used them in lesson 04) swap every tensor that would be kept for an empty slot. When backward opens the first slot, the function runs again and fills them all. That lifts (b) and (c) too: arguments may be anything, and parameters are seen by autograd as always.

# %%
repaired = {
    "dropout": relative_error(gradients(checkpoint, noisy, x), expected),
    "a factor": relative_error(
        gradients(lambda f, x: checkpoint(lambda x, factor: f(x) * factor, x, 2.0), module, x),
        gradients(lambda f, x: f(x) * 2.0, module, x)),
    "no gradient": relative_error(gradients(checkpoint, module, data), gradients(lambda f, x: f(x), module, data)),
}
torch.manual_seed(7)
noisy(x)
after_plain = torch.rand(1)
gradients(checkpoint, noisy, x)
print(repaired, "| next random number as after a plain run:", torch.equal(torch.rand(1), after_plain))
assert not any(repaired.values())

# %% [markdown]
# ## What it does to a stack of layers
#
# Twelve transformer blocks. Three ways: keep everything; one checkpoint in every layer; √12 ≈ 3 groups. The picture shows the bytes above weights and gradients during forward and backward.

# %%
torch.manual_seed(1)
blocks = nn.ModuleList(TransformerBlock(64, 4, 172, num_kv_heads=2) for _ in range(12))
stream = torch.randn(4, 96, 64, requires_grad=True)
for parameter in (*blocks.parameters(), stream):
    parameter.grad = torch.zeros_like(parameter)  # has its place before anything is counted


def run_stack(segments):
    y = stream
    if segments is None:
        for block in blocks:
            y = block(y)
    else:
        y = checkpoint_sequential(blocks, y, segments)
    y.square().mean().backward()


ways = {"keep everything": None, "√n = 3 groups": 3, "every layer": 12}
fig, ax = lessons.figure(height=2.8)
peaks = {}
for (name, segments), style in zip(ways.items(), (("0.55", "-"), ("0.1", "--"), (lessons.ACCENT, "-")), strict=True):
    with LiveMemory(keep_history=True, scan=False) as live:
        run_stack(segments)
    peaks[name] = live.peak_added
    course = np.array(live.history) / 1e6
    ax.plot(np.linspace(0, 1, len(course)), course, color=style[0], linestyle=style[1], lw=1, label=name)
ax.set(xlabel="from the start of forward to the end of backward", ylabel="MB above weights and gradients", xticks=[], ylim=(0, None))
ax.legend(loc="upper right")
lessons.show(fig, alt="Memory over a step: without checkpoints a single high mountain; with three groups three lower ones; with a "
             "checkpoint in every layer a low comb.")
for name, peak in peaks.items():
    print(f"{name:16} peak {peak / 1e6:6.2f} MB")

# %% [markdown]
# Without checkpoints there is one mountain: twelve layers pile up, then come down. With three groups there are three smaller mountains, each the inside of four layers. With a checkpoint in every layer the climbs are one layer high. Beneath them lie twelve checkpoints, which you hardly see. That is the whole story of this lesson in one picture.
#
# ## How many checkpoints? The √n
#
# Call *boundary* what a checkpoint keeps of a layer's input, and *inside* what a layer keeps for backward. With *n* equal layers in *k* groups,
#
# `peak = k · boundary + (n / k) · inside`
#
# The first term is the checkpoints, the second one group that is being recomputed. If inside = boundary, the least is at k = √n. That is where document 001's O(√n) comes from. **But in a transformer a layer keeps far more than its input.** For a 7B model in 16 bits, lesson 04's formula gives 34 + 5·a·s/h = 114 bytes inside and 2 at the boundary, a ratio of 57.
#
# **Write down your guess:** with 32 layers and a ratio of 57, which *k* is best?

# %%
lessons.guess("05.c", "with 32 layers and a ratio of 57, which k is best?")
def peak_of(layers, groups, boundary, inside):
    return groups * boundary + math.ceil(layers / groups) * inside


counts = {"keep everything": 32 * 114, "every layer": peak_of(32, 32, 2, 114), "√n groups": peak_of(32, round(32**0.5), 2, 114)}
print("bytes per token and hidden unit:", counts)

fig, axes = lessons.figure(height=2.6, columns=2)
k = np.arange(1, 33)
for ax, ratio in zip(axes, (1, 57), strict=True):
    peaks_k = np.array([peak_of(32, int(groups), 1, ratio) for groups in k])
    ax.plot(k, peaks_k, color="0.3", linestyle="-")
    best = k[peaks_k == peaks_k.min()]
    ax.plot(best, np.full(len(best), peaks_k.min()), "o", color=lessons.ACCENT, markersize=4)
    where = f"k = {best[0]}" if len(best) == 1 else f"k = {best[0]} to {best[-1]}"
    ax.annotate(f"least at {where}", (best[0], peaks_k.min()), (0, -18) if ratio == 1 else (0, 12), textcoords="offset points",
                ha="left" if ratio == 1 else "right", color=lessons.ACCENT)
    ax.axvline(32**0.5, color="0.6", ls=":", lw=1)
    ax.text(32**0.5 + 0.5, peaks_k.max() * 0.9, "√n", color="0.4")
    ax.set(xlabel="groups k", title=f"inside / boundary = {ratio}", ylim=(0, peaks_k.max() * 1.05))
axes[0].set_ylabel("peak, in boundaries")
lessons.show(fig, alt="Peak against number of groups for 32 layers. With inside equal to boundary the least is near the root of 32; "
             "with a ratio of 57 the curve falls all the way to 32 groups.")
lessons.measured("05.c", where)

# %% [markdown]
# In the left picture checkpoints cost as much as what they save, so there is a compromise. In the right one a checkpoint is nearly free beside the inside of a layer. One wants as many as there are layers. (Between 16 and 31 groups the largest group has two layers all the time, so only the last step, to 32, brings something.)
#
# And the code of 001 does not use √n groups at all. Its layer checkpoints each sub-layer (attention, feed-forward). With *n* layers it keeps 2·n boundaries: still O(n), with a small constant. Let us count on the library's copy of that layer.

# %%
def kept_by(layers, use_checkpoint):
    torch.manual_seed(2)
    stack = nn.ModuleList(CheckpointedTransformerLayer(64, 4, 256) for _ in range(layers))

    def forward():
        y = stream
        for one in stack:
            y = one(y, use_checkpoint=use_checkpoint)
        return y

    counted = memory.measure(forward)
    return (counted.after - counted.before) / stream.nbytes


sizes = (2, 4, 8, 16)
kept = {flag: [kept_by(n, flag) for n in sizes] for flag in (False, True)}
slope = {flag: np.polyfit(sizes, kept[flag], 1)[0] for flag in kept}
print("layers", *sizes)
for flag, name in ((False, "plain"), (True, "checkpointed")):
    print(f"{name:13}", *(f"{v:6.1f}" for v in kept[flag]), f"boundaries kept: {slope[flag]:.2f} more with each layer")
lessons.claim(
    36,
    measured=f"the notes' own layer keeps {slope[True]:.2f} boundaries per layer (plain: {slope[False]:.1f}), in proportion to n, "
    f"not √n; and √n groups would be worse: {counts['√n groups']} against {counts['every layer']} (and {counts['keep everything']} "
    f"without checkpoints) for a 7B model; in the stack above {peaks['√n = 3 groups'] / 1e6:.1f} against "
    f"{peaks['every layer'] / 1e6:.1f} MB",
    holds=(counts == {"keep everything": 3648, "every layer": 178, "√n groups": 696} and abs(slope[True] - 2) < 0.2
           and peaks["every layer"] < peaks["√n = 3 groups"]),
)

# %% [markdown]
# ## What does it cost?
#
# 001 says about 30 % more time. 002 says that values are computed "twice", that it is very slow, and advises against it. Time depends on the machine, so count *FLOPs*, the multiplications and additions of matrix products. The bound is one more forward: 4/3. A good implementation stops recomputing as soon as the last tensor that backward wants is there: the last product of a segment need not be repeated, since nobody wants its result.
#
# **Write down your guess** for blocks of two equal matrices: the overhead with one checkpoint per block, and with one for 16 blocks together.

# %%
lessons.guess("05.d", "the overhead of a checkpoint per block, and of one for 16 blocks together?")
def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


torch.manual_seed(3)
towers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(16)))
y0 = torch.randn(8, 32, requires_grad=True)


def each_block():
    y = y0
    for tower in towers:
        y = checkpoint(tower, y)
    y.sum().backward()


base = flops(lambda: towers(y0).sum().backward())
overhead = {
    "no early stop": flops(lambda: manual_checkpoint_forward(towers, y0).sum().backward()) / base - 1,
    "one segment": flops(lambda: checkpoint(towers, y0).sum().backward()) / base - 1,
    "each block": flops(each_block) / base - 1,
}
transformer = flops(lambda: run_stack(12)) / flops(lambda: run_stack(None)) - 1
print({name: f"+{share:.1%}" for name, share in overhead.items()}, f"| the 12 transformer blocks: +{transformer:.1%}")
lessons.measured("05.d", f"+{overhead['each block']:.1%} and +{overhead['one segment']:.1%}")
lessons.claim(
    37,
    measured=f"one more forward is +{overhead['no early stop']:.1%}; stopping early, +{overhead['each block']:.1%} with a checkpoint "
    f"in every block of two matrices, +{overhead['one segment']:.1%} with one for all; in a transformer +{transformer:.0%}",
    holds=(abs(overhead["no early stop"] - 1 / 3) < 1e-9 and abs(overhead["each block"] - 1 / 6) < 1e-9
           and abs(overhead["one segment"] - 31 / 96) < 1e-9 and transformer < 1 / 3),
)

# %%
times = 0


def counting(x):
    global times
    times += 1
    return module(x)


checkpoint(counting, x).sum().backward()
saved = 1 - peaks["every layer"] / peaks["keep everything"]
lessons.claim(
    41,
    measured=f"the function ran {times} times in all: once forward, once more in backward. The bill is at most a third more "
    f"FLOPs (here {transformer:.0%}), and for it the peak of the stack above fell by {saved:.0%}. 001 recommends it for that. If 002 means "
    "two computations in all, it is right; the price is no reason to leave it out",
    holds=times == 2 and transformer < 1 / 3 and saved > 0.7,
)

# %% [markdown]
# 001 says that checkpointing saves "another 30–50 %". That is of the whole peak: weights, states and all.
#
# **Write down your guess:** what part of the peak of a 7B model does it save with 1, 4 and 16 rows of 2048 tokens, in full fine-tuning and with LoRA?

# %%
lessons.guess("05.e", "what part of a 7B model's peak does checkpointing save: full fine-tuning with 1 row, LoRA with 16?")
share_saved = {}
for method in ("full", "lora"):
    for rows in (1, 4, 16):
        plain, again = (memory.estimate("7b", method, dtype="bfloat16", batch=rows, seq=2048, checkpoint=on).peak for on in (False, True))
        share_saved[method, rows] = 1 - again / plain
lessons.measured("05.e", f"{share_saved['full', 1]:.0%} and {share_saved['lora', 16]:.0%}")
lessons.claim(
    61,
    measured="of the whole peak of a 7B model with 1, 4, 16 rows of 2048 tokens checkpointing saves "
    + "; ".join(f"{name} " + ", ".join(f"{share_saved[method, rows]:.0%}" for rows in (1, 4, 16))
                for method, name in (("full", "in full fine-tuning"), ("lora", "with LoRA")))
    + f". It takes {1 - counts['every layer'] / counts['keep everything']:.0%} off the activations, and what that is of the whole "
    "depends on what else is there",
    holds=share_saved["full", 1] < 0.3 and share_saved["lora", 16] > 0.5 and 0.3 <= share_saved["lora", 1] <= 0.5,
)

# %% [markdown]
# ## 001's memory function
#
# It computes a layer's activations as `b·s·h·2 + b·s·s·2`, multiplies by 32 layers, and by √32 for the checkpointed case. There are no heads in it, one term counts bytes and the other elements times a factor, and a layer times √n is neither of the two ways to place checkpoints. The library's `analyze_memory_savings` has the same name and counts as lesson 04 does.

# %%
rows, seq, hidden, layers, heads = 4, 2048, 4096, 32, 32
notes_layer = rows * seq * hidden * 2 + rows * seq * seq * 2
notes = {"standard": layers * notes_layer / GIB, "checkpointed": math.sqrt(layers) * notes_layer / GIB}
ours = memory.analyze_memory_savings(layers, hidden, seq, rows, heads)
lessons.claim(
    38,
    measured=f"the notes' formula gives {notes['standard']:.2f} → {notes['checkpointed']:.2f} GiB; counted tensor by tensor it is "
    f"{ours['standard'] / GIB:.0f} GiB, {ours['every layer'] / GIB:.1f} GiB with a checkpoint in every layer and "
    f"{ours['sqrt'] / GIB:.1f} GiB with √n groups",
    holds=(round(notes["standard"], 2) == 3.00 and round(notes["checkpointed"], 2) == 0.53
           and round(ours["standard"] / GIB) == 114 and round(ours["every layer"] / GIB, 1) == 5.6),
)

# %% [markdown]
# ## 001's layer
#
# Is the layer itself right? Three questions: same result and gradients with and without checkpoints; what do the returned attention weights cost; and does it look into the future (a *causal mask* forbids that, and a language model needs it)?

# %%
torch.manual_seed(4)
document_layer = CheckpointedTransformerLayer(64, 4, 256)
x = torch.randn(2, 100, 64, requires_grad=True)
with_it = gradients(lambda f, x: f(x, use_checkpoint=True), document_layer, x)
without = gradients(lambda f, x: f(x, use_checkpoint=False), document_layer, x)
same = all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))

attention = document_layer.self_attn
cost = {need: memory.measure(attention, x, x, x, need_weights=need).added for need in (True, False)}

later = x.detach().clone()
later[:, -1] += 1  # change the last position only
with torch.no_grad():
    sees_future = not torch.equal(document_layer(x)[:, 0], document_layer(later)[:, 0])
    document_layer.causal = True
    causal_sees = not torch.equal(document_layer(x)[:, 0], document_layer(later)[:, 0])
lessons.claim(
    39,
    measured=f"result and gradients with checkpoints are {'equal to the bit' if same else 'different'}. Two things to mend: asking "
    f"attention for its weights, as 001 does, takes {cost[True] / cost[False]:.1f} times the memory of not asking; and without a "
    "mask the first position changes when the last one does",
    holds=same and cost[True] > cost[False] and sees_future and not causal_sees,
)

# %% [markdown]
# ## Let it choose
#
# Real stacks are uneven, and sometimes there is room for a few layers to be kept. `segments="auto"` measures each layer and searches the boundaries; with `budget` it recomputes as little as possible within so many bytes. Each point below is one way to run the same twelve blocks.

# %%
def point(segments):
    with LiveMemory(scan=False) as live:
        run_stack(segments)
    return live.peak_added / 1e6, flops(lambda: run_stack(segments)) / plain_flops


plain_flops = flops(lambda: run_stack(None))
least = plan_checkpoints(list(blocks), stream)
auto = [plan_checkpoints(list(blocks), stream, budget=int(least.peak * factor)) for factor in (1, 1.5, 2, 3, 4, 5)]
points = {"keep everything": point(None), "√n groups": point("sqrt"), "every layer": point(12)}
line = [point(plan) for plan in auto]

fig, ax = lessons.figure(height=3)
ax.plot(*zip(*line, strict=True), color=lessons.ACCENT, marker="o", markersize=4, linestyle="-", label="auto, with growing budgets")
for (name, (peak, work)), marker in zip(points.items(), "s^D", strict=True):
    ax.plot(peak, work, marker, color="0.2", markersize=6)
    ax.annotate(name, (peak, work), (7, 4), textcoords="offset points")
ax.axhline(4 / 3, color="0.6", lw=0.8, ls=":")
ax.text(points["keep everything"][0], 4 / 3 - 0.004, "one more forward", color="0.4", ha="right", va="top")
ax.set(xlabel="peak of activations, MB", ylabel="FLOPs, plain = 1", xlim=(0, points["keep everything"][0] * 1.25), ylim=(0.98, 1.36))
ax.legend(loc="center right")
lessons.show(fig, alt="FLOPs against peak memory. Root-n groups take more than twice the memory of a checkpoint in every layer and "
             "about as many FLOPs; automatic plans form a frontier between every layer and keeping everything.")
print(least)

# %%
if lessons.gpu():
    gpu_blocks = nn.ModuleList(TransformerBlock(1024, 16, 2816) for _ in range(12)).cuda()
    gpu_x = torch.randn(4, 1024, 1024, device="cuda", requires_grad=True)
    for name, segments in (("√n groups", "sqrt"), ("every layer", 12)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        counted = memory.measure(lambda s=segments: checkpoint_sequential(gpu_blocks, gpu_x, s).sum().backward(), device="cuda")
        end.record()
        torch.cuda.synchronize()
        print(torch.cuda.get_device_name(), name, f"{start.elapsed_time(end):.0f} ms, {counted}")
else:
    lessons.skipped("time and allocator peak of the ways above, on 12 blocks of width 1024")

# %% [markdown]
# How to use this: if training fits, do not checkpoint. If it does not, take a checkpoint in every layer, the lower left corner of what is possible with little thought. If then there is room to spare, give the room as a `budget` to `segments="auto"`, and some of the recomputing goes away. The √n groups lie above the line: a plan on it has less of both.
#
# ## Exercise 05.1: The best number of groups
#
# Write `best_groups(layers, boundary, inside)`: the number of groups, 1 to `layers`, with the least `k · boundary + ceil(layers / k) · inside`.

# %%
def best_groups(layers, boundary, inside):
    raise NotImplementedError


lessons.check("05.1", best_groups);

# %% [markdown]
# ## Exercise 05.2: A checkpoint that gets dropout right
#
# Write `my_checkpoint(func, *args)` for tensors `args` of which at least one requires a gradient: keep nothing from inside `func`, recompute in backward, get dropout right, and leave the random generator as a plain run would leave it.

# %%
def my_checkpoint(func, *args):
    raise NotImplementedError


lessons.check("05.2", my_checkpoint);

# %% [markdown]
# ## Exercise 05.3: Checkpoints around groups of layers
#
# Write `run_in_groups(layers, x, groups)`: run the layers one after the other, in `groups` groups whose lengths differ by at most one, each group one `handtuned.nn.checkpoint`.

# %%
def run_in_groups(layers, x, groups):
    raise NotImplementedError


lessons.check("05.3", run_in_groups);

# %% [markdown]
# ## What to remember
#
# - A checkpoint keeps a segment's input and recomputes its inside: memory n·inside becomes n·boundary + inside.
# - It costs at most one more forward, a third of the FLOPs; with early stop less.
# - In a transformer one checkpoint in every layer beats √n groups, because a layer keeps tens of times its input.
# - A recomputation must repeat the forward pass exactly: random numbers, autocast, everything. If not, gradients are wrong and nothing says so.
#
# On a real model: `handtuned finetune --gradient-checkpointing`.
#
# Less memory for activations means a larger batch. What if it still does not fit? [Lesson 06: How do I fake a big batch?](06_faking_a_big_batch.ipynb)
