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
# # 07. Why is a low-rank update enough?
#
# Fine-tuning turns a weight matrix W into W + ΔW. Training ΔW in full costs 16 bytes for each of its numbers
# (lesson [04](04_where_memory_goes.ipynb)). LoRA, low-rank adaptation, writes ΔW as a product of two thin matrices
# and trains only those. This lesson asks when that can work, builds the layer number by number, and tests fourteen
# sentences of the study documents.
#
# You need: a little torch, the words *gradient* and *optimizer*, and for section 7 what a Triton program is
# (lesson [02](02_writing_a_kernel.ipynb)). There you write LoRA's kernels yourself, forward and backward.
#
# The documents: 000 (CS224N lecture 12), 001 (efficient training), 003 (QLoRA diary), 004 (LoRA lesson).
#
# Terms: rank 秩, low rank 低秩, LoRA 低秩适应, frozen weight 冻结权重, update ΔW 增量矩阵, singular value decomposition 奇异值分解, scaling factor 缩放因子, initialization 初始化, dropout 随机失活, gate 门控

# %%
import copy
import math
import os

import numpy as np
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"  # a kernel can be interpreted on the CPU …
    os.environ["HANDTUNED_BACKEND"] = "torch"  # … but only where a cell asks for it: references are much faster

import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import handtuned
from handtuned import lessons
from handtuned.kernels import lora, lora_gemms
from handtuned.kernels.runtime import tl, triton  # Triton, or stand-ins where it cannot be installed
from handtuned.lessons import ACCENT, GREYS, bars, claim, figure, gpu, show, skipped, source, who_reads
from handtuned.lessons.house import HOUSE_A, House, accuracy, fit
from handtuned.nn import LoRALinear, apply_lora_to_model, lora_parameters
from handtuned.nn.transformer import SwiGLU
from handtuned.optim import AdamW
from handtuned.memory.model_shapes import shape_of

np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## 1. Rank, and the best matrix of rank r
#
# A column times a row gives a matrix. Every row of it is a multiple of one row, every column a multiple of one
# column. Such a matrix has **rank** 1. The rank of any matrix is the smallest r for which it is a product of an
# (m × r) and an (r × n) matrix. With small r the two factors hold far fewer numbers than the product.
#
# The singular value decomposition writes any (m × n) matrix as U Σ Vᵀ. The columns of U and of V are orthonormal: of length 1, and at right angles.
# Σ is zero but for the **singular values** σ₁ ≥ σ₂ ≥ … ≥ 0 on its diagonal. Cut it after r values and you have the
# matrix of rank r that is nearest to the original, in the sense of summed squares (Eckart and Young, 1936). What is
# lost is known in advance: the error is √(σ²ᵣ₊₁ + σ²ᵣ₊₂ + …).
#
# **Write down your guess.** For a 5 × 3 matrix, what shapes do U and V have? 000 says that U is n × n and V is m × n.

# %%
lessons.guess("07.a", "for a 5 × 3 matrix, what shapes have U and V?")
B = np.array([[1.0], [3.0]])  # (2, 1)
A = np.array([[2.0, -1.0]])  # (1, 2)
print(B @ A, "rank", np.linalg.matrix_rank(B @ A))

m = n = 4096
r = 8
print(f"{m} × {n}: {m * n:,} numbers; as ({m} × {r}) · ({r} × {n}): {r * (m + n):,}")

rng = np.random.default_rng(0)
M = rng.normal(size=(5, 3))
U, sigma, Vt = np.linalg.svd(M)  # numpy returns Vᵀ
Sigma = np.zeros(M.shape)
np.fill_diagonal(Sigma, sigma)

r = 2
cut = U[:, :r] @ np.diag(sigma[:r]) @ Vt[:r]
lost = np.linalg.norm(M - cut)
print("singular values", sigma)
print(f"rank {r}: error {lost:.6f}, predicted from the values cut off {np.sqrt((sigma[r:] ** 2).sum()):.6f}")

try:
    np.ones((3, 3)) @ Sigma @ np.ones((5, 3)).T  # U as n × n, V as m × n, as 000 has them
    notes_multiply = True
except ValueError as error:
    notes_multiply = False
    print("with the shapes of 000:", error)

rebuilt = np.abs(U @ Sigma @ Vt - M).max()
lessons.measured("07.a", f"{U.shape[0]} × {U.shape[1]} and {Vt.shape[1]} × {Vt.shape[0]}")
claim(
    16,
    f"M is 5 × 3; U is {U.shape[0]} × {U.shape[1]}, V is {Vt.shape[0]} × {Vt.shape[1]}, and U Σ Vᵀ gives M back to "
    f"{rebuilt:.0e}. With U as 3 × 3 and V as 5 × 3 the product is not even defined.",
    U.shape == (5, 5) and Vt.shape == (3, 3) and rebuilt < 1e-12 and not notes_multiply,
)

# %% [markdown]
# ## Exercise 07.1: the best matrix of rank r
#
# Write `best_rank_r(M, r)`: return (B, A), of shapes (m, r) and (r, n), such that BA is the best
# approximation of M of rank r. Wide and tall matrices must both work.

# %%
def best_rank_r(M, r):
    raise NotImplementedError  # U, sigma, Vt = np.linalg.svd(M, full_matrices=False) …


lessons.check("07.1", best_rank_r);

# %% [markdown]
# ## 2. What does training do to a weight?
#
# A model is needed. Ours reads a household request and answers with a small JSON command; the 900 rows come with
# the package. It is a Llama in miniature: two layers of width 64, one token per word. First it learns the commands
# as they are: that is our *pretrained* model. Then the house changes its language (`light` becomes `lamp`, `room`
# becomes `place`, …) and the model is fine-tuned, in full, on the new words. The loss looks at the answer only: a
# label of −100 is not counted. How well a model does is the share of held-out answer tokens that it predicts right.
# All of it is one short file, `notebooks/lessons/house.py`; two pieces of it:

