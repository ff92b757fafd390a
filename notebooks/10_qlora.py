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
# # 10. How does QLoRA train through 4 bits?
#
# QLoRA freezes the base in NF4 (lesson [09](09_four_bits.ipynb)) and trains LoRA adapters on top of it (lessons
# [07](07_low_rank_updates.ipynb), [08](08_lora_in_a_model.ipynb)). Codes cannot be trained: they are whole numbers from
# 0 to 15, and nothing can be moved by 10⁻⁴. Yet the gradient has to get through every such layer to reach the adapters
# below. This lesson builds the layer, keeps an honest account of the memory, trains, and then tries to merge the adapter back
# into 4 bits.
#
# The documents: 003 (QLoRA diary) throughout.
#
# Terms: QLoRA 量化低秩适应, 4-bit quantization 4 位量化, dequantize 反量化, frozen base 冻结基座模型, optimizer state 优化器状态, double quantization 双重量化, merge 合并, memory breakdown 显存明细

# %%
import copy
import os
import subprocess
import sys

import numpy as np
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"  # a kernel can be interpreted on the CPU …
    os.environ["HANDTUNED_BACKEND"] = "torch"  # … but only where a cell asks for it: references are much faster

import torch.nn.functional as F
from torch import nn

from handtuned import lessons, memory
from handtuned.kernels import nf4_matmul, nf4_stream, runtime
from handtuned.lessons import (
    ACCENT,
    GREYS,
    bars,
    claim,
    figure,
    gpu,
    show,
    skipped,
    source,
    stacked,
    who_reads,
)
from handtuned.lessons.house import HOUSE_A, House, accuracy, fit
from handtuned.nn import apply_lora_to_model, lora_parameters
from handtuned.nn.inject import lora_layers
from handtuned.nn.merge import merge_errors, merge_into_nf4
from handtuned.nn.variants import loftq_init
from handtuned.memory.model_shapes import shape_of
from handtuned.quant import NF4_CODE, NF4Linear, quantize_model, quantize_nf4
from handtuned.quant import linear as nf4_linear_module

# %% [markdown]
# ## 1. The gradient, on four numbers
#
# Let Ŵ be the 2 × 2 matrix that four codes stand for. Forward, y = Ŵx. Backward, a gradient dy arrives. A trained layer
# needs two things: dW = dy xᵀ, to change itself, and dx = Ŵᵀdy, for the layers below. A frozen layer needs only dx. And dx
# asks for Ŵ, not for a derivative of rounding: no trick is needed to differentiate through the codes, because nobody
# differentiates with respect to them.

# %%
W = torch.tensor([[0.123, -0.456], [0.789, -0.234]])
q = quantize_nf4(W, double_quant=False)
W_hat = q.dequantize().numpy()
x, dy = np.array([1.0, 2.0]), np.array([1.0, -1.0])
print("codes in bytes", [f"{byte:08b}" for byte in q.packed.tolist()], "\nŴ =", *W_hat.round(3))
print("y  = Ŵ x  =", W_hat @ x, "   (unquantized W:", W.numpy() @ x, ")")
print("dx = Ŵᵀdy =", W_hat.T @ dy)

# %% [markdown]
# ## 2. The layer
#
# In torch one could write `F.linear(x, q.dequantize())`. **Write down your guess**: what does autograd keep between
# forward and backward, and how much memory is that for a model of ten such layers?

# %%
lessons.guess("10.a", "how many MB does autograd keep beside the codes for ten layers: dense, and dequantized twice?")
WIDTH, LAYERS = 512, 10
torch.manual_seed(0)
dense_layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
quantized = [NF4Linear.from_linear(layer) for layer in dense_layers]
del dense_layers
x = torch.randn(16, WIDTH, requires_grad=True)


def naive():
    y = x
    for layer in quantized:
        y = torch.tanh(F.linear(y, layer.quantized.dequantize()))
    y.sum().backward()


def twice():
    y = x
    for layer in quantized:
        y = torch.tanh(layer(y))
    y.sum().backward()


