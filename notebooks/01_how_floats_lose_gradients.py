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
# # 01. How does a float lose your gradient?
#
# Half of the memory tricks in this course store numbers in fewer bits. Before any of them works, one thing has to be understood: what a number with few bits cannot represent, and what happens to a gradient that it cannot represent.
#
# This lesson takes floating-point numbers apart, bit by bit. Then it follows the study documents' own worked example, in which a gradient is said to get lost in FP16. The example fails, twice. In an exercise you will find one that works.
#
# Terms: floating point 浮点数, sign 符号位, exponent 指数位, mantissa 尾数位, half precision 半精度, rounding 舍入, underflow 下溢, overflow 上溢, subnormal number 非规格化数, loss scaling 损失缩放, master weights 主权重

# %%
import json
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from handtuned import lessons
from handtuned.amp import describe
from handtuned.amp.formats import BF16, FP16, FP32, FloatFormat

# %% [markdown]
# ## Three fields
#
# A computer stores a float as scientific notation in base two: a **sign**, a **mantissa** (the digits), and an **exponent** (where the point is).
#
# $$x = (-1)^{s} \cdot 1.f \cdot 2^{\,e - b}$$
#
# The digit before the point is always 1, so it is not stored. The exponent field $e$ is a whole number from 0 up; a fixed **bias** $b$ is subtracted from it, so that small numbers can be written as well as large ones.
#
# Three formats matter here. **FP32** has 32 bits and is what PyTorch uses if you say nothing. **FP16** ("half precision") and **BF16** ("bfloat16") have 16, and divide them differently. Here is the number 0.1 in each:

# %%
number = 0.1
shown = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
fig, ax = lessons.figure(7, 2.6)
for row, (name, dtype) in enumerate(shown.items()):
    d = describe(number, dtype)
    fields = {"sign": 1, "exponent": len(d.exponent), "mantissa": len(d.mantissa)}
    lessons.bit_row(ax, d.sign + d.exponent + d.mantissa, fields, y=-1.3 * row, label=name)
    print(d)
lessons.show(
    fig,
    alt="The bits of 0.1 in three formats. fp32 has 8 exponent and 23 mantissa bits, fp16 has 5 and 10, bf16 has 8 and 7.",
)

# %% [markdown]
# FP16 and BF16 have the same length. BF16 keeps all eight exponent bits of FP32 and gives up mantissa bits; it is FP32 with the lower half cut off. FP16 keeps more digits and gives up range.
#
# ## Decode four numbers by hand
#
# Take four FP16 bit patterns, cut out the fields with shifts, and put the number together. Two things are special at the low end: if the exponent field is 0, the hidden digit is 0 instead of 1, and the power is that of field 1. Such numbers are called **subnormal**: they fill the gap between the smallest normal number and zero, with fewer and fewer digits. At the other end, exponent field 31 means infinity (mantissa 0) or NaN, "not a number".

# %%
patterns = np.array([0x3C00, 0x2E66, 0x0001, 0xFBFF], dtype=np.uint16)
sign = patterns >> 15
exponent = (patterns >> 10 & 31).astype(int)
mantissa = (patterns & 1023).astype(float)
hidden = (exponent > 0).astype(float)  # the digit before the point
value = (-1.0) ** sign * (hidden + mantissa / 1024) * 2.0 ** (np.maximum(exponent, 1) - 15)
for row in zip(patterns, sign, exponent, mantissa, value, strict=True):
    print("0x{:04x}   sign {}  exponent {:2}  mantissa {:4.0f}   = {:.6g}".format(*row))
assert np.array_equal(value, patterns.view(np.float16).astype(float))  # numpy's own reading of the same bits

# %% [markdown]
# The third one, with a single bit set, is the smallest positive number of FP16: $2^{-24}$, about 6·10⁻⁸. The fourth is the largest in size, 65504.
#
# The library has the same decoding for any format, and for whole tensors:

# %%
lessons.source(FloatFormat.decode, "sign, field, mantissa", "return _like")
print({fmt.name: f"largest {fmt.max:.3g}, smallest {fmt.smallest_subnormal:.3g}" for fmt in (FP32, FP16, BF16)})

