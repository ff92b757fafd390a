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
# # 03. How does FP16 training survive?
#
# Lesson 01 showed how FP16 loses gradients, and that multiplying the loss by a scale saves them. This lesson makes a training loop out of that idea. Three questions have to be answered on the way. Which operations may run in FP16 at all? Who chooses the scale? And in what order do the parts of a step come?
#
# The study documents give code for all three. Some of it does not run, and some of it runs and is wrong. The second kind is the interesting one.
#
# Terms: mixed precision 混合精度, autocast 自动混合精度, gradient scaler 梯度缩放器, overflow 上溢, growth interval 增长间隔, gradient clipping 梯度裁剪, accumulator 累加器, epilogue 尾处理, layer normalization 层归一化

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # this lesson runs kernels without a GPU, as lesson 02 did

import numpy as np
import torch
import torch.nn.functional as F

from handtuned import lessons
from handtuned.amp import GradScaler, MixedPrecisionTrainer, autocast, scaled_matmul
from handtuned.amp.formats import FP16
from handtuned.kernels import matmul

# %% [markdown]
# ## The loop
#
# **Mixed precision** means: weights and updates in FP32, most of the computing in 16 bits. Two helpers do the work.
#
# * **autocast** decides for each operation whether it runs in FP16 or in FP32, and converts its inputs.
# * The **gradient scaler** multiplies the loss by the scale, divides the gradients by it afterwards, and adapts the scale.
#
# Document 000 writes the loop as
#
# ```python
# with auto_cast(device="cuda", dtype=torch.float16):
#     out = model(inp)
#     loss = loss_fn(out, tgt)
# scaler(loss).backward()
# scaler.step(optimizer)
# scaler.update()
# ```
#
# **Write down your guess:** Three things in these lines do not exist in PyTorch. Which?

# %%
lessons.guess("03.a", "which three things do not exist in PyTorch?")
def attempt(what, function):
    try:
        function()
        print(f"{what:38} works")
        return True
    except Exception as error:
        print(f"{what:38} {type(error).__name__}: {str(error).splitlines()[0][:70]}")
        return False


torch_scaler = torch.amp.GradScaler("cpu")
loss = torch.ones(1, requires_grad=True).sum()
tried = {
    "torch.auto_cast": attempt("torch.auto_cast", lambda: torch.auto_cast),
    "device=": attempt('torch.autocast(device="cpu")', lambda: torch.autocast(device="cpu")),
    "scaler(loss)": attempt("scaler(loss)", lambda: torch_scaler(loss)),
}
right = {
    "autocast": attempt('torch.autocast(device_type="cpu")', lambda: torch.autocast(device_type="cpu")),
    "scale": attempt("scaler.scale(loss)", lambda: torch_scaler.scale(loss)),
}
lessons.measured("03.a", ", ".join(name for name, works in tried.items() if not works))
lessons.claim(
    6,
    f"{len(tried) - sum(tried.values())} of the 3 calls fail. The real ones are torch.autocast(device_type=…) and scaler.scale(loss); "
    "the order of the lines is right.",
    holds=not any(tried.values()) and all(right.values()),
)

# %% [markdown]
# And the loop as it is, on a small classifier. We use the library's own `autocast` and `GradScaler`, whose code this lesson goes through; `torch.autocast` and `torch.amp.GradScaler` take the same places.

# %%
from handtuned.lessons import drawings

drawings.mixed_precision_loop()

# %%
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scaler = GradScaler(init_scale=65536.0)
inputs, labels = torch.randn(256, 16), torch.randint(4, (256,))

losses = []
for _ in range(40):
    optimizer.zero_grad()
    with autocast(torch.float16):
        loss = F.cross_entropy(model(inputs), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}, scale {scaler.get_scale():g}, weights are {model[0].weight.dtype}")
assert losses[-1] < 0.8 * losses[0]

# %% [markdown]
# ## Which operations may run in FP16?
#
# Document 001 says that softmax, LayerNorm and the loss are computed in FP32. Why these?
#
# **LayerNorm** subtracts a row's mean and divides by its standard deviation σ. On the way it squares numbers.
#
# **Write down your guess:** The largest FP16 number is 65504. From which $x$ on is $e^x$ infinite? And from which σ on does a sum of squares overflow, if everything is FP16? What will LayerNorm output then: infinity, NaN, or something else?