# %%
source(House.encode)
source(fit, first="for _ in range(steps)", last="optimizer.step()")

torch.manual_seed(7)
house = House({"old": None, "new": HOUSE_A})
(old_house, new_house), (old_test, new_test) = house.training.values(), house.testing.values()
base = house.new_model()
fit(base, old_house, 200, 3e-3)
full = copy.deepcopy(base)
fit(full, new_house, 100, 1e-3)
print(f"held-out tokens right, old house → new house: pretrained {accuracy(base, old_test):.1%} → "
      f"{accuracy(base, new_test):.1%}; fine-tuned on the new house: {accuracy(full, new_test):.1%}")  # fmt: skip

# %% [markdown]
# **Write down your guess.** Which is closer to low rank: the weight W that pretraining left, or the change ΔW that
# fine-tuning made? 000 writes "W = BA". If you cut W to rank 8 (of 64), how well does the model still answer? And
# if you cut ΔW to rank 8 and leave W alone?

# %%
lessons.guess("07.b", "cut to rank 8, how many tokens are right: with W cut, with ΔW cut?")
linears = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
before, after = base.state_dict(), full.state_dict()


def cut_to_rank(matrix, r):
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vt[:r]


def with_cut(r, what):
    """The fine-tuned model with W or ΔW of every inner linear layer cut to rank r; embeddings and head stay whole."""
    state = dict(after)
    for name in linears:
        key = f"{name}.weight"
        W, delta = before[key], after[key] - before[key]
        state[key] = cut_to_rank(W, r) + delta if what == "W" else W + cut_to_rank(delta, r)
    model = house.new_model()
    model.load_state_dict(state)
    return model


ranks = (1, 2, 4, 8, 16, 32, 64)
cut_W = [accuracy(with_cut(r, "W"), new_test) for r in ranks]
cut_delta = [accuracy(with_cut(r, "ΔW"), new_test) for r in ranks]
for r, w, d in zip(ranks, cut_W, cut_delta, strict=True):
    print(f"rank {r:2}: W cut {w:6.1%}   ΔW cut {d:6.1%}")


def energy(matrix):
    """Share of the summed squares in the first r singular values, for every r."""
    s = torch.linalg.svdvals(matrix) ** 2
    return (s.cumsum(0) / s.sum()).tolist()


squares = [name for name in linears if "self_attn" in name]
mean = lambda curves: [sum(at) / len(at) for at in zip(*curves, strict=True)]  # noqa: E731
energy_W = mean([energy(before[f"{name}.weight"]) for name in squares])
energy_delta = mean([energy(after[f"{name}.weight"] - before[f"{name}.weight"]) for name in squares])

fig, (left, right) = figure(7.5, 3, columns=2)
left.plot(range(1, 65), energy_W, color=GREYS[1], linestyle="--", label="W, pretrained")
left.plot(range(1, 65), energy_delta, color=ACCENT, linestyle="-", label="ΔW, fine-tuning")
left.set(xlabel="singular values kept", ylabel="share of summed squares", ylim=(0, 1.03))
left.legend()
right.plot(ranks, cut_W, color=GREYS[1], linestyle="--", marker="s", label="W cut to rank r")
right.plot(ranks, cut_delta, color=ACCENT, linestyle="-", marker="o", label="ΔW cut to rank r")
right.axhline(accuracy(base, new_test), color=GREYS[1], linewidth=0.8, linestyle=":")
right.text(1, accuracy(base, new_test) - 0.02, "no fine-tuning", va="top", color=GREYS[1])
right.set(xlabel="r", ylabel="held-out tokens right", xscale="log", ylim=(0, 1.03))
right.set_xticks(ranks, ranks)
right.minorticks_off()
right.legend(loc="lower right")
show(fig, alt="Left: share of the summed squares held by the first singular values; the curve of the update lies well "
     "above that of the weight. Right: accuracy after cutting to rank r; the update survives at rank 4, the weight "
     "does not.")  # fmt: skip

at8 = ranks.index(8)
lessons.measured("07.b", f"{cut_W[at8]:.1%} and {cut_delta[at8]:.1%}, uncut {cut_W[-1]:.1%}")
claim(
    13,
    f"000 first says it right: what has low rank is the increment, 增量矩阵. Its formula then has W = BA. "
    f"Held-out tokens right: {cut_W[-1]:.1%} uncut; with every W cut to rank 8 {cut_W[at8]:.1%}, with every ΔW cut to "
    f"rank 8 {cut_delta[at8]:.1%}. The product BA stands for ΔW; the weight stays as it is. Nor is it like Q, K and "
    "V, which are three maps of the same input side by side; A and B are one map in two steps.",
    cut_delta[at8] > cut_delta[-1] - 0.02 and cut_W[at8] < cut_W[-1] - 0.05,
)

# %% [markdown]
# Two things to read off. ΔW is *not* of rank 8: the left curve has a long tail. But the tail hardly matters for the
# answers: the part that does the work is in the first few directions. The weight itself has no such luxury.
#
# ## 3. The layer, on four numbers
#
# So freeze W and learn BA directly, instead of learning ΔW and cutting it afterwards:
#
# $$y = W x + s\, B (A x), \qquad A \in \mathbb{R}^{r \times in},\; B \in \mathbb{R}^{out \times r},\; s = \alpha / r$$
#
# First A takes x down to r numbers, then B takes them up to the output. Here W is 2 × 2 and r is 1.

# %%
from handtuned.lessons import drawings

drawings.lora_path()