# %% [markdown]
# ## Exercise 01.1: read the bits
#
# Write `decode(bits)`: the number that the 16 bits of an FP16 stand for, as a float. `bits` is an integer from 0 to 65535. Mind the subnormals, infinity (`math.inf`) and NaN (`math.nan`).


# %%
def decode(bits):
    raise NotImplementedError


lessons.check("01.1", decode);

# %% [markdown]
# ## How far apart are neighbours?
#
# With ten mantissa bits there are 1,024 numbers between 1 and 2, and also 1,024 between 1,024 and 2,048. The distance between neighbours doubles with each power of two. A number in between is **rounded** to the nearer neighbour.
#
# **Write down your guess:** In FP16, what is 1 + 0.0001? And 2048 + 1? And 1 + 0.001?

# %%
lessons.guess("01.a", "what is 1 + 0.0001 in FP16? 2048 + 1? 1 + 0.001?")
for a, b in ((1.0, 0.0001), (2048.0, 1.0), (1.0, 0.001)):
    total = torch.tensor(a).half() + torch.tensor(b).half()
    print(f"{a:g} + {b:g} = {total.item():.6g}    (neighbours of {a:g} are {FP16.spacing(a):.3g} apart)")

sizes = np.logspace(-12, 12, 1000)
fig, ax = lessons.figure(7, 3)
for fmt, style in zip((FP32, FP16, BF16), lessons.LINES, strict=False):
    inside = sizes[(sizes <= fmt.max) & (sizes >= fmt.smallest_subnormal)]
    ax.loglog(inside, fmt.spacing(torch.tensor(inside)).numpy() / inside, style, label=fmt.name)
ax.set(xlabel="size of the number", ylabel="distance to the next,\nrelative", ylim=(1e-8, 2))
ax.legend()
lessons.show(
    fig,
    alt="Relative spacing against size. fp32 and bf16 are level over the whole range, at 1e-7 and 1e-2. "
    "fp16 is level at 1e-3 from 6e-5 to 65504, and worsens below until the spacing is as large as the number at 6e-8.",
)
lessons.measured(
    "01.a",
    ", ".join(f"{(torch.tensor(a).half() + torch.tensor(b).half()).item():.6g}" for a, b in ((1.0, 1e-4), (2048.0, 1.0), (1.0, 1e-3))),
)

# %% [markdown]
# Each format keeps a constant number of digits over its normal range: about 7 decimal digits in FP32, 3 in FP16, 2 in BF16. FP16 pays twice: its range ends at 65504, and below 6·10⁻⁵ it loses digit after digit.
#
# ## Does losing digits hurt?
#
# Document 000 explains the fields, and adds that the loss of precision hardly matters for a model's performance. We test it in two situations.
#
# 1. Take a trained layer and round its weights to FP16 **once**.
# 2. Train it **in** FP16: every update is added to an FP16 weight.
#
# **Write down your guess:** An optimizer moves each weight by about the learning rate, say 10⁻⁵. The weights have sizes around 0.05. What share of the updates will FP16 lose?

# %%
lessons.guess("01.b", "what share of the updates of 1e-5 does FP16 lose?")
torch.manual_seed(0)
x = torch.randn(512, 64)
teacher = torch.nn.Linear(64, 8)
target = torch.tanh(teacher(x)).detach()
student = torch.nn.Linear(64, 8)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
for _ in range(300):
    optimizer.zero_grad()
    loss = F.mse_loss(torch.tanh(student(x)), target)
    loss.backward()
    optimizer.step()

weight = student.weight.detach().clone()
rounded_loss = F.mse_loss(torch.tanh(F.linear(x, weight.half().float(), student.bias.half().float())), target)
variance = target.var()
harm_of_rounding = (rounded_loss - loss).abs().item() / variance.item()

update = 1e-5 * weight.sign()  # what Adam with a learning rate of 1e-5 would add, roughly
moved = (weight.half() - update.half()) != weight.half()
lost_updates = 1 - moved.float().mean().item()
print(f"rounding the trained weights once changes the error by {harm_of_rounding:.1e} of the target's variance")
print(f"updates of 1e-5 that an FP16 weight does not notice: {100 * lost_updates:.0f} %")