naive(), twice()  # buffers that are made once and reused are not what we count
courses = {name: memory.measure(run, device="cpu", keep_history=True) for name, run in
           (("dense weight kept by autograd", naive), ("NF4Linear: dequantized twice", twice))}  # fmt: skip
for name, measured in courses.items():
    print(f"{name:32} {measured.added / 1e6:6.2f} MB at most beside the codes")
codes_size = sum(layer.quantized.nbytes for layer in quantized)
print(f"{'all codes and scales':32} {codes_size / 1e6:6.2f} MB; one dense weight: {4 * WIDTH * WIDTH / 1e6:.2f} MB")

fig, ax = figure(7, 2.6)
for (name, measured), color, line in zip(courses.items(), (GREYS[0], ACCENT), ("--", "-"), strict=True):
    course = (np.array(measured.history) - measured.before) / 1e6
    ax.plot(np.linspace(0, 1, len(course)), course, color=color, linestyle=line, label=name)
ax.set(xlabel="forward … backward", ylabel="MB of live tensors", xticks=[])
ax.legend()
show(fig, alt="Live memory over forward and backward of ten layers. With plain autograd it climbs to ten dense weights "
     "and falls again; with NF4Linear it stays near zero.")  # fmt: skip
lessons.measured("10.a", " and ".join(f"{course.added / 1e6:.2f} MB" for course in courses.values()))

# %% [markdown]
# Plain autograd keeps every dense weight, because each is needed for its dx. So four bits on disk become 32 bits in
# memory for the length of a step, in every layer at once, and nothing is won.
#
# `NF4Linear` keeps the codes and decodes them twice, here into a dense weight: once forward, once backward. That costs some time and saves
# all of the dense memory. It is the bargain of lesson [05](05_trading_time_for_memory.ipynb), struck with weights instead
# of activations. Its backward is a few lines, because the operation is its own gradient with W transposed:

# %%
source(nf4_linear_module.NF4Product)
layer = NF4Linear.from_linear(nn.Linear(96, 64))
x, dy = torch.randn(5, 96, requires_grad=True), torch.randn(5, 64)
layer(x).backward(dy)
mine, x.grad = x.grad, None
layer.dequantize()(x).backward(dy)
print("dx against a dense layer with the same values:", f"{(mine - x.grad).abs().max():.0e}")
print("gradient of the codes:", layer.weight.grad, "| trained:", layer.weight.requires_grad)

# %% [markdown]
# ## Exercise 10.1: a product that keeps no dense weight
#
# Write `nf4_product(x, q)` for an `NF4Tensor` q: x Ŵᵀ, with a gradient for x, keeping no dense weight between forward and
# backward. The checker counts the bytes that stay alive.

# %%
def nf4_product(x, q):
    raise NotImplementedError


lessons.check("10.1", nf4_product);

# %% [markdown]
# ## 3. Scales of scales, in bytes
#
# 003 works through a model of 1.5 billion parameters: 23.44 million scales of 4 bytes are 93.75 MB. With double
# quantization they shrink to 23.44 MB of codes and "256 groups × 4 bytes = 1 KB". **Write down your guess**: how many
# constants does the second level need, at one for 256 scales?