# %%
W = np.array([[1.0, 2.0], [3.0, 4.0]])
A = np.array([[0.5, -0.5]])
B = np.array([[2.0], [-1.0]])
x = np.array([1.0, 3.0])
s = 2.0

down = A @ x  # r numbers
print("Ax =", down, "  s B(Ax) =", s * (B @ down), "  y =", W @ x + s * (B @ down))
print("the same with ΔW written out:", (W + s * B @ A) @ x)

# In torch, rows of x lie one after the other, so every product appears transposed. The library's specification:
source(lora.lora_linear_reference)
as_torch = [torch.tensor(v)[None] if v.ndim == 1 else torch.tensor(v) for v in (x, W, A, B)]
print("reference:", lora.lora_linear_reference(as_torch[0], as_torch[1], None, as_torch[2], as_torch[3], s))

# %% [markdown]
# The documents do not agree on which of A and B is which shape. **Write down your guess** for a layer from 5
# features to 3 with r = 2, then look at the library's layer. In the files of PEFT, the most used adapter library,
# `lora_A` is (r, in) as well.

# %%
lessons.guess("07.c", "from 5 features to 3 with r = 2, which shapes have A and B?")
torch.manual_seed(0)
layer = LoRALinear(nn.Linear(5, 3), rank=2, lora_alpha=4)
print(layer)

d, k = 5, 3  # 004: "W is d × k, d the input dimension, k the output", "B is d × r, A is r × k", "h = W x"
try:
    torch.randn(d, 2) @ torch.randn(2, k) @ torch.randn(d)
    text_of_004 = True
except RuntimeError as error:
    text_of_004 = False
    print("004's shapes with its own formula h = (W + BA) x:", error)
lessons.measured("07.c", f"{tuple(layer.lora_A.shape)} and {tuple(layer.lora_B.shape)}")
claim(
    15,
    f"lora_A is {tuple(layer.lora_A.shape)}, (r, in), and lora_B is {tuple(layer.lora_B.shape)}, (out, r), as 000, 001 "
    "and 003 have it. 004 swaps the two; with its shapes (BA)x is not defined.",
    tuple(layer.lora_A.shape) == (2, 5) and tuple(layer.lora_B.shape) == (3, 2) and not text_of_004,
)

# %% [markdown]
# ## 4. What is alpha for?
#
# Four answers stand in the documents: multiply by alpha (000's formula), by nothing (003), by an alpha that is
# never defined (004), by alpha / r (the code of 000 and 001). Does the r under it do anything?
#
# Think of the first step of Adam from B = 0. Adam moves every number of B by about the learning rate, whatever its
# gradient's size, in the direction that lowers the loss. The output then changes by s · lr · Σⱼ |(Ax)ⱼ|: a sum of r
# terms that all pull the same way. **Write down your guess**: how does the change grow from r = 4 to r = 64?

# %%
lessons.guess(
    "07.d",
    "from r = 4 to r = 64, how much does the change grow with a factor alpha, with none, with alpha / r?",
)
def first_move(r, scale):
    """How far one Adam step moves the output, with ΔW = scale · BA; the mean of 16 draws of A and x."""
    moves = []
    for seed in range(16):
        torch.manual_seed(seed)
        layer = LoRALinear(nn.Linear(256, 256, bias=False), rank=r)
        layer.scaling = scale
        x, target = torch.randn(1, 256), torch.randn(1, 256)
        before = layer(x)
        optimizer = AdamW([layer.lora_B], lr=1e-3, weight_decay=0.0)
        F.mse_loss(before, target).backward()
        optimizer.step()
        moves.append((layer(x) - before).abs().mean().item())
    return float(np.mean(moves))


alpha = 16
for r in (4, 16, 64):
    print(f"r = {r:2}: × alpha moves {first_move(r, alpha):.4f}   × 1 {first_move(r, 1):.4f}   "
          f"× alpha/r {first_move(r, alpha / r):.4f}")  # fmt: skip
growth = {name: first_move(64, of(64)) / first_move(4, of(4)) for name, of in
          (("alpha", lambda r: alpha), ("none", lambda r: 1), ("alpha/r", lambda r: alpha / r))}  # fmt: skip
lessons.measured(
    "07.d",
    ", ".join(f"{value:.1f} ×" for value in (growth["alpha"], growth["none"], growth["alpha/r"])),
)
claim(
    14,
    f"from r = 4 to r = 64 the first step grows {growth['alpha']:.1f} × with a factor alpha, {growth['none']:.1f} × "
    f"with none, {growth['alpha/r']:.2f} × with alpha / r. Dividing by r keeps the learning rate good for every rank.",
    growth["alpha"] > 8 and growth["none"] > 8 and 0.5 < growth["alpha/r"] < 2,
)

# %% [markdown]
# (For long training with large r the best factor is a matter of debate; `handtuned.nn.variants.use_rslora` has
# alpha / √r. What the files mean is alpha / r.)
#
# ## 5. Where to start
#
# Start at ΔW = 0, so that the first forward pass is the pretrained model's. B = 0 does that, and so would A = 0. The other
# one is drawn at random. The usual way is *Kaiming initialization* (He et al. 2015), which sets the spread of a weight by
# its number of inputs, the *fan-in*, so that outputs are about as large as inputs. torch takes the second dimension for it.
#
# With y = s B (A x) and dy the gradient that arrives, dB = s dy (Ax)ᵀ and dA = s Bᵀ dy xᵀ.
#
# **Write down your guess**: at the very first step, which of dA and dB is zero? What if both matrices start at zero?

# %%
lessons.guess("07.e", "at the first step, is dA or dB zero? And if both matrices start at zero?")
torch.manual_seed(0)
x, target = torch.randn(32, 64), torch.randn(32, 64)
layer = LoRALinear(nn.Linear(64, 64), rank=4)
same = torch.equal(layer(x), layer.base_layer(x))
F.mse_loss(layer(x), target).backward()
first = layer.lora_A.grad.norm().item(), layer.lora_B.grad.norm().item()