fields_right = all(
    (fmt.exponent_bits, fmt.mantissa_bits) == (int(torch.finfo(dtype).bits) - 1 - m, m)
    for fmt, dtype, m in ((FP32, torch.float32, 23), (FP16, torch.float16, 10), (BF16, torch.bfloat16, 7))
)
lessons.measured("01.b", f"{100 * lost_updates:.0f} %")
lessons.claim(
    1,
    f"The three fields are right. Rounding trained weights to FP16 once changes the error by {harm_of_rounding:.0e} of the "
    f"target's variance. But of the updates of size 1e-5, FP16 weights do not notice {100 * lost_updates:.0f} %: "
    "rounding once is harmless, rounding at every step stops training.",
    holds=fields_right and harm_of_rounding < 1e-4 and lost_updates > 0.5,
)

# %% [markdown]
# This is why every recipe for 16-bit training keeps the weights themselves in FP32. These are called **master weights**. The 16-bit copy is only for computing.
#
# ## What is too small, and what is too large
#
# Document 000 says: what is smaller than FP16 can express becomes 0, and what is larger becomes NaN.
#
# **Write down your guess:** What does PyTorch give for 70000 in FP16? For 10⁻⁸? For 4·10⁻⁸, which is smaller than the smallest number?

# %%
lessons.guess("01.c", "what does FP16 make of 70000, 1e-8 and 4e-8?")
for number in (70000.0, 65519.0, 6e-8, 4e-8, 1e-8):
    print(f"{number:8g} → {describe(number, torch.float16)}")
large = torch.tensor(70000.0).half()
print("\n70000 → ", large.item(), "   inf - inf =", (large - large).item(), "   inf · 0 =", (large * 0).item())
lessons.measured("01.c", ", ".join(f"{torch.tensor(number).half().item():.3g}" for number in (70000.0, 1e-8, 4e-8)))

# %% [markdown]
# 4·10⁻⁸ is *not* lost. It rounds to the nearest number, and that is 6·10⁻⁸. Only up to half of the smallest number, $2^{-25}$ = 2.98·10⁻⁸, does rounding give 0. Too small is called **underflow**, too large **overflow**.

# %%
small = torch.tensor(1e-8).half()
threshold = FP16.underflow_threshold
lessons.claim(
    2,
    f"Small numbers do become 0, up to {threshold:.3g}, half of the smallest number. 70000 becomes {large.item()}, "
    f"not NaN; NaN comes one operation later, from inf - inf = {(large - large).item()} or inf · 0.",
    holds=small.item() == 0 and torch.isinf(large).item() and torch.isnan(large - large).item(),
)

# %% [markdown]
# The difference matters in practice. A NaN is everywhere after one step; an infinity in a gradient can be found, and the step can be skipped. Lesson 03 builds on that.
#
# ## Exercise 01.2: the fate of a number
#
# Write `fate(x)`, which returns `"zero"`, `"subnormal"`, `"normal"` or `"infinity"`: what the float `x` becomes when it is stored in FP16. Use comparisons only, no conversion.


# %%
def fate(x):
    raise NotImplementedError


lessons.check("01.2", fate);

# %% [markdown]
# ## How many gradients are lost?
#
# Document 000 shows a picture from an NVIDIA blog post and concludes that close to half of the gradients become 0 in FP16. That was one model. We look at our own: a Transformer (the kind of network that language models are) with two layers, which predicts the next byte of a text that ships with the package. We compute its gradients in FP32 and look where they lie.
#
# Something else matters as much as the model. The loss is the *mean* over all tokens of a batch, so each token's part in it is divided by their number. Large batches have smaller gradients per activation. So we also look at the gradient of the **activations** in the middle of the model, for a batch of 512 tokens and for one of two million, as large models are trained with. For the large one we need not compute anything: the same 512 tokens would each count 4,096 times less.
#
# **Write down your guess:** What share of the weights' gradients will be 0 in FP16? And of the activations' gradients, in the small and in the large batch?