# %%
lessons.guess("10.b", "how many constants does the second level need?")
def scale_bytes(weights, double_quant):
    """Bytes of scales: fp32, or codes, fp32 constants and one fp32 mean."""
    scales = -(-weights // 64)
    return scales + 4 * -(-scales // 256) + 4 if double_quant else 4 * scales


sample = torch.randn(1 << 20)
for nested in (False, True):  # the formula against real tensors
    assert quantize_nf4(sample, double_quant=nested).nbytes == sample.numel() // 2 + scale_bytes(sample.numel(), nested)

N = 1_500_000_000
single, double = scale_bytes(N, False), scale_bytes(N, True)
constants = -(-(N // 64) // 256)
saved = single - double
lessons.measured("10.b", f"{constants:,}")
claim(
    51,
    f"{N // 64 / 1e6:.2f} M scales, {single / 1e6:.2f} MB as fp32: right. The second level has {constants:,} constants, "
    f"{4 * constants / 1e3:.0f} kB, not 1 KB. In all {double / 1e6:.2f} MB, which saves {saved / 1e6:.1f} MB, "
    f"{8 * saved / N:.3f} bit per parameter.",
    round(single / 1e6, 2) == 93.75 and constants == 91_553 and round(double / 1e6, 2) == 23.80
    and round(8 * saved / N, 3) == 0.373,
)  # fmt: skip

# %% [markdown]
# ## 4. An honest account
#
# 003 compares: full fine-tuning of 1.5 billion parameters takes 18 GB, QLoRA "about 1 GB". Both are **model states**:
# what is there whatever the batch. Its 18 GB are 12 bytes per parameter: 2 for the weight, 2 for the gradient, 8 for Adam.
# Its 1 GB has 0.75 GB of codes, 16 MB of adapters, 64 MB of Adam.
#
# **Write down your guess**: which four things are missing from the two lists? Take Qwen2.5-1.5B as the model. It helps to
# go through a model from its first layer to its last and ask of each tensor: in which format does it lie there, and is
# it trained?

# %%
lessons.guess("10.c", "what is missing? Name all parts of what QLoRA keeps.")
QWEN = shape_of("qwen2.5-1.5b")
full = memory.estimate(QWEN, "full", "bfloat16", batch=1, seq=512)
qlora = memory.estimate(QWEN, "qlora", "bfloat16", batch=1, seq=512, lora_r=8)
print(f"{QWEN.name}: {QWEN.parameters / 1e9:.3f} G parameters, of which embeddings {QWEN.table_parameters / 1e9:.3f} G\n")
for name, breakdown in (("full", full), ("QLoRA", qlora)):
    parts = {part: f"{breakdown[part] / 1e9:.3f}" for part in breakdown.STATES if breakdown[part]}
    print(f"{name:6} {breakdown.states / 1e9:6.2f} GB:", ", ".join(f"{part} {size}" for part, size in parts.items()))
lessons.measured("10.c", ", ".join(part for part in qlora.STATES if qlora[part]))

# %%
linear = QWEN.layers * sum(out * into for out, into in QWEN.linears.values())
counted = {
    "codes": [0.75, linear / 2 / 1e9],
    "scales": [0, qlora["quantization constants"] / 1e9],
    "embeddings, norms": [0, (qlora["weights"] - linear / 2) / 1e9],
    "adapters": [0.016, qlora["adapters"] / 1e9],
    "gradients": [0, qlora["gradients"] / 1e9],
    "Adam": [0.064, qlora["optimizer state"] / 1e9],
}
fig, ax = figure(7, 2.2)
stacked(ax, ["003", "counted"], counted, "GB", form="{:.2f}")
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6)
show(fig, alt="Two bars of QLoRA's model states for a 1.5B model: 003 counts codes, adapters and Adam, 0.83 GB; the full "
     "count adds scales, 16-bit embeddings and gradients and comes to about 1.3 GB.")  # fmt: skip

claim(
    49,
    f"full: 003's 18 GB are 12 bytes per parameter and leave out the fp32 master weights of mixed precision; with them "
    f"{full.states / QWEN.parameters:.0f} bytes, 24 GB for 1.5 G, {full.states / 1e9:.1f} GB for this model. QLoRA: the "
    f"embeddings stay in 16 bits ({(qlora['weights'] - linear / 2) / 1e9:.2f} GB), scales take "
    f"{qlora['quantization constants'] / 1e6:.0f} MB and the adapters need gradients: {qlora.states / 1e9:.2f} GB. That is "
    f"{1 - qlora.states / full.states:.0%} less; activations come on top of both.",
    round(full.states / QWEN.parameters) == 16 and 12 * 1.5e9 == 18e9 and 1.2 < qlora.states / 1e9 < 1.4,
)

# %% [markdown]
# ## Exercise 10.2: QLoRA's bytes
#
# Write `qlora_bytes(linear, other, adapter)`: bytes of model states, given how many weights lie in NF4 (blocks of 64,
# double quantization), how many other parameters stay in 16 bits, and how many adapter parameters are trained with Adam
# in fp32. Short blocks count.

# %%
def qlora_bytes(linear, other, adapter):
    raise NotImplementedError


lessons.check("10.2", qlora_bytes);

# %% [markdown]
# ## 5. A table that is not in the paper
#
# 003 prints a table "from the QLoRA paper" for LLaMA-65B: 780 GB for full fine-tuning, 48 GB with 4 bits, 41 GB with
# double quantization, with scores on MMLU and BBH. **Write down your guess** of what double quantization saves at 65
# billion parameters, from section 3.

# %%
lessons.guess("10.d", "how many GB does double quantization save at 65 billion parameters?")
bits_saved = 8 * (scale_bytes(1 << 34, False) - scale_bytes(1 << 34, True)) / (1 << 34)
saved_65 = bits_saved / 8 * 65e9
llama = memory.estimate("llama-65b", "qlora", "bfloat16", batch=1, seq=512, lora_r=64)
print(f"LLaMA-65B in NF4 with double quantization, r = 64 on all projections: states {llama.states / 1e9:.1f} GB")
lessons.measured("10.d", f"{saved_65 / 1e9:.2f} GB")
claim(
    54,
    f"780 = 65 × {780 / 65:.0f}: 12 bytes per parameter again. Double quantization saves {bits_saved:.3f} bit per parameter, "
    f"{saved_65 / 1e9:.2f} GB, not 48 − 41 = 7. The paper itself says \"about 0.37 bits per parameter (approximately 3 GB "
    "for a 65B model)\" and \"from >780 GB to <48 GB\" (Dettmers et al. 2023, sections 1 and 3). Two of the table's figures are "
    "in it, elsewhere and for other things: 63.4 is the MMLU of LLaMA 65B with no tuning at all (table 5), and 41 GB the size of "
    f"Guanaco 65B. The rows and BBH are not. Our count of the states at r = 64: {llama.states / 1e9:.1f} GB.",
    780 == 65 * 12 and round(saved_65 / 1e9, 2) == 3.03,
)

# %% [markdown]
# ## 6. Training
#
# Back to the household model of lesson 07: pretrained on the shipped commands, to be fine-tuned to a house that uses
# other words. Three runs with the same adapters (r = 8, all linear layers): on the fp32 base, on the base in NF4, and
# on the NF4 base with adapters that start at the best correction of the rounding error (LoftQ, Li et al. 2023).
#
# **Write down your guess**: how many held-out tokens does the base lose to NF4, and by how many does QLoRA end up behind
# LoRA?

# %%
lessons.guess("10.e", "how many held-out tokens does the base lose to NF4, in points?")
source(House.new_model)
source(accuracy)

torch.manual_seed(7)
house = House({"old": None, "new": HOUSE_A})
(old_house, new_house), (old_test, new_test) = house.training.values(), house.testing.values()
base = house.new_model()
fit(base, old_house, 200, 3e-3)
in_nf4 = quantize_model(copy.deepcopy(base))
print(f"old house, held out: fp32 base {accuracy(base, old_test):.2%}, NF4 base {accuracy(in_nf4, old_test):.2%}")
lessons.measured("10.e", f"{100 * (accuracy(base, old_test) - accuracy(in_nf4, old_test)):.2f}")

# %%
runs = {}
for name in ("LoRA, fp32 base", "QLoRA", "QLoRA + LoftQ start"):
    torch.manual_seed(0)
    model = copy.deepcopy(base if name.startswith("LoRA") else in_nf4)
    apply_lora_to_model(model, rank=8, lora_alpha=16, target_modules="all-linear")
    if "LoftQ" in name:
        lost = np.median(list(loftq_init(model, base.state_dict()).values()), axis=0)
        print(f"LoftQ start: ‖W − Ŵ‖ / ‖W‖ {lost[0]:.3f}, with the adapter's correction {lost[1]:.3f} (medians)")
    losses = fit(model, new_house, 80, 5e-3, lora_parameters(model))
    runs[name] = model, losses, accuracy(model, new_test)
    print(f"{name:20} last losses {np.mean(losses[-10:]):.3f}, new house held out {runs[name][2]:.2%}")
trained = runs["QLoRA"][0]

fig, ax = figure(7, 2.6)
for (name, (_, losses, _)), color, line in zip(runs.items(), (GREYS[0], ACCENT, GREYS[1]), ("-", "--", ":"), strict=True):
    ax.plot(np.convolve(losses, np.ones(8) / 8, mode="valid"), color=color, linestyle=line, label=name)
ax.set(xlabel="step", ylabel="training loss (mean of 8)")
ax.legend()
show(fig, alt="Three training curves that lie nearly on top of each other: LoRA on the fp32 base, QLoRA, and QLoRA with "
     "a LoftQ start.")  # fmt: skip

# %% [markdown]
# The adapters are trained on the base *as it is*, rounding included: what they learn is right for Ŵ, not for W. On this
# model the rounding alone does no harm that could be seen, so there is little to make up for, and the three curves are
# nearly one. `handtuned finetune` does all this on a real model.
#
# One consequence is easily forgotten: an adapter belongs to the base it was trained on. Load it onto the unquantized
# weights and it answers a slightly different question.
#
# ## 7. Merging back
#
# Lesson 08 merged an adapter into W, and inference was free. Can it be merged into NF4? First on four numbers. The levels
# stand far apart, and a trained ΔW is small. **Write down your guess**: what happens to these codes?

# %%
lessons.guess("10.f", "what happens to these codes?")
row = torch.tensor([0.123, -0.456, 0.789, -0.234])
q = quantize_nf4(row, double_quant=False)
delta = torch.tensor([0.01, -0.008, 0.0, 0.012])
again = quantize_nf4(q.dequantize() + delta, double_quant=False)
print("levels in use  ", q.dequantize().numpy().round(3))
print("ΔW             ", delta.numpy())
print("after the merge", again.dequantize().numpy().round(3), "  codes unchanged:", torch.equal(q.packed, again.packed))
gaps = (NF4_CODE[1:] - NF4_CODE[:-1]) * row.abs().max()
print("gaps between levels:", gaps.numpy().round(3))
lessons.measured("10.f", "unchanged" if torch.equal(q.packed, again.packed) else "changed")

# %% [markdown]
# Every code falls back to where it was: ΔW is rounded away. Only the largest weight of a block is free to move, for it
# sits on ±1 whatever it is; but then the scale moves, and with it the whole block, which nobody asked for. Where ΔW is
# larger, some codes jump by a whole gap. So it must matter how large ΔW is beside W. **Write down your guess** for
# ‖error‖ / ‖ΔW‖ (1 is as wrong as leaving the adapter out): at ‖ΔW‖ = 2 % of ‖W‖, and at 20 %? Our learning rate of
# 5·10⁻³ makes large updates; the cell also trains with 003's 2·10⁻⁴.

# %%
lessons.guess("10.g", "the error over ‖ΔW‖ at 2 % of ‖W‖, and at 20 %?")
errors = merge_errors(trained)
print(errors)
path, layer = next((path, layer) for path, layer in lora_layers(trained) if path.endswith("q_proj"))
delta, dense = layer.delta_weight(), layer.base_layer.quantized.dequantize()
ours = (delta.norm() / dense.norm()).item()


def requantized(size):
    """(error over ‖ΔW‖, share of codes that stay) when ΔW has `size` times the norm of W."""
    update = delta * (size / ours)
    after, before = quantize_nf4(dense + update), layer.base_layer.quantized
    error = (after.dequantize() - dense - update).norm() / update.norm()
    same = torch.stack([after.packed >> 4 == before.packed >> 4, after.packed & 15 == before.packed & 15])
    return error.item(), same.float().mean().item()


sizes = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
lost, stay = zip(*(requantized(size) for size in sizes), strict=True)
for size, error, same in zip(sizes, lost, stay, strict=True):
    print(f"‖ΔW‖ = {size:5.1%} of ‖W‖: error {error:6.1%} of ‖ΔW‖, {same:.1%} of the codes stay")

fig, (left, right) = figure(7.5, 2.8, columns=2)
ways = ("float32", "float16", "bfloat16", "nf4, requantize", "nf4, refit")
bars(left, ways, [100 * errors.median(way) for way in ways], "%", accent=3, form="{:.2g}")
left.set_title(f"error over ‖ΔW‖; here ‖ΔW‖ = {ours:.0%} of ‖W‖")
right.plot([100 * size for size in sizes], [100 * error for error in lost], color=ACCENT, linestyle="-", marker="o",
           label="error, % of ‖ΔW‖")  # fmt: skip
right.plot([100 * size for size in sizes], [100 * same for same in stay], color=GREYS[1], linestyle="--", marker="s",
           label="codes that stay, %")  # fmt: skip
right.axhline(100, color=GREYS[0], linewidth=0.8, linestyle=":")
right.set(xscale="log", xlabel="‖ΔW‖ / ‖W‖, %", ylim=(0, None), title="merging into NF4, ΔW scaled")
right.set_xticks([0.5, 2, 10, 40], ["0.5", "2", "10", "40"])
right.minorticks_off()
right.legend(loc="lower left")
show(fig, alt="Left: errors of merging our adapter as per cent of the update: below one for float32, float16 and "
     "bfloat16, tens of per cent for NF4. Right: error of merging into NF4 against the size of the update; for updates "
     "of a few per cent of the weight it exceeds 100 per cent, and nearly all codes stay.")  # fmt: skip

torch.manual_seed(0)
gentle = apply_lora_to_model(copy.deepcopy(in_nf4), rank=8, lora_alpha=16, target_modules="all-linear")
fit(gentle, new_house, 80, 2e-4, lora_parameters(gentle))
for rate, model in (("5e-3", trained), ("2e-4", gentle)):
    parts = [(layer.delta_weight().norm() / layer.base_layer.quantized.dequantize().norm()).item()
             for _, layer in lora_layers(model)]  # fmt: skip
    merged = copy.deepcopy(model)
    by_layer = merge_into_nf4(merged, "requantize")
    print(f"lr {rate}: ‖ΔW‖ / ‖W‖ {np.median(parts):5.1%}, error of merging {by_layer.median('nf4, requantize'):4.0%} of ‖ΔW‖; "
          f"held out: base {accuracy(in_nf4, new_test):.1%}, adapter beside {accuracy(model, new_test):.1%}, "
          f"merged into NF4 {accuracy(merged, new_test):.1%}")  # fmt: skip
lessons.measured("10.g", f"{lost[sizes.index(0.02)]:.2f} and {lost[sizes.index(0.2)]:.2f}")
assert lost[sizes.index(0.02)] > 1 > 0.05 > errors.median("bfloat16") and lost[-1] < 0.5

# %% [markdown]
# At 003's learning rate, merging into NF4 threw away most of what had been learnt, though ΔW was not even small there.
# So keep the adapter beside the 4-bit weight, or merge into 16 bits. "Refit" is a third way: quantize W + ΔW and fit a new
# adapter of the same rank to what the rounding took (`handtuned.nn.merge`); the adapter stays, so nothing is won but a
# better base for it. The library refuses to merge into NF4 unless asked to dequantize.

# %% [markdown]
# ## Exercise 10.3: what merging into NF4 loses
#
# Write `merge_error(q, delta)`: the error of putting W + ΔW back into NF4, relative to ‖ΔW‖, where W is what q decodes to.

# %%
def merge_error(q, delta):
    raise NotImplementedError


lessons.check("10.3", merge_error);

# %% [markdown]
# ## Exercise 10.4: a QLoRA layer of your own kernels
#
# The last exercise of the ladder: bring your kernels of lessons [07](07_low_rank_updates.ipynb) (07.5, 07.6, 07.7) and
# [09](09_four_bits.ipynb) (09.4), and write `QLoRA`, the Function of 07.7 with a W that lies in NF4. forward dequantizes it,
# multiplies, and lets it go; backward dequantizes it a second time. (A cell that begins with `%%writefile my_kernels.py`
# keeps kernels in a file, from which any lesson imports them.)
#
# q is an `NF4Tensor`: `q.packed`, the scales' codes `q.absmax`, `constants, table, offset, nested_block = q.nested`,
# `q.shape`, `q.block_size`. The levels are `NF4_CODE`. The checker counts the bytes that stay, and trains a layer.

# %%
class QLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, A, B, scale):
        raise NotImplementedError

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError  # return dx, None, dA, dB, None


lessons.check("10.4", QLoRA.apply);

# %% [markdown]
# ## 8. One row at a time: the kernel
#
# Generating text multiplies one row x by every weight. Then the time is that of reading W, and reading codes costs about
# a quarter of reading fp16. With many rows, on a GPU, a dense W pays: it is made once and used by all. In between, tiles of W
# are decoded beside the tensor cores ("fused"). On a GPU the library measures the possible ways once for each kind of size
# and keeps the fastest; elsewhere a table decides by the number of rows M (CPUs have their own way, see below):

# %%
source(nf4_matmul.plan, first="tensor_cores, rows")
for name, way in runtime.FIXED.items():
    if name.startswith("nf4"):
        print(f"{name}: {way}, where nothing can be measured")
rows = (1, 16, 64, 1024)
for M in rows:
    streamed, dense = 0.516, 0.516 + 2 + 2  # bytes per weight: codes read; or codes read, fp16 written, fp16 read
    print(f"M = {M:4}: FLOPs per byte moved for W: streamed {2 * M / streamed:7,.1f}   through a dense copy {2 * M / dense:7,.1f}")

# %% [markdown]
# Why not stream for every M? On a GPU y is made in tiles by many programs that do not share what they decode: each tile
# of rows decodes all of W again, with the units that should keep the tensor cores fed. On a CPU there are no such units to
# wait for. A core decodes a piece of W into its cache with a few instructions, and every row of x meets it there, so the
# decoding costs the less the more rows there are; and with few rows, when the time is that of reading W, codes are an
# eighth of fp32. So on a CPU with AVX2 or AVX-512 (one register of which holds the 16 levels, 16 × 32 bits) the product
# decodes as it goes for *every* M, and W is never dense. It is written in C (`kernels/nf4_cpu.c`). Elsewhere W is made dense
# for one product. This notebook interprets kernels, so we ask a fresh Python which way it goes, and what torch's tensors take
# beside y (the piece of W in the cache is C's own, and not counted):

# %%
QUESTION = """
import torch
from handtuned.kernels.nf4_matmul import plan
from handtuned.nn.live_memory import LiveMemory
from handtuned.quant import NF4Linear
torch.manual_seed(0)
layer = NF4Linear.from_linear(torch.nn.Linear(512, 512, bias=False))
dense = layer.dequantize()
for M in (1, 64, 4096):
    x = torch.randn(M, 512)
    layer(x)
    with LiveMemory() as live:
        y = layer(x)
    off = ((y - dense(x)).norm() / y.norm()).item()
    beside = live.peak_added - y.nbytes
    print(f"M = {M:4}: way {plan(x, layer.quantized)!r}, off by {off:.0e} from a dense weight, {beside:,} bytes beside y")
"""
environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "HANDTUNED_BACKEND")}
done = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, env=environment)
print(done.stdout or done.stderr)