dead = LoRALinear(nn.Linear(64, 64), rank=4)
nn.init.zeros_(dead.lora_A)
optimizer = AdamW([dead.lora_A, dead.lora_B], lr=1e-2, weight_decay=0.0)
for _ in range(10):
    optimizer.zero_grad()
    F.mse_loss(dead(x), target).backward()
    optimizer.step()
moved = dead.delta_weight().abs().max().item()
lessons.measured("07.e", f"|dA| = {first[0]:g}, |dB| = {first[1]:.3f}; then ΔW stays {moved:g}")
claim(
    17,
    f"B = 0: the output equals the base layer's bit for bit ({same}); |dA| = {first[0]}, |dB| = {first[1]:.4f}. "
    f"Both zero: after 10 steps ΔW is still {moved}. The paper draws A from a Gaussian, its code from Kaiming-uniform; "
    "both work, because only B = 0 matters for the start.",
    same and first[0] == 0 and first[1] > 0 and moved == 0,
)

# %% [markdown]
# How large should A be? The code that came with the paper, PEFT, 001 and this library use
# `kaiming_uniform_(A, a=√5)`. `a` is meant as the slope of a leaky ReLU, a function that
# is z above zero and a·z below; √5 in it gives the bound √(6 / (1 + 5) / in) =
# 1/√in, that is a standard deviation of 1/√(3·in). 000 calls `kaiming_normal_(A, a=0.001)`, apparently meaning a
# small A. 004 calls the usual function on a matrix stored as (in, r), so that torch takes r for the number of
# inputs. **Write down your guess** of how much larger their A is, at in = 768 and r = 8.

# %%
lessons.guess("07.f", "how many times larger are the A of 000 and of 004?")
torch.manual_seed(0)
inputs, r = 768, 8
usual = nn.init.kaiming_uniform_(torch.empty(r, inputs), a=math.sqrt(5))
of_000 = nn.init.kaiming_normal_(torch.empty(r, inputs), a=0.001)
of_004 = nn.init.kaiming_uniform_(torch.empty(inputs, r), a=math.sqrt(5))

fig, ax = figure(7, 2.6)
edges = np.linspace(-0.37, 0.37, 149)
ax.hist(of_004.flatten().numpy(), edges, histtype="step", density=True, color=GREYS[0], linestyle="-", label="004: (in, r)")
ax.hist(of_000.flatten().numpy(), edges, histtype="stepfilled", density=True, color=GREYS[3], label="000: kaiming_normal_")
ax.hist(usual.flatten().numpy(), edges, histtype="step", density=True, color=ACCENT, linestyle="-", label="usual")
ax.set(xlabel="value of an element of A (768 inputs, rank 8)", ylabel="density")
ax.legend()
show(fig, alt="Three histograms of A's initial values: the usual one within ±0.036, that of 000 a bell 2.4 times as "
     "wide, that of 004 flat out to ±0.35.")  # fmt: skip

ratio_000, ratio_004 = (of_000.std() / usual.std()).item(), (of_004.std() / usual.std()).item()
lessons.measured("07.f", f"{ratio_000:.2f} × and {ratio_004:.2f} ×")
claim(
    18,
    f"`a` is a leaky ReLU's slope, not a size: 000's A has standard deviation {of_000.std():.4f} "
    f"(√(2/in) = {math.sqrt(2 / inputs):.4f}), {ratio_000:.2f} × the usual one (√6 = {math.sqrt(6):.2f}).",
    abs(ratio_000 - math.sqrt(6)) < 0.1 and abs(of_000.std().item() - math.sqrt(2 / inputs)) < 0.002,
)
claim(
    19,
    f"on (in, r) torch takes r = 8 for the fan-in: 004's A is {ratio_004:.2f} × the usual one "
    f"(√(768/8) = {math.sqrt(768 / 8):.2f}).",
    abs(ratio_004 - math.sqrt(768 / 8)) < 0.3,
)

# %% [markdown]
# ## 6. The layer in code
#
# 000 prints a whole class. Here it is, shortened to the lines that matter. Three repairs are needed before it makes
# a layer; each is a habit worth having. **Find them before you run the cell.**

# %%
class LayerOf000(nn.Module):
    def __init__(self, base_layer, r, alpha, fixes=()):
        if "super" in fixes:
            super().__init__()
        if "store" in fixes:
            self.base_layer = base_layer
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.lora_A = nn.Parameter(torch.zeros(r, base_layer.in_features))
        self.scaling = alpha / r
        self.base_layer.weight.requires_grad = False
        self.base_layer.bias.requires_grad = False


failures = []
for fixes, linear in (
    ((), nn.Linear(4, 4)),
    (("super",), nn.Linear(4, 4)),
    (("super", "store"), nn.Linear(4, 4, bias=False)),
):
    try:
        LayerOf000(linear, 2, 4, fixes)
    except AttributeError as error:
        failures.append(str(error))
        print("with", fixes or "nothing repaired", "→", error)
LayerOf000(nn.Linear(4, 4), 2, 4, ("super", "store"))  # now it stands
claim(
    20,
    f"{len(failures)} failures in turn: parameters before `super().__init__()`, a `base_layer` that was never stored, "
    "and `bias.requires_grad` on a layer without bias (as in every Llama).",
    len(failures) == 3,
)