# %%
lessons.guess(
    "01.d",
    "which share of the gradients becomes 0: weights, activations in the small batch, in the large one?",
)
from handtuned.nn.transformer import Transformer

lines = resources.files("handtuned").joinpath("datasets", "home_train.jsonl").read_text(encoding="utf-8").splitlines()
text = "\n".join(message["content"] for line in lines for message in json.loads(line)["messages"][1:])
data = torch.tensor(list(text.encode()))


def batch(rows, length=64, seed=0):
    starts = torch.randint(len(data) - length, (rows, 1), generator=torch.Generator().manual_seed(seed))
    block = data[starts + torch.arange(length + 1)]
    return block[:, :-1], block[:, 1:]


def gradients(model, rows, device="cpu"):
    """Sizes of the gradients of all weights, and of the activations between the two layers."""
    inside = []

    def watch(module, args, out):
        out.register_hook(inside.append)

    hook = model.model.layers[0].register_forward_hook(watch)
    inputs, labels = (tensor.to(device) for tensor in batch(rows))
    loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
    weights = torch.autograd.grad(loss, list(model.parameters()))
    hook.remove()
    return torch.cat([g.flatten() for g in weights]).abs().cpu(), inside[0].flatten().abs().cpu()


torch.manual_seed(0)
model = Transformer(vocab_size=256, num_layers=2, d_model=64, num_heads=4, d_ff=128)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(60):
    inputs, labels = batch(16, seed=step)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
    optimizer.step()

weight_gradients, activations_512 = gradients(model, 8)
activations_2m = activations_512 * (512 / 2**21)


def lost(g):
    """Share of the gradients other than 0 that FP16 turns into 0."""
    g = g[g > 0]
    return (g.half() == 0).float().mean().item()


cases = {
    "weights, 512 tokens": weight_gradients,
    "activations, 512 tokens": activations_512,
    "activations, 2M tokens": activations_2m,
}
fig, axes = lessons.figure(7, 2.8, columns=3, sharey=True)
for ax, (name, g) in zip(axes, cases.items(), strict=True):
    powers = torch.log2(g[g > 0]).numpy()
    counts, edges = np.histogram(powers, bins=np.arange(-45, 1), density=True)
    below = edges[:-1] < -25
    ax.bar(edges[:-1], counts, width=1, align="edge", color=np.where(below, lessons.ACCENT, lessons.GREYS[2]))
    ax.axvline(-25, color=lessons.GREYS[0], linestyle="--", linewidth=1)
    ax.set_title(f"{name}\n{100 * lost(g):.1f} % lost")
    ax.set_xlabel("size of the gradient, power of 2")
    print(f"{name:24} {100 * lost(g):5.1f} % of the gradients become 0 in FP16")
axes[0].set_ylabel("share")
axes[0].text(-26, axes[0].get_ylim()[1], "underflow", ha="right", va="top", fontsize=8)
lessons.show(
    fig,
    alt="Three histograms of gradient sizes with the underflow line of fp16 at 2 to the power of -25. Hardly any weight "
    "gradient lies left of it, few activation gradients of a small batch do, and most of those of a batch of 2M tokens.",
)
lessons.measured("01.d", ", ".join(f"{100 * lost(g):.1f} %" for g in cases.values()))

# %%
shares = {name: lost(g) for name, g in cases.items()}
lessons.claim(
    3,
    "It depends on what is looked at: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    + ". There is no such constant as one half.",
    holds=min(shares.values()) < 0.1 and max(shares.values()) > 0.6,
)
if lessons.gpu():
    torch.manual_seed(0)
    larger = Transformer(vocab_size=256, num_layers=12, d_model=768, num_heads=12, d_ff=2048).cuda()
    of_weights, of_activations = gradients(larger, 64, "cuda")
    print(f"12 layers of width 768: weights {100 * lost(of_weights):.1f} %, activations {100 * lost(of_activations):.1f} %")
else:
    lessons.skipped("the same shares for a Transformer with 12 layers of width 768")