# %%
lessons.guess(
    "03.b",
    "from which x on is exp(x) infinite in FP16, and what does LayerNorm output when the sum of squares overflows?",
)
for x in (11.0, 11.1):
    print(f"exp({x}) in FP16: {torch.tensor(x).half().exp().item()}")


def layer_norm_in(x, dtype):
    """Mean, variance and quotient, every intermediate result stored in `dtype`."""
    x = x.to(dtype)
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered * centered).mean(-1, keepdim=True)
    return centered / (variance + 1e-5).sqrt()


torch.manual_seed(0)
for sigma in (1.0, 100.0, 300.0):
    x = sigma * torch.randn(4, 256)
    naive, wide = layer_norm_in(x, torch.float16), layer_norm_in(x, torch.float32)
    print(f"sigma {sigma:5g}: size of the output in FP16 {naive.abs().mean().item():.3f}, in FP32 {wide.abs().mean().item():.3f}")
silent_zeros = (naive == 0).float().mean().item()
lessons.measured("03.b", f"exp(11.1) is, exp(11) is not; zeros, {100 * silent_zeros:.0f} % of them")

# %% [markdown]
# At σ = 100 the largest squares already exceed 65504. The variance becomes infinite, and everything divided by infinity is 0. No NaN, no error: a layer that outputs zeros. Silent failures like this are the reason for the rule.
#
# How does `autocast` know? There is no cleverness in it. It has three lists.

# %%
from importlib import import_module

lists = import_module("handtuned.amp.autocast")
lessons.source(lists.autocast_reference)
lessons.source(lists.cast_dtype)
print("in 16 bits:", ", ".join(sorted(lists.LOW)[:8]), "…")
print("in FP32:   ", ", ".join(sorted(lists.HIGH)[:8]), "…")

# %%
x = torch.randn(4, 8)
w = torch.randn(8, 8)
with autocast(torch.float16):
    half = F.linear(x, w)
    dtypes = {
        "linear": half.dtype,
        "relu of it": F.relu(half).dtype,
        "softmax of it": F.softmax(half, -1).dtype,
        "layer_norm of it": F.layer_norm(half, (8,)).dtype,
        "cross_entropy of it": F.cross_entropy(half, torch.zeros(4, dtype=torch.long)).dtype,
        "sum of it": half.sum().dtype,
    }
for name, dtype in dtypes.items():
    print(f"{name:20} {dtype}")
exp_overflows = torch.tensor(11.1).half().exp().isinf().item()
lessons.claim(
    12,
    f"In FP16, exp(11.1) is infinite, and a LayerNorm at σ = 300 silently outputs {100 * silent_zeros:.0f} % zeros. "
    "Under autocast, softmax, LayerNorm and cross-entropy return FP32; linear returns FP16.",
    holds=exp_overflows
    and silent_zeros == 1
    and all(dtypes[f"{name} of it"] == torch.float32 for name in ("softmax", "layer_norm", "cross_entropy"))
    and dtypes["linear"] == torch.float16,
)

# %% [markdown]
# ## A product needs a wide sum
#
# Products are where the time goes, so they run in FP16. But an entry of a product is a *sum* of many terms:
#
# $$c_{ij} = \sum_k a_{ik} b_{kj} .$$
#
# Four numbers show what can go wrong with the sum:

# %%
a = np.array([2048.0, 1.0, 1.0, 1.0], dtype=np.float16)
b = np.ones(4, dtype=np.float16)
narrow = np.float16(0)
for term in a * b:
    narrow = np.float16(narrow + term)  # the sum itself is FP16
wide = np.float16(np.float32(a) @ np.float32(b))  # sum in FP32, round once
print(f"sum in FP16: {narrow}    sum in FP32, rounded once: {wide}    exact: {a.astype(float).sum():g}")

# %% [markdown]
# 2048 + 1 is 2048 in FP16, three times over. So the kernel adds into an FP32 **accumulator** and rounds at the end. (2051 itself has no FP16 number; 2052 is the nearest.)
#
# The end of the kernel, where the accumulator is stored, is its **epilogue**. What is done there costs no memory traffic. And it is the right place for a scale. Suppose that the exact entry is 10⁻⁸:

# %%
entry = np.float32(1e-4) * np.float32(1e-4)
late = np.float16(entry) * np.float16(1024)
early = np.float16(entry * np.float32(1024))
print(f"rounded, then scaled: {late}     scaled, then rounded: {early}     exact: {1024 * float(entry):.4g}")