# %% [markdown]
# ### Where does dropout go?
#
# Dropout zeroes elements at random in training and multiplies the rest by 1/(1 − p). 000 applies it to the sum of
# base and LoRA output, 003 says after BA, 001 drops the *input* of A. What should hold? The frozen model was there
# before us: its path should not be disturbed. And the update should stay what it is, a vector in the r directions
# that B spans.
#
# **Write down your guess**: with p = 0.1 and B still zero, how far is each layer's output from the base model's?

# %%
lessons.guess("07.g", "how far is the output from the base model's, with dropout on the sum, behind BA, on the input?")
torch.manual_seed(1)
p, r, s = 0.1, 4, 2.0
x, W = torch.randn(4096, 64), torch.randn(64, 64) / 8
A, trained_B = torch.randn(r, 64) / 8, torch.randn(64, r) / 8
drop = nn.Dropout(p)
placements = {
    "000: on the sum": lambda x, B: drop(x @ W.t() + s * (x @ A.t()) @ B.t()),
    "003: after BA": lambda x, B: x @ W.t() + drop(s * (x @ A.t()) @ B.t()),
    "001: on A's input": lambda x, B: x @ W.t() + s * (drop(x) @ A.t()) @ B.t(),
}
span = torch.linalg.qr(trained_B).Q  # (64, r), an orthonormal basis of what B can reach
noise_at_start, leaves_span = {}, {}
for name, forward in placements.items():
    start = x @ W.t()
    noise_at_start[name] = ((forward(x, torch.zeros(64, r)) - start).norm() / start.norm()).item()
    noise = forward(x, trained_B) - (start + s * (x @ A.t()) @ trained_B.t())
    leaves_span[name] = (1 - (noise @ span).norm() ** 2 / noise.norm() ** 2).clamp(min=0).item()

fig, (left, right) = figure(7.5, 2.4, columns=2)
names = list(placements)
for ax, values, title in ((left, noise_at_start, "noise on the pretrained model, B = 0"),
                          (right, leaves_span, "noise outside what B can reach")):  # fmt: skip
    bars(ax, names, [100 * values[name] for name in names], "%", accent=2, form="{:.1f}")
    ax.set_title(title)
right.set_yticks([])
show(fig, alt="Bars for three places of dropout. On the sum the pretrained model's output is off by a third at the "
     "start; after BA nearly all noise leaves the span of B; on the input of A both figures are zero.")  # fmt: skip

library = LoRALinear(nn.Linear(64, 64), rank=4, lora_dropout=p).train()
lessons.measured("07.g", ", ".join(f"{noise_at_start[name]:.1%}" for name in (names[0], names[1], names[2])))
claim(
    21,
    f"before any training, dropout on the sum disturbs the pretrained output by {noise_at_start[names[0]]:.1%} "
    f"(√(p/(1−p)) = {math.sqrt(p / (1 - p)):.1%}), the other two by 0. After BA, {leaves_span[names[1]]:.1%} of the "
    f"noise leaves the r directions of the update; on A's input {leaves_span[names[2]]:.1%}. The input is the place: "
    "001 is right.",
    abs(noise_at_start[names[0]] - math.sqrt(p / (1 - p))) < 0.02
    and noise_at_start[names[2]] == 0
    and leaves_span[names[1]] > 0.5
    and leaves_span[names[2]] < 1e-6
    and torch.equal(library(x), library.base_layer(x)),
)

# %% [markdown]
# ## Exercise 07.2: LoRA's forward pass
#
# Write `lora_forward(x, W, bias, A, B, alpha)` for x of shape (…, in) and a bias that may be None.
# The checker counts your multiplications: the next section says why.

# %%
def lora_forward(x, W, bias, A, B, alpha):
    raise NotImplementedError  # y = x Wᵀ + bias + (alpha / r) …


lessons.check("07.2", lora_forward);

# %% [markdown]
# ## 7. What it costs, and the kernel
#
# 000's code computes x (BA)ᵀ, 004's x (W_A W_B). The value is right. **Write down your guess** of the price, for 2,048
# tokens through a 4,096 × 4,096 layer at r = 8. (A product of (m × k) and (k × n) is 2·m·k·n FLOPs.)

# %%
lessons.guess("07.h", "how many times the FLOPs does x (BA)ᵀ take?")
# Tensors on the "meta" device have shapes but no numbers: enough to count.
x, A, B = (torch.empty(*size, device="meta") for size in ((2048, 4096), (8, 4096), (4096, 8)))


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


product_first, two_steps = flops(lambda: x @ (B @ A).t()), flops(lambda: (x @ A.t()) @ B.t())
lessons.measured("07.h", f"{product_first / two_steps:.0f} ×")
claim(
    22,
    f"x (BA)ᵀ takes {product_first / 1e9:.1f} GFLOP, (x Aᵀ) Bᵀ {two_steps / 1e9:.2f}: {product_first / two_steps:.0f} × "
    "as many for the same numbers. It also makes the full ΔW, which LoRA exists to avoid.",
    round(product_first / 1e9, 1) == 69.0 and round(product_first / two_steps) == 257,
)

# %% [markdown]
# FLOPs are not all. Written as separate layers, the low-rank term, its scaling and the sum are three arrays as large
# as y, each written to memory and read again. The library has two kernels forward: one makes S = x Aᵀ, the other
# starts the accumulators of x Wᵀ at s S Bᵀ, so that only y is written.
#
# Take the first. **Math**: Sᵢⱼ = Σₖ xᵢₖ Aⱼₖ. **On four numbers**: a program holds a tile of S and walks along k,
# two at a time here.
#
# **In torch** it is one product. **In Triton** that loop comes back; masks cover tiles that hang over an edge, and dropout happens in registers on the tile just loaded.
#
# Every element of x is read by one program. If the rows of x made too few programs to keep a GPU busy, K is split
# between several: 2 parts in the picture, `splits` in the line below it. Each writes a part of S in fp32; a sum follows.
# `handtuned xray lora_down --arch sm_90` counts what the compiled tiles load, store and multiply, without a GPU.