# %% [markdown]
# ## The notes' example
#
# Document 000 gives a worked example. One weight $w = 10^{-7}$, an input $x = 1$, a label $y = 1.03 \cdot 10^{-7}$, and the loss $L = (wx - y)^2/2$. The gradient is
#
# $$g = (wx - y)\,x .$$
#
# The notes calculate −3·10⁻⁸ and say that FP16 turns it into 0.
#
# **Write down your guess:** Do the subtraction yourself. Is it −3·10⁻⁸? And is −3·10⁻⁸ small enough to vanish?

# %%
lessons.guess("01.e", "what is the gradient, and does -3e-8 vanish in FP16?")
w, x, y = 1e-7, 1.0, 1.03e-7
true = (w * x - y) * x
printed = -3e-8
print(f"the gradient, in FP64:       {true:.3g}")
print(f"                in FP16:     {torch.tensor(true).half().item():.3g}")
print(f"the notes' -3e-8, in FP16:   {torch.tensor(printed).half().item():.3g}")
print(f"FP16 turns into 0 up to      {FP16.underflow_threshold:.3g}")
lessons.measured("01.e", f"{true:.3g}, and FP16 turns into 0 only what is up to {FP16.underflow_threshold:.3g}")

# %% [markdown]
# The notes have multiplied by $w$ where the formula says $x$, and have lost a "0." in between. The true gradient is ten times smaller than what they print. It does underflow. The number that they print would not.
#
# That is the first failure, a slip of the pen. The second is more interesting. In their example the forward pass runs in FP16 too. What are $w$ and $y$ then?

# %%
w16, x16, y16 = (torch.tensor(number).half() for number in (w, x, y))
residual = w16 * x16 - y16
print(f"w → {w16.item():.6g}    y → {y16.item():.6g}    w·x - y → {residual.item()}")
scales = [2.0**k for k in range(0, 16, 3)]
print("scaled gradients:", {int(scale): (residual * scale * x16).item() for scale in scales})

grid = np.arange(0, 4) * FP16.smallest_subnormal
fig, ax = lessons.figure(7, 1.9)
ax.plot(grid, np.zeros(4), "|", color=lessons.GREYS[0], markersize=18)
ax.axhline(0, color=lessons.GREYS[2], linewidth=0.8, zorder=0, linestyle="-")
for number in grid:
    ax.text(number, -0.62, f"{number:.2g}", ha="center", fontsize=8)
for number, name, side in ((w, "w", "right"), (y, "y", "left"), (-true, "|g| true", "left"), (-printed, "|g| in the notes", "left")):
    ax.plot(number, 0, "o", color=lessons.ACCENT, markersize=5)
    ax.text(number, 0.28, name, ha=side, fontsize=8, color=lessons.ACCENT)
ax.axvline(FP16.underflow_threshold, color=lessons.GREYS[1], linestyle=":")
ax.text(FP16.underflow_threshold, 0.82, " half-way: left of here → 0", fontsize=8, color=lessons.GREYS[1])
ax.set(ylim=(-0.9, 1.1), yticks=[], xlabel="the first four numbers of FP16, from zero")
ax.spines["left"].set_visible(False)
ax.set_xticks([])
lessons.show(
    fig,
    alt="Number line with the first four FP16 numbers: 0, 6e-8, 1.2e-7, 1.8e-7. w and y lie close together and are both "
    "nearest to 1.2e-7. The true gradient lies close to 0, the printed one just right of the half-way line.",
)

# %% [markdown]
# Both $w$ and $y$ round to the same number, because FP16 has nothing between 6·10⁻⁸ and 1.2·10⁻⁷. The residual is exactly 0, and 0 times any scale is 0. Loss scaling, which the notes introduce as the cure, cannot rescue their example. What it rescues are gradients that get lost on the way back, when the forward pass was fine.

# %%
lessons.claim(
    4,
    f"The true gradient is {true:.0e}, which underflows; the printed -3e-8 would become {torch.tensor(printed).half().item():.3g}. "
    f"In FP16 w and y are both {w16.item():.3g}, the residual is {residual.item():g}, and no scale brings it back.",
    holds=abs(true + 3e-9) < 1e-15
    and torch.tensor(true).half() == 0
    and torch.tensor(printed).half() != 0
    and w16 == y16
    and all((residual * scale * x16).item() == 0 for scale in scales),
)