# %% [markdown]
# Now the kernel for a few rows, here one. **Math**: y[n] = Σₖ x[k] · level[code[n, k]] · scale[n, k // 64]. Within a block the
# scale is constant, so it can wait until 64 products are summed. **On four numbers**, with blocks of two:

# %%
x4 = np.array([1.0, 2.0, 3.0, 4.0])
codes4, scales4 = np.array([9, 2, 15, 4]), np.array([0.5, 2.0])
level4 = NF4_CODE.numpy()[codes4]
print("decode, then multiply:     ", (level4 * scales4.repeat(2)) @ x4)
print("multiply, sum, then scale: ", ((level4 * x4).reshape(2, 2).sum(1) * scales4).sum())

# %% [markdown]
# **In torch**: `x @ q.dequantize().t()`. **In Triton**: a program owns 32 rows of W and a part of K, each of its warps a
# slice of that. It reads 32-bit words of eight codes; a byte picks both of its values from a table of pairs; a block of 64 is
# multiplied, and only the sum is scaled. The parts of a row go to memory, and the program that comes last adds them in their
# order. (The shapes say which thread holds what, so that no value has to change threads: the file's first lines explain it.)

# %%
source(nf4_stream._stream_kernel, first="for first in range(start, stop, SLICES)", last="acc += _product")
fig, (w_axis, x_axis, y_axis) = figure(7.5, 2.2, columns=3, width_ratios=(8, 8, 3))
who_reads(w_axis, [[2 * (n // 2) + k // 4 for k in range(8)] for n in range(6)], "codes of W (N, K), 8 per word: read by")
who_reads(x_axis, [[-1] * 8], "x (1, K): read by every second program")
who_reads(y_axis, [[2 * (n // 2) + 1] for n in range(6)], "y: the last")
show(fig, alt="W as 6 rows of words: two programs share each pair of rows, the first with the left half, the second with the "
     "right half. Half of x is read by every second program. y: two numbers are written by whichever of two comes last, here "
     "the second.")  # fmt: skip

# %%
forced = os.environ.pop("HANDTUNED_BACKEND", None)  # from here the real kernel runs, interpreted on a CPU
torch.manual_seed(0)
place = "cuda" if gpu() else "cpu"
q = quantize_nf4(torch.randn(96, 128, device=place))
x, S, B = torch.randn(1, 128, device=place), torch.randn(1, 4, device=place), torch.randn(96, 4, device=place)
way = nf4_matmul.plan(x, q, dropout=False)
y = nf4_matmul.quantized_product(way, x, q, None, S, None, B, 2.0)
if forced:
    os.environ["HANDTUNED_BACKEND"] = forced
wanted = x.double() @ q.dequantize().double().t() + 2 * S.double() @ B.double().t()
error = ((y - wanted).norm() / wanted.norm()).item()
print(f"one row through 96 × 128 with an adapter: way {way!r}, error against fp64 {error:.0e}")
assert error < 1e-5

# %%
if gpu():
    from handtuned.harness import compare, table

    q = quantize_nf4(torch.randn(4096, 4096, device="cuda"))
    W, x = q.dequantize(torch.float16), torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    S, B = x.new_zeros(1, 8), x.new_zeros(4096, 8)
    ways = {"nf4 streamed": lambda: nf4_stream.nf4_stream(x, q, None, S, B, 1.0), "fp16": lambda: x @ W.t()}
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(compare(ways, device="cuda"), ours="nf4 streamed"))
else:
    skipped("one row through 4,096 × 4,096: codes streamed beside fp16 weights")

# %% [markdown]
# ## What to remember
#
# - Frozen codes need no gradient of their own; dx needs the weight, which is decoded a second time and never kept.
# - QLoRA's states for a 1.5B model are some 1.3 GB: count scales, 16-bit embeddings and the adapters' gradients too.
# - Double quantization saves 0.37 bit per parameter, no more.
# - A usual ΔW is smaller than the gaps between NF4 levels, and merging into NF4 rounds it away. Keep it beside the codes, or merge into 16 bits.
#
# On a real model: `handtuned finetune --method qlora`.
#
# Next: [11. How do many machines share one model?](11_many_machines.ipynb)