# %%
x4, A4 = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.0, 0.0, -1.0, 2.0]])
acc = np.zeros((1, 1))
for k in range(0, 4, 2):
    acc += x4[:, k : k + 2] @ A4[:, k : k + 2].T
    print(f"after k = {k}, {k + 1}: S =", acc)
print("at once: ", x4 @ A4.T)

source(lora_gemms.lora_down_reference)
source(lora_gemms._down_kernel, first="pid_m, split")

fig, (x_axis, a_axis, s_axis) = figure(7.5, 2.2, columns=3, width_ratios=(8, 8, 3))
who_reads(x_axis, [[2 * m + k // 4 for k in range(8)] for m in range(4)], "x (M, K) in tiles: read by program")
who_reads(a_axis, [[k // 4 for k in range(8)]], "A (r, K): read by every program of half 0 or 1")
who_reads(s_axis, [[2 * m, 2 * m + 1] for m in range(4)], "S: written by")
show(fig, alt="x as 4 × 8 tiles: each of 8 programs reads half a row of tiles. A as 8 tiles: half 0 is read by the even "
     "programs, half 1 by the odd ones. S as 4 × 2 tiles: each program writes its own part.")  # fmt: skip
print("for 2,048 × 4,096 and r = 8:", lora_gemms.down_blocks(2048, 4096, 8))

forced = os.environ.pop("HANDTUNED_BACKEND", None)  # from here the real kernel runs, interpreted on a CPU
torch.manual_seed(0)
place = "cuda" if gpu() else "cpu"
x, A = torch.randn(70, 100, device=place), torch.randn(5, 100, device=place)
S = lora_gemms.lora_down(x, A)
error = (S.double() - x.double() @ A.double().t()).abs().max().item()
print(f"kernel by {handtuned.kernels.backend(x)!r}, x 70 × 100, r = 5: largest error against fp64 {error:.1e}\n")
if forced:
    os.environ["HANDTUNED_BACKEND"] = forced
assert error < 1e-4

if gpu():
    from handtuned.harness import compare, table

    x, W = (torch.randn(4096, 4096, device="cuda", dtype=torch.float16) for _ in range(2))
    A, B = torch.randn(16, 4096, device="cuda"), torch.randn(4096, 16, device="cuda")
    halves = A.half(), B.half()
    ways = {
        "fused": lambda: lora.lora_linear(x, W, None, A, B, 2.0),
        "three products": lambda: F.linear(x, W) + 2.0 * F.linear(F.linear(x, halves[0]), halves[1]),
        "base alone": lambda: F.linear(x, W),
    }
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(compare(ways, device="cuda"), ours="fused"))
else:
    skipped("the time of the fused forward pass beside three products and beside the base layer alone")

# %% [markdown]
# ## Exercise 07.3: the skinny product as a kernel
#
# Write `down(x, A, S)`, a launcher and its kernel: S (M, r) becomes x Aᵀ for contiguous fp32 tensors x (M, K) and A (r, K).
# Sums on the ordinary units will do; one program per row is enough. K and r may be any numbers, and the checker puts
# NaNs around every buffer.

# %%
@triton.jit
def down_kernel(x_ptr, a_ptr, s_ptr, K, R, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    pass  # walk along K, BLOCK_K at a time; sum; store r numbers


def down(x, A, S):
    raise NotImplementedError  # down_kernel[(…,)](x, A, S, x.shape[1], A.shape[0], BLOCK_K=32, BLOCK_R=…)


lessons.check("07.3", down);

# %% [markdown]
# ## Exercise 07.4: LoRA's gradients
#
# Write the backward pass by hand: `lora_gradients(x, dy, W, A, B, s)` returns (dx, dA, dB) for
# y = x Wᵀ + s (x Aᵀ) Bᵀ, without autograd. W is frozen, so there is no dW. Is W needed at all?

# %%
def lora_gradients(x, dy, W, A, B, s):
    raise NotImplementedError


lessons.check("07.4", lora_gradients);

# %% [markdown]
# ## Write it: the fused layer
#
# Now the second of the three kernels that this course is about. It takes one idea: the accumulator of x Wᵀ need not start at zero. S is tiny, (M, r), so each program first computes its tile of s S Bᵀ and goes on from there. y is written once, and no other array of its size exists.
#
# ## Exercise 07.5: the fused forward pass
#
# Write `fused_forward(x, W, S, B, scale, y)`: y (M, N) = x Wᵀ + scale · S Bᵀ in one kernel, for fp32 tensors x (M, K), W (N, K), S (M, r), B (N, r) of *any strides*; y is contiguous. r may be as small as 1, but a side of `tl.dot` has 16 at least: mask what is missing.

# %%
@triton.jit
def fused_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, scale, M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_sm, stride_sr, stride_bn, stride_br, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pass  # acc = scale * S Bᵀ; then your loop over K; one store


def fused_forward(x, W, S, B, scale, y):
    raise NotImplementedError


lessons.check("07.5", fused_forward);

# %% [markdown]
# ## Exercise 07.6: dS and dB
#
# Backward needs dS = s dy B (M, r) and dB = s dyᵀ S (N, r). Each is a product with one short side. Write `up_grads(dy, S, B, scale, dS, dB)`; all are fp32, dS and dB contiguous. One kernel that is launched twice will do, and so will one that makes both. Who adds to dB? If several programs do, without an atomic, the emulator will tell.

# %%
@triton.jit
def skinny_kernel(left_ptr, right_ptr, out_ptr, scale, P, Q, R, stride_lp, stride_lq, stride_rq, stride_rr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    pass  # out (P, R) = scale · left (P, Q) right (Q, R)


def up_grads(dy, S, B, scale, dS, dB):
    raise NotImplementedError


lessons.check("07.6", up_grads);

# %% [markdown]
# ## Exercise 07.7: a layer of your kernels
#
# Wrap them in a `torch.autograd.Function` (lesson [03](03_fp16_training.ipynb) shows its shape). forward: S = x Aᵀ by the skinny kernel, y by the fused one. backward: dS and dB by 07.6; dA = dSᵀ x, skinny again; dx = dy W + dS A, and that is the fused kernel once more, on `W.t()` and `A.t()`. W is frozen: None. The checker lets nothing but kernels compute, and then trains a layer with it.

# %%
class LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, A, B, scale):
        raise NotImplementedError

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError  # return dx, None, dA, dB, None


right = lessons.check("07.7", LoRA.apply)

# %% [markdown]
# ### Train a layer with it
#
# A frozen weight lacks an update of rank 2; A and B are to learn it. The loop takes your Function as soon as it is right, the library's `lora_linear` until then.

# %%
layer = LoRA.apply if right else lambda x, W, A, B, s: lora.lora_linear(x, W, None, A, B, s)
torch.manual_seed(0)
x, W = torch.randn(32, 24), torch.randn(20, 24) / 5
target = x @ (W + torch.randn(20, 2) @ torch.randn(2, 24) / 5).t()
A, B = nn.Parameter(torch.randn(2, 24) / 5), nn.Parameter(torch.zeros(20, 2))
optimizer, losses = AdamW([A, B], lr=0.1, weight_decay=0.0), []
for _ in range(20):
    loss = F.mse_loss(layer(x, W, A, B, 1.0), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"{'your kernels' if right else 'the library'}: loss {losses[0]:.3f} → {losses[-1]:.3f}")
assert losses[-1] < 0.3 * losses[0]

# %% [markdown]
# **The last rung** is the library's: `lora_product` in `kernels/matmul.py`, `lora_down` and `lora_up_grads` in `kernels/lora_gemms.py`. Beyond yours they compute in 16 bits; make the mask of dropout again from a seed instead of storing it; read dy once for dS *and* dB; split a long sum between programs where there are too few, and add the parts in a fixed order, so that the result is the same to the bit; and take W in four bits (lesson [10](10_qlora.ipynb)). Here is how its accumulator starts:

# %%
from handtuned.kernels import matmul

source(matmul._low_rank, first="for j in tl.range", last="acc *= scale")
source(lora._forward)

# %% [markdown]
# ## 8. How many parameters? And inside SwiGLU?
#
# 001 and 003: for a 4,096 × 4,096 layer at r = 8, 65,536 of 16.78 million. 001 also says that LoRA trains "0.1 % of
# the parameters". **Write down your guess** for LLaMA-7B at r = 8, first with q and v only, then with all seven
# projections.
#
# 003 writes the feed-forward part of a Llama with LoRA on all three projections: gate and up see x, SiLU(gate) · up
# goes through down. SiLU(z) = z · σ(z) is smooth and, unlike ReLU, a little negative below zero. What is missing
# from 003's three lines? **Write down your guess**, and the smallest value of SiLU.
#
# 003 also says that this block, SwiGLU, does better than one with GELU, ReLU or SiLU, for three reasons: the gate, the
# product with a second projection, and SiLU itself, smooth and not zero below zero. **Write down your guess**:
# which of them do comparisons at equal size bear out?

# %%
lessons.guess(
    "07.i",
    "what share of LLaMA-7B does LoRA train, what is missing in 003's lines, and the smallest value of SiLU?",
)
lessons.guess("07.j", "which of 003's reasons for SwiGLU holds: the gate and its product, or SiLU?")
counts = handtuned.analyze_lora_params(4096, 4096, 8)

llama = shape_of("llama-7b")


def adapted(names, r):
    return llama.layers * sum(r * (out + into) for name, (out, into) in llama.linears.items() if name in names)


qv, everything = adapted(("q_proj", "v_proj"), 8), adapted(llama.linears, 8)
claim(
    28,
    f"one layer: {counts['lora']:,} of {counts['original']:,}, {counts['ratio']:.2f} %, as they say. Of the whole of "
    f"LLaMA-7B: q and v {qv / 1e6:.2f} M ({qv / llama.parameters:.3%}), all linear layers {everything / 1e6:.1f} M "
    f"({everything / llama.parameters:.2%}). The first rounds to the \"0.1 %\" of 001; with all layers it is three times that.",
    counts["lora"] == 65_536 and round(qv / 1e6, 2) == 4.19 and round(everything / 1e6, 1) == 20.0,
)

torch.manual_seed(0)
block = SwiGLU(16, 32)
apply_lora_to_model(block, rank=2, lora_alpha=16, target_modules="all-linear")
for parameter in lora_parameters(block):
    nn.init.normal_(parameter, std=0.1)
x = torch.randn(5, 16)


def by_hand(scale):
    def weight(layer):
        return layer.weight + scale * layer.lora_B @ layer.lora_A

    gate, up = x @ weight(block.gate_proj).t(), x @ weight(block.up_proj).t()
    return (F.silu(gate) * up) @ weight(block.down_proj).t()


with_scale, without = ((block(x) - by_hand(scale)).abs().max().item() for scale in (16 / 2, 1.0))
z = torch.linspace(-5, 5, 100_001)
lowest = F.silu(z).min().item()
lessons.measured(
    "07.i",
    f"{qv / llama.parameters:.3%} with q and v, {everything / llama.parameters:.2%} with all; alpha / r; {lowest:.3f}",
)
claim(
    35,
    f"gate · up with SiLU is right: 003's lines agree with the library's block to {with_scale:.0e} if every BA is "
    f"multiplied by alpha/r; as printed they are off by {without:.2f}. SiLU is lowest at "
    f"{z[F.silu(z).argmin()]:.3f}, with {lowest:.3f}.",
    with_scale < 1e-5 and without > 1e-2 and round(lowest, 3) == -0.278,
)

gated, plain = 3 * 768 * 2048, 2 * 768 * 3072  # three matrices, two thirds as wide: as many parameters
lessons.measured("07.j", "by what is published, the gate and its product; nothing here decides it")
claim(
    64,
    f"at two thirds of the width a block with a gate has as many parameters as one without ({gated:,} and {plain:,} at width 768). So compared, "
    "Shazeer (2020) reports \"better perplexities\" in pretraining and \"better results on many downstream language-understanding tasks\" for "
    "variants with a gate than for ReLU or GELU. They share the gate, not the SiLU: GEGLU, with GELU in its place, is one of "
    "them. So of 003's reasons the gate and its product are what the paper bears out. Repeating it takes a pretraining.",
    gated == plain,
)

# %% [markdown]
# ## 9. Does learning BA find what cutting ΔW finds?
#
# Back to the house. Section 2 trained all of ΔW and cut it. Now train A and B from the start, at several ranks, with
# the head and the embeddings frozen. **Write down your guess**: at which rank does LoRA reach full fine-tuning here?
# And 000 says that the SVD of a finished ΔW is no substitute, as it computes more. **Write down your guess**: how many
# times the bytes of weights, gradients and moments, and how many times the FLOPs of a step?

# %%
lessons.guess("07.k", "at which rank does LoRA reach full fine-tuning here?")
lessons.guess("07.l", "how many times LoRA's bytes, and its FLOPs per step, does a ΔW for the SVD take?")
swept = (1, 2, 4, 8, 16)
curves, reached = {}, []
for r in swept:
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    apply_lora_to_model(model, rank=r, lora_alpha=2 * r, target_modules="all-linear")
    curves[r] = fit(model, new_house, 80, 5e-3, lora_parameters(model))
    reached.append(accuracy(model, new_test))
    trained = sum(p.numel() for p in lora_parameters(model))
    print(f"r = {r:2}: {trained:6,} trained of {sum(p.numel() for p in model.parameters()):,}, "
          f"loss {curves[r][-1]:.3f}, held out {reached[-1]:.1%}")  # fmt: skip

fig, (left, right) = figure(7.5, 2.8, columns=2)
smooth = lambda values: np.convolve(values, np.ones(8) / 8, mode="valid")  # noqa: E731
for r, shade, style in ((1, GREYS[2], ":"), (4, GREYS[0], "--"), (16, ACCENT, "-")):
    left.plot(smooth(curves[r]), color=shade, linestyle=style, label=f"r = {r}")
left.set(xlabel="step", ylabel="training loss")
left.legend()
right.plot(swept, reached, color=ACCENT, linestyle="-", marker="o", label="BA learnt, rank r")
right.plot(ranks[:5], cut_delta[:5], color=GREYS[1], marker="s", linestyle="--", label="ΔW learnt, cut to r")
right.axhline(accuracy(full, new_test), color=GREYS[0], linewidth=0.8, linestyle=":")
right.text(16, accuracy(full, new_test) + 0.004, "full fine-tuning", ha="right")
right.set(xlabel="r", ylabel="held-out tokens right", xscale="log")
right.set_xticks(swept, swept)
right.minorticks_off()
right.legend(loc="lower right")
show(fig, alt="Left: training loss of LoRA at ranks 1, 4 and 16. Right: held-out accuracy against rank, for a learnt "
     "product BA and for a full update cut to rank r, with the level of full fine-tuning.")  # fmt: skip
lessons.measured(
    "07.k",
    f"full {accuracy(full, new_test):.1%}; " + ", ".join(f"r = {r}: {value:.1%}" for r, value in zip(swept, reached, strict=True)),
)


def step_flops(model):
    tokens, labels = (part[:16] for part in new_house)
    return flops(lambda: F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100).backward())


low = copy.deepcopy(base)
apply_lora_to_model(low, rank=4, lora_alpha=8, target_modules="all-linear")
whole_step, low_step = step_flops(copy.deepcopy(base)), step_flops(low)
trained = sum(p.numel() for p in base.parameters()), sum(p.numel() for p in lora_parameters(low))
at4 = swept.index(4)
lessons.measured("07.l", f"{trained[0] / trained[1]:.0f} × and {whole_step / low_step:.2f} ×")
claim(
    65,
    f"ΔW for the SVD takes full fine-tuning: {16 * trained[0] / 1e6:.2f} MB of weights, gradients and Adam against {16 * trained[1] / 1e6:.2f} for "
    f"A and B of rank 4, and {whole_step / low_step:.2f} × the FLOPs per step, before the SVD has begun. Cut to rank 4 it is then "
    f"{cut_delta[at4]:.1%} right, the learnt product {reached[at4]:.1%}.",
    trained[0] > 10 * trained[1] and whole_step > low_step,
)

# %% [markdown]
# One small model and one task prove nothing in general; lesson 08 builds a task where low rank fails. How to choose
# r on a real model is measured in lesson [12](12_fit_a_budget.ipynb).

# %% [markdown]
# ## What to remember
#
# - The product BA stands for the *change* of a weight. The weight itself is not of low rank.
# - A (r, in) starts random, B (out, r) starts at zero, the factor is alpha / r, dropout acts on A's input.
# - Never form BA in the forward pass: two thin products cost hundreds of times less.
# - The gradient for x still needs W. Only dW falls away.
#
# On a real model: `handtuned finetune --method lora`, or every parameter with `--method full`.
#
# Next: [08. How does LoRA live in a model?](08_lora_in_a_model.ipynb)