# %% [markdown]
# ## Exercise 01.3: a gradient that scaling rescues
#
# Find the example that the notes wanted. Write `example()`, which returns `(w, x, y, scale)` such that, with every number in FP16,
#
# * the gradient $(wx - y)\,x$ is 0 without scaling,
# * and with the residual multiplied by `scale` before it meets $x$, and divided by `scale` in FP64 afterwards, it is right to 1 %.


# %%
def example():
    raise NotImplementedError


lessons.check("01.3", example);

# %% [markdown]
# ## Master weights, and what they do not repair
#
# Documents 000 and 002 describe the idea in the same order. First: keep the weights in FP32, compute in FP16, and update the FP32 weights. Then the flaw: a gradient that has underflowed is 0 before it reaches the master weights. Then the cure: multiply the loss by a large scale $S$. By the chain rule every gradient is multiplied by $S$. Convert to FP32, divide by $S$, and update.
#
# We watch all three on a regression with 64 weights, whose inputs are so small that gradients lie around 2·10⁻⁹.
#
# **Write down your guess:** Which of the three curves falls?

# %%
lessons.guess("01.f", "which of the three curves falls?")
torch.manual_seed(1)
inputs = torch.randn(256, 64) * 2.0**-14
goal = torch.randn(64)
labels = inputs @ goal
print(f"size of the first gradient: {(inputs.t() @ labels / len(inputs)).abs().mean().item():.1e}")


def regress(weights_in_fp16, scale, steps=200, rate=2.0**26):
    w = torch.zeros(64)
    errors = []
    for _ in range(steps):
        used = w.half()
        residual = inputs.half() @ used - labels.half()  # forward in FP16
        upstream = residual * torch.tensor(scale / len(inputs)).half()  # backward in FP16, scaled
        g = inputs.half().t() @ upstream
        w = w - rate * g.float() / scale
        if weights_in_fp16:
            w = w.half().float()
        errors.append(((w - goal).norm() / goal.norm()).item())
    return errors


curves = {
    "FP16 weights": regress(True, 1.0),
    "FP32 masters": regress(False, 1.0),
    "FP32 masters, loss × 1024": regress(False, 1024.0),
}
fig, ax = lessons.figure(7, 2.6)
for (name, errors), style, color in zip(curves.items(), lessons.LINES, lessons.COLORS, strict=False):
    ax.plot(errors, style, color=color, label=name)
ax.set(xlabel="step", ylabel="distance to the\ntrue weights", ylim=(0, 1.2))
ax.legend(loc="center right")
lessons.show(
    fig,
    alt="Distance to the true weights over 200 steps. Without scaling both curves stay at their start, "
    "with FP32 master weights or without. With the loss scaled by 1024 the distance falls to nearly 0.",
)
print({name: round(errors[-1], 3) for name, errors in curves.items()})
lessons.measured("01.f", ", ".join(name for name, errors in curves.items() if errors[-1] < 0.5))

# %% [markdown]
# So master weights alone do not help when the gradients are gone; scaling does.
#
# Document 002 explains scaling as "borrowing" bits of precision to widen the range. Does a scaled number have fewer digits? A scale that is a power of two only adds to the exponent. The mantissa stays as it is. What does trade digits for range is BF16.

# %%
normal = torch.logspace(-4, -1, 4000, dtype=torch.float64)  # normal numbers of FP16, before and after scaling
plain = ((normal.half().double() - normal) / normal).abs().max().item()
scaled = (((normal * 1024).half().double() / 1024 - normal) / normal).abs().max().item()
in_bf16 = ((normal.bfloat16().double() - normal) / normal).abs().max().item()
print(f"largest relative error: FP16 {plain:.2e}, FP16 scaled by 1024 {scaled:.2e}, BF16 {in_bf16:.2e}")