# %% [markdown]
# `scaled_matmul` is this product: FP16 in, FP32 inside, the scale in the epilogue, and a flag if any entry overflowed. First its reference, then the kernel's last lines, then which program touches what.

# %%
lessons.source(matmul.scaled_matmul_reference)
lessons.source(matmul._matmul_kernel, "if loss_scale_ptr", "tl.store(found_inf_ptr")

fig, axes = lessons.figure(7, 2.3, columns=3)
lessons.who_reads(axes[0], [[0 if i < 2 else -1 for _ in range(6)] for i in range(4)], "A: a strip of rows")
lessons.who_reads(axes[1], [[0 if j < 2 else -1 for j in range(4)] for _ in range(6)], "B: a strip of columns")
lessons.who_reads(axes[2], [[2 * (i // 2) + j // 2 for j in range(4)] for i in range(4)], "C: one tile each")
lessons.show(
    fig,
    alt="Program 0 of a matrix product reads the two upper rows of A and the two left columns of B, "
    "and writes the upper left tile of C. Programs 1 to 3 write the other tiles.",
)

# %%
torch.manual_seed(0)
a, b = (1e-4 * torch.randn(65, 33)).half(), (1e-3 * torch.randn(33, 40)).half()
exact = a.double() @ b.double()
fused, overflow = scaled_matmul(a, b, scale=65536.0)  # interpreted: the kernel itself
separate = (a @ b) * 65536.0
error = {name: ((c.double() / 65536 - exact).norm() / exact.norm()).item() for name, c in {"fused": fused, "separate": separate}.items()}
print(f"relative error: scale in the epilogue {error['fused']:.1e}, product and then scale {error['separate']:.1e}")
_, overflow = scaled_matmul(a * 1e4, b * 1e4, scale=65536.0)
print("with large operands the flag is", overflow.item())
assert error["fused"] < 1e-3 < error["separate"] and overflow == 1

# %% [markdown]
# ## Who chooses the scale?
#
# Too small, and gradients underflow. Too large, and they overflow. The right scale depends on the model, and it moves during training. So it is searched for:
#
# * If any gradient is infinite or NaN, the step is **skipped** and the scale is halved.
# * After `growth_interval` good steps **in a row** it is doubled.
#
# It creeps up until it is too large, falls back, and stays near the edge.
#
# Document 001 writes a `GradScaler` class with this rule in `step`, abridged here:
#
# ```python
# if has_inf:
#     self.scale *= self.backoff_factor
# else:
#     optimizer.step()
#     self.step_count += 1
#     if self.step_count % self.growth_interval == 0:
#         self.scale *= self.growth_factor
# ```
#
# **Write down your guess:** Let every fourth step overflow, 20 times over (three good, one bad), with an interval of 4. Both start at 1. Where does the correct rule end, where does this one?

# %%
lessons.guess("03.c", "where does the correct rule end, where the notes'?")
pattern = ([False] * 3 + [True]) * 20
notes_scale, count, notes_trace = 1.0, 0, []
for overflow in pattern:
    if overflow:
        notes_scale *= 0.5
    else:
        count += 1
        if count % 4 == 0:
            notes_scale *= 2.0
    notes_trace.append(notes_scale)


def trace(scaler):
    """The scale after each step, for gradients that are bad where the pattern says so."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, scales = torch.optim.SGD([weight], lr=1.0), []
    for overflow in pattern:
        scaler.scale(weight.sum()).backward()
        weight.grad.fill_(float("inf") if overflow else 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


ours = trace(GradScaler(init_scale=1.0, growth_interval=4))
torchs = trace(torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=4))
fig, ax = lessons.figure(7, 2.6)
ax.semilogy(ours, label="ours", base=2)
ax.semilogy(torchs, label="torch", base=2, linewidth=2.5)
ax.semilogy(notes_trace, label="the notes' class", base=2)
ax.set(xlabel="step", ylabel="scale")
ax.legend()
lessons.show(
    fig,
    alt="Scale over 80 steps of which every fourth overflows. Ours and torch's fall together by half at every overflow. "
    "The notes' class grows in between and falls only slowly.",
)
print(f"after {len(pattern)} steps: ours {ours[-1]:.2g}, torch {torchs[-1]:.2g}, the notes' {notes_trace[-1]:.2g}")
lessons.measured("03.c", f"{ours[-1]:.2g}, and {notes_trace[-1]:.2g}")

# %%
def skips(rule, largest, interval=100):
    """Skipped steps if a step overflows exactly when its largest gradient times the scale leaves FP16."""
    scale, count, skipped = torch.tensor(65536.0), torch.zeros((), dtype=torch.int32), 0
    for g in largest:
        overflow = g * scale.item() > FP16.max
        skipped += overflow
        if rule == "torch":
            torch._amp_update_scale_(scale, count, torch.tensor(float(overflow)), 2.0, 0.5, interval)
        elif overflow:
            scale *= 0.5
        else:
            count += 1
            scale *= 2.0 if count % interval == 0 else 1.0
    return skipped


unscripted = np.exp(np.random.default_rng(0).normal(size=20_000)).tolist()  # the largest gradient of each step
skipped = {rule: skips(rule, unscripted) for rule in ("torch", "notes")}
print(f"overflow from the gradients themselves, {len(unscripted):,} steps, interval 100; skipped: {skipped}")
lessons.claim(
    10,
    f"The class counts all good steps, not those in a row. With every fourth step overflowing it ends at {notes_trace[-1]:.3g}, "
    f"torch and ours at {torchs[-1]:.2g}: it keeps pushing a scale up that is too large already. Where steps overflow of themselves, since a "
    f"gradient times the scale leaves FP16, too large a scale soon corrects itself: of {len(unscripted):,} steps torch's rule skips "
    f"{skipped['torch']}, the notes' {skipped['notes']}. Wrong as a copy of the rule, and in practice dearer rather than fatal.",
    holds=ours == torchs and abs(notes_trace[-1] - 0.03125) < 1e-9 and abs(ours[-1] - 0.5**20) < 1e-12
    and skipped["torch"] < skipped["notes"] < 0.1 * len(unscripted),
)

# %% [markdown]
# ## Exercise 03.1: the rule of the scale
#
# Write `next_scale(scale, run, overflow, interval)`, which returns the new `(scale, run)`. `run` counts the good steps in a row since the last change; growth factor 2, backoff factor 1/2.


# %%
def next_scale(scale, run, overflow, interval):
    raise NotImplementedError


lessons.check("03.1", next_scale);

# %% [markdown]
# ## The order of a step
#
# Document 001's trainer goes: scale the loss, backward, unscale, clip, step, update. **Gradient clipping** shortens the gradient if its length exceeds a bound, so that one bad batch cannot throw the model far.
#
# **Write down your guess:** What happens if clipping comes before unscaling? The scale is 65536, and the bound is 1.

# %%
lessons.guess("03.d", "clipped before it is unscaled, how long is the gradient of a step?")
def length_of_step(order, scale=65536.0):
    weight = torch.nn.Parameter(torch.zeros(4))
    ((weight * torch.tensor([3.0, 0.0, 4.0, 0.0])).sum() * scale).backward()  # the true gradient has length 5
    for part in order:
        if part == "unscale":
            weight.grad /= scale
        else:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
    return weight.grad.norm().item()


right_order, wrong_order = length_of_step(["unscale", "clip"]), length_of_step(["clip", "unscale"])
print(f"unscale, clip: length {right_order:.3f}       clip, unscale: length {wrong_order:.3g}")
print(f"smallest positive FP16 number: {FP16.smallest_subnormal:.3g}, smallest normal one: {FP16.smallest_normal:.3g}")
lessons.measured("03.d", f"{wrong_order:.2g} instead of {right_order:.2g}")
lessons.claim(
    9,
    f"Unscaled first, a gradient of length 5 is clipped to {right_order:.2f}; clipped first, a length of {wrong_order:.2g} is left. "
    f"And the smallest positive FP16 number is {FP16.smallest_subnormal:.2g}, a subnormal; normal ones begin at {FP16.smallest_normal:.2g}.",
    holds=abs(right_order - 1) < 1e-3 and wrong_order < 2e-5 and abs(FP16.smallest_subnormal - 6e-8) < 1e-9,
)

# %% [markdown]
# ## What else the hand-written class leaves out
#
# Its methods are `scale_loss`, `unscale_grads`, `step`, which looks for inf and NaN, and an empty `update`. Looking after unscaling is fine: infinity divided by anything stays infinite. But three ways of using it go wrong silently, and each is caught in `torch.amp.GradScaler` and in ours.
#
# 1. `step` without `unscale_grads` before it: the update is 65536 times too large. The real `step` unscales by itself if nobody has.
# 2. `unscale_grads` called twice: gradients vanish. The real one raises.
# 3. FP16 gradients: dividing them brings the underflow right back. The real one raises.

# %%
class NotesScaler:
    """Document 001's, as far as it is needed here."""

    scale = 65536.0

    def unscale_grads(self, weights):
        for weight in weights:
            weight.grad.data /= self.scale


def leaf(value, dtype=torch.float32):
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    weight.grad = torch.full((3,), value, dtype=dtype)
    return weight


notes = NotesScaler()
one = leaf(65536 * 0.5)
without = one.grad[0].item()
notes.unscale_grads([one])
once = one.grad[0].item()
notes.unscale_grads([one])
print(f"a true gradient of 0.5: step without unscaling uses {without:g}; unscaled {once:g}; unscaled twice {one.grad[0].item():.2g}")
half = leaf(65536 * 1e-8, torch.float16)
notes.unscale_grads([half])
print(f"a true gradient of 1e-8, scaled in FP16 and unscaled there: {half.grad[0].item()}\n")

guards = []
for make in (lambda: torch.amp.GradScaler("cpu"), GradScaler):
    scaler, weight = make(), leaf(32768.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    guards.append(not attempt(f"{type(scaler).__module__.split('.')[0]}: unscale_ twice", lambda s=scaler, o=optimizer: s.unscale_(o)))
    scaler, weight = make(), leaf(6e-4, torch.float16)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(torch.ones(()))
    guards.append(not attempt(f"{type(scaler).__module__.split('.')[0]}: FP16 gradients", lambda s=scaler, o=optimizer: s.unscale_(o)))
    scaler, weight = make(), leaf(32768.0)
    scaler.scale(torch.ones(()))
    scaler.step(torch.optim.SGD([weight], lr=1.0))
    guards.append(weight[0].item() == 0.5)
lessons.claim(
    11,
    f"In the order of 001's own trainer it is right: a gradient of {once:g} for 0.5. It claims no more, and nothing guards it: step uses "
    f"{without:g} if nobody unscaled; unscaling twice leaves {one.grad[0].item():.1g}; FP16 gradients of 1e-8 "
    f"unscale back to {half.grad[0].item():g}. torch's scaler and ours unscale in step, and raise in the other two cases.",
    holds=once == 0.5 and without == 32768 and one.grad[0] < 1e-5 and half.grad[0] == 0 and all(guards),
)

# %% [markdown]
# ## Exercise 03.2: the order of a step
#
# Write `step(w, loss, scale, max_norm, lr)` for one weight tensor `w` and plain gradient descent: backward with the scaled loss, unscale, clip to `max_norm`, move `w`. If a gradient is not finite, leave `w` alone. Return whether `w` was moved.


# %%
def step(w, loss, scale, max_norm, lr):
    raise NotImplementedError


lessons.check("03.2", step);

# %% [markdown]
# ## Unscale, check, and never wait
#
# Unscaling and checking for infinities touch every gradient once, so one kernel does both. You saw its inner part in lesson 02. On a GPU one more thing matters: Python must not *ask* the GPU whether something overflowed, since an answer means waiting until the GPU is done with everything before. So the flag stays on the device.
#
# All programs share the one flag. Some see an infinity, others do not, and nobody knows who comes last.
#
# ## Exercise 03.3: a kernel that unscales and looks
#
# Write `unscale(grad, scale, found_inf)`. It launches a kernel that divides the vector `grad` by `scale` in place and sets the one-element tensor `found_inf` to 1 if any gradient is infinite or NaN. If none is, it leaves `found_inf` as it is. The first cell has set `TRITON_INTERPRET`; import `triton` and `triton.language as tl`.


# %%
def unscale(grad, scale, found_inf):
    raise NotImplementedError


lessons.check("03.3", unscale);

# %% [markdown]
# Did your first answer read the flag, take the maximum and write it back? The interpreter, which runs one program after the other, gets that right. On a GPU two programs read 0 at the same time, one writes 1, the other writes 0 after it: a **race**. So the checkers run your kernel in the emulator as well (lesson 02), which finds it.
#
# ## Write it: the loss-scaled product
#
# You have all its parts: the tiled product (02.6), the wide accumulator and the scale in the epilogue (above), and the flag (03.3). Put them together. It is the first of the three kernels that this course is about; forty lines are plenty.
#
# ## Exercise 03.4: the loss-scaled product
#
# Write `scaled_product(a, b, scale, c, found_inf)` for FP16 matrices a (M, K) and b (K, N) of *any strides*: c (M, N), contiguous FP16, becomes scale · a b, with sums in FP32 and one rounding, after the scale. If an entry of c is not finite, the one-element `found_inf` becomes 1; otherwise nobody touches it. `scale` is a Python number.


# %%
from handtuned.kernels.runtime import tl, triton  # Triton, or stand-ins where it cannot be installed


@triton.jit
def scaled_product_kernel(a_ptr, b_ptr, c_ptr, flag_ptr, scale, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, BLOCK: tl.constexpr):
    pass  # your tiled product; then the epilogue: scale, round, store, look


def scaled_product(a, b, scale, c, found_inf):
    raise NotImplementedError  # scaled_product_kernel[(…, …)](a, b, c, found_inf, scale, M, N, K, *a.stride(), *b.stride(), BLOCK=16)


lessons.check("03.4", scaled_product);

# %% [markdown]
# ## Exercise 03.5: its backward pass
#
# For $c = s\,a b$ and a gradient `dc` that arrives, the chain rule gives
#
# $$da = s \, dc \, b^{\mathsf T}, \qquad db = s \, a^{\mathsf T} dc .$$
#
# Both are the same product again. A transposed view, `b.t()`, costs nothing: the same numbers, two strides exchanged. That is why your kernel takes any strides.
#
# PyTorch learns of a kernel's gradient through a `torch.autograd.Function`: `forward` computes, and saves what backward needs; `backward` gets one gradient for each output and returns one for each input (None for `scale`). Write it with your kernel. The checker lets nothing but kernels compute in it, and then trains a layer with it.


# %%
class ScaledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, scale):
        raise NotImplementedError  # save a and b; allocate c and found_inf; launch; return both

    @staticmethod
    def backward(ctx, dc, _):
        raise NotImplementedError  # return da, db, None


right = lessons.check("03.5", ScaledMatmul.apply)

# %% [markdown]
# ### Train a layer with it
#
# An FP32 weight, its product in FP16, and gradients of 1e-7, which only the scale keeps alive. The loop takes your Function as soon as it is right, the library's `scaled_matmul` until then.

# %%
product = ScaledMatmul.apply if right else scaled_matmul
rng = torch.Generator().manual_seed(0)
x, truth = torch.randn(48, 24, generator=rng), torch.randn(24, 16, generator=rng)
whose = "your" if right else "the library's"
for scale in (1.0, 65536.0):
    weight, losses = torch.zeros(24, 16, requires_grad=True), []
    for _ in range(12):
        y, found_inf = product(x.half(), weight.half(), 1.0)
        loss = 1e-7 * (y.float() - x @ truth).square().mean()
        (loss * scale).backward()
        if torch.isfinite(weight.grad).all():
            weight.data -= 2e7 * weight.grad / scale
        weight.grad = None
        losses.append(loss.item())
    print(f"{whose} product, loss scale {scale:g}: loss {losses[0]:.2e} → {losses[-1]:.2e}")
assert losses[-1] < 0.2 * losses[0]

# %% [markdown]
# **The last rung** is the library's kernel, above. Beyond yours it has larger tiles, chosen by measuring; 64-bit addresses for matrices of more than 2³¹ bytes; an order of tiles that suits the cache; no masks where no tile hangs over; a scale that is a tensor on the GPU, so that nobody waits for it; bf16. What it computes is what you wrote.

# %% [markdown]
# ## All together
#
# `MixedPrecisionTrainer` is document 001's trainer with these faults mended. Given a model whose weights *are* FP16, it also keeps FP32 master weights. We train such a model from a scale that is far too large, with torch's scaler on the same task beside it.
#
# **Write down your guess:** How many steps are skipped at the start?

# %%
lessons.guess("03.e", "how many steps are skipped at the start?")
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))


model = network().half()
trainer = MixedPrecisionTrainer(model, torch.optim.AdamW(model.parameters(), lr=1e-2), init_scale=2.0**24)
trainer.scaler._growth_interval = 10  # to see growth within a short run
reference = network()
optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10)

ours, theirs = {"loss": [], "scale": []}, {"loss": [], "scale": []}
for _ in range(60):
    ours["loss"].append(trainer.train_step(inputs.half(), labels))
    ours["scale"].append(trainer.scaler.get_scale())
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(reference(inputs).float(), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    theirs["loss"].append(loss.item())
    theirs["scale"].append(scaler.get_scale())

fig, axes = lessons.figure(7, 2.6, columns=2)
for run, label, style in ((ours, "trainer, FP16 weights", "-"), (theirs, "torch, FP32 weights", "--")):
    axes[0].semilogy(run["scale"], style, base=2, label=label)
    axes[1].plot(run["loss"], style, label=label)
axes[0].set(xlabel="step", ylabel="scale")
axes[1].set(xlabel="step", ylabel="loss")
axes[1].legend()
lessons.show(
    fig,
    alt="Left: the scale falls from 2 to the power of 24 in the first steps and then moves up and down near an edge. "
    "Right: the losses of both runs fall together after the first skipped steps.",
)
skipped = sum(after < before for before, after in zip([2.0**24, *ours["scale"]], ours["scale"], strict=False))
print(f"{skipped} of 60 steps were skipped; final losses {ours['loss'][-1]:.4f} and {theirs['loss'][-1]:.4f}")
lessons.measured("03.e", f"{skipped} of 60")
assert ours["loss"][-1] < 0.9 * ours["loss"][0] and skipped > 0

# %% [markdown]
# In the left picture the search is at work: a free fall at the start, then a growth every ten good steps, answered by an overflow. With the usual interval of 2,000 such a probe costs one step in 2,000.
#
# With BF16 there is no scale to search for: its range is that of FP32 (lesson 01). `MixedPrecisionTrainer(dtype=torch.bfloat16)` switches the scaler off.
#
# One claim is left: 001 says that FP16 computes faster and takes less memory. **Write down your guess:** on a GPU of today, by what factor is a large product faster in FP16 than in FP32? A product that is limited by memory gains another factor: which?

# %%
lessons.guess("03.f", "FP16 against FP32 on a GPU: what factor in arithmetic, what factor where memory limits?")
if lessons.gpu():
    side = torch.randn(4096, 4096, device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = side.to(dtype)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        x @ x
        start.record()
        for _ in range(10):
            x @ x
        end.record()
        torch.cuda.synchronize()
        print(f"{dtype}: {2 * 4096**3 * 10 / start.elapsed_time(end) / 1e9:.0f} TFLOP/s")
else:
    lessons.skipped("the speed of a 4096³ product in FP32, FP16 and BF16")

one_layer = {dtype: torch.empty(4096, 4096, dtype=dtype).nbytes / 1e6 for dtype in (torch.float32, torch.float16)}
h100 = {"FP32": 67, "FP16": 989}  # TFLOP/s, dense: NVIDIA's data sheet of the H100 SXM
lessons.measured(
    "03.f",
    f"{h100['FP16'] / h100['FP32']:.0f} times by the data sheet of an H100, {one_layer[torch.float32] / one_layer[torch.float16]:.0f} times by bytes",
)
lessons.claim(
    63,
    f"A 4096 × 4096 operand takes {one_layer[torch.float32]:.0f} MB in FP32 and {one_layer[torch.float16]:.0f} MB in FP16, so a product that "
    f"waits for memory can take half the time. What a GPU's arithmetic does is on its data sheet: an H100 has {h100['FP32']} TFLOP/s in FP32 and "
    f"{h100['FP16']} in FP16 on tensor cores, {h100['FP16'] / h100['FP32']:.0f} times as many. A CPU without FP16 units shows neither; "
    "run the cell above on a GPU. And what is saved is activations and time, not model states (lesson 04).",
    holds=one_layer[torch.float32] == 2 * one_layer[torch.float16],
)

# %% [markdown]
# ## What to remember
#
# * Products in FP16 with an FP32 accumulator; exponentials, squares, sums and losses in FP32. A naive FP16 LayerNorm fails silently.
# * The scale is searched for: halve and skip on overflow, double after enough good steps **in a row**.
# * Scale, backward, unscale, clip, step, update. Unscale in FP32, once.
# * A kernel's flag is only ever set, never cleared, by programs that do not know of each other.
#
# Mixed precision makes training faster. Does it also make it smaller?
#
# On a real model: `handtuned finetune --method full --dtype float16` computes in FP16 from FP32 masters, with loss scaling; `--dtype bfloat16` needs none.
#
# Next: [04. Where does memory go?](04_where_memory_goes.ipynb)