final = {name: errors[-1] for name, errors in curves.items()}
lessons.claim(
    5,
    f"With master weights alone the distance to the solution stays at {final['FP32 masters']:.2f}; with the loss scaled by 1024 "
    f"it falls to {final['FP32 masters, loss × 1024']:.2f}. But nothing is borrowed: the relative error of FP16 is {plain:.1e} unscaled and "
    f"{scaled:.1e} scaled. BF16 is the format that pays in digits ({in_bf16:.1e}).",
    holds=final["FP32 masters"] > 0.9 and final["FP32 masters, loss × 1024"] < 0.3 and plain == scaled and in_bf16 > 4 * plain,
)

# %% [markdown]
# ## BF16: the other way to spend 16 bits
#
# BF16 has the exponent of FP32, so whatever is a normal number in FP32 does not underflow in it. No scaling is needed. In exchange it has 7 mantissa bits. Document 002 reports that it "reaches the same accuracy".
#
# **Write down your guess:** Start at 1 in BF16 and add 0.001 a thousand times. What do you get?

# %%
lessons.guess("01.g", "start at 1 in BF16, add 0.001 a thousand times: what comes out?")
tiny = torch.tensor(true).bfloat16()
total = torch.tensor(1.0).bfloat16()
for _ in range(1000):
    total = total + torch.tensor(1e-3).bfloat16()
print(f"the gradient of the notes' example in BF16: {tiny.item():.3g} (FP16 gave 0)")
print(f"1 + 1000 × 0.001 = {total.item()} in BF16; the neighbour above 1 is {1 + BF16.spacing(1.0)}")
lessons.measured("01.g", str(total.item()))

# %% [markdown]
# The sum never leaves 1, because 0.001 is less than half the distance to the next number. Weights that live in BF16 have the same fate as the FP16 weights of claim 1, at updates eight times larger. With FP32 weights, and BF16 for the products only, the story is different. The repository holds a longer experiment, in which one model is trained in several ways (`benchmarks/precision_curves.py` runs it; it takes ten minutes). Its stored results:

# %%
stored = json.loads(Path("..", "benchmarks", "precision_curves.json").read_text(encoding="utf-8"))
final_losses = {name: [run["final"] for run in runs] for name, runs in stored["runs"].items()}
print("on", stored["machine"])
for name, losses in final_losses.items():
    print(f"{name:50}", ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in losses))
print("FP16 without scaling keeps up here because this model's gradients are large enough for FP16; with the small ones of a batch of\n"
      "2M tokens it does not. And what diverges is FP16 *weights*, with updates too small for them, whatever the gradients.")
spread = max(final_losses["fp32"]) - min(final_losses["fp32"])
difference = abs(final_losses["bf16"][0] - final_losses["fp32"][0])
lessons.claim(
    7,
    f"Range: {BF16.max:.3g} at most, like FP32, and the gradient that FP16 lost stays {tiny.item():.2g}, so no scaling. With FP32 weights and BF16 "
    f"products the final loss differs from FP32's by {difference:.4f}, where other seeds differ by {spread:.2f}. But with BF16 itself "
    f"1 + 1000 × 0.001 stays {total.item()}: the accuracy is the masters'. A V100 (NVIDIA's compute capability 7.0) has no BF16; Ampere (8.0) was the first to.",
    holds=BF16.exponent_bits == FP32.exponent_bits and tiny != 0 and difference < spread and total == 1,
)

# %% [markdown]
# ## What to remember
#
# * Exponent bits buy range, mantissa bits buy digits. FP16: 65504 down to 6·10⁻⁸, three digits. BF16: the range of FP32, two digits.
# * Underflow gives 0, and only below half of the smallest number. Overflow gives infinity; NaN comes from computing with infinities.
# * Rounding once is harmless. Adding small updates to a 16-bit weight is not: keep master weights in FP32.
# * A scale rescues gradients that underflow on the way back. It cannot rescue a difference that was 0 already.
#
# Lesson 03 turns the scale into a training loop. First, a tool: the language in which GPU programs are written.
#
# On a real model: `handtuned finetune --method full --dtype bfloat16` computes in BF16 from FP32 masters; `handtuned doctor` says which formats your machine computes in.
#
# Next: [02. How do I write a kernel?](02_writing_a_kernel.ipynb)
