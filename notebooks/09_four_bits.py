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
# # 09. How do 4 bits hold a weight?
#
# Four bits have 16 patterns. So a weight stored in 4 bits is one of 16 numbers, and everything depends on *which* 16
# and on how they are scaled to the weights at hand. This lesson builds two such schemes by hand, looks at where NF4's
# odd levels come from, cuts the cost of the scales to about a quarter, reads the kernel that undoes it all, and ends with the
# study documents' last question: what has this to do with product quantization?
#
# Some words. To **quantize** is to round to a small set of levels; a level's number is its **code**; the table of
# levels is the **codebook**. A group of neighbouring weights that share a scale is a **block**. The **relative error**
# is ‖w′ − w‖ / ‖w‖: the root of the summed squares of all errors, over that of all weights.
#
# You need lesson [02](02_writing_a_kernel.ipynb) for the kernel words. The documents: 003 (QLoRA diary), 004 (LoRA
# lesson).
#
# Terms: quantization 量化, codebook 码本, scale 缩放因子, zero point 零点, quantization block 量化块, double quantization 双重量化, NF4 (4-bit NormalFloat) 4 位正态浮点, product quantization 乘积量化, k-means k 均值聚类

# %%
import os

import numpy as np
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"  # a kernel can be interpreted on the CPU …
    os.environ["HANDTUNED_BACKEND"] = "torch"  # … but only where a cell asks for it: references are much faster

import handtuned
from handtuned import lessons
from handtuned.kernels import nf4
from handtuned.kernels.nf4_quantize import quantize_scales
from handtuned.kernels.runtime import tl, triton  # Triton, or stand-ins where it cannot be installed
from handtuned.lessons import (
    ACCENT,
    GREYS,
    bit_row,
    claim,
    figure,
    gpu,
    show,
    skipped,
    source,
    stacked,
    who_reads,
)
from handtuned.quant import (
    NF4_CODE,
    dequantize_affine,
    dequantize_nf4,
    dynamic_map,
    normal_quantile_levels,
    quantize_affine,
    quantize_nf4,
)

np.set_printoptions(precision=4, suppress=True, linewidth=110)


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


# %% [markdown]
# ## 1. Evenly spaced levels
#
# The textbook scheme, which 003 describes: spread 16 levels evenly from the smallest to the largest weight. One
# step is scale = (max − min) / 15. 003 takes W = [0.123, −0.456, 0.789, −0.234] and prints the codes [7, 2, 15, 4].
# **Write down your guess**: which code must the smallest weight get, and which the largest?

# %%
lessons.guess("09.a", "which codes do the smallest and the largest weight get?")
W = np.array([0.123, -0.456, 0.789, -0.234], dtype=np.float32)
scale = (W.max() - W.min()) / 15
zero_point = W.min()  # "the zero point", in 003's formula: the value that code 0 stands for
codes = np.round((W - zero_point) / scale).astype(int)
print(f"scale {scale:.3f}, zero point {zero_point:.3f}, codes {codes.tolist()}, decoded {codes * scale + zero_point}")

q = quantize_affine(torch.from_numpy(W), bits=4, group_size=4)
nf4_of_W = quantize_nf4(torch.from_numpy(W), double_quant=False)
print("library:", q.codes.tolist(), f"scale {q.scale.item():.3f}", "| NF4 keeps one constant per block:", nf4_of_W.absmax)
lessons.measured("09.a", f"{codes.min()} and {codes.max()}")
claim(
    50,
    f"scale {scale:.3f} is right and so is the range 0 to 15, but 003's own formula gives {codes.tolist()}: the smallest "
    "weight always has code 0. What it calls zero_point is min(W). And NF4, which the document is about, has neither: it "
    f"divides by the largest magnitude ({nf4_of_W.absmax.item():.3f}) and looks the result up in a codebook.",
    codes.tolist() == [7, 0, 15, 3] == q.codes.tolist() and round(float(scale), 3) == 0.083,
)

# %% [markdown]
# ## 2. NF4, on the same four numbers
#
# NF4 keeps one constant per block: **absmax**, the largest magnitude. Weights divided by it lie in [−1, 1]. There the 16
# levels of NF4 wait, at fixed and uneven places; the nearest one wins. Decoding multiplies the level by absmax.

# %%
levels = NF4_CODE.numpy()
absmax = np.abs(W).max()
scaled = W / absmax
codes = np.abs(scaled[:, None] - levels[None, :]).argmin(axis=1)
print("levels ", levels)
print("scaled ", scaled)
print("codes  ", codes, " decoded", levels[codes] * absmax)
in_003 = np.array([7, 2, 15, 4])
print(f"003 prints {in_003}: {(in_003 == codes).sum()} of 4 are NF4's codes, though its text describes the other scheme")

# %% [markdown]
# ## Exercise 09.1: one block of NF4
#
# Write `quantize_block(x, levels)` for one block: return the codes (uint8) and absmax. Think of a
# block of zeros.

# %%
def quantize_block(x, levels):
    raise NotImplementedError


lessons.check("09.1", quantize_block);

# %% [markdown]
# Memory has no half bytes, so two codes share one: the first of a pair in the high four bits (the **high nibble**),
# the second in the low four. An odd count is filled up with code 7, the level that is exactly zero.

# %%
packed = (codes[0::2] * 16 + codes[1::2]).astype(np.uint8)
print("by hand:", [f"{byte:08b}" for byte in packed], "  library:", [f"{b:08b}" for b in nf4_of_W.packed.tolist()])
assert packed.tolist() == nf4_of_W.packed.tolist()

# %% [markdown]
# ## Exercise 09.2: two codes per byte
#
# Write `pack(codes)`.

# %%
def pack(codes):
    raise NotImplementedError


lessons.check("09.2", pack);

# %% [markdown]
# ## 3. Where do the sixteen levels come from?
#
# A code wastes nothing if every level is used equally often. Weights of trained networks are close to normally
# distributed. So put the levels at equally likely places of the normal distribution, at its **quantiles**, and scale
# them so that the outermost are ±1. Zero must be a level (padding and pruned weights stay zero), so one side gets eight
# levels and the other seven. The library derives them, and they are the published ones to the last bit:

# %%
source(normal_quantile_levels, first="outermost, half")
derived = normal_quantile_levels()
torch.manual_seed(0)
blocks = torch.randn(1 << 14, 64)
nearest = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1, 1).sub(NF4_CODE).abs().argmin(1)
used = nearest.bincount(minlength=16) / nearest.numel()
print(f"equally likely places, but not equally used: the largest weight of a block, not a fixed quantile, becomes ±1. On normal weights a level\n"
      f"gets {used.min():.1%} to {used.max():.1%} of the codes, which then carry {-(used * used.log2()).sum():.2f} of their 4 bits")
print("equal to NF4_CODE, bit for bit:", torch.equal(derived, NF4_CODE))

# %%
fig, ax = figure(7, 2.6)
grid = np.linspace(-1, 1, 400)
spread = 1.848  # the outermost quantile, in standard deviations
density = np.exp(-((grid * spread) ** 2) / 2)
ax.fill_between(grid, density, color=GREYS[3], label="normal distribution")
ax.vlines(levels, 0, np.exp(-((levels * spread) ** 2) / 2), color=ACCENT, linewidth=1.6, label="levels of NF4")
even = np.linspace(-1, 1, 16)
ax.plot(even, np.full(16, -0.08), "|", color=GREYS[0], markersize=9, label="evenly spaced levels")
ax.set(xlabel="weight / absmax", yticks=[], ylim=(-0.16, 1.3))
ax.spines["left"].set_visible(False)
ax.legend(loc="upper left", ncols=3)
show(fig, alt="A bell curve with sixteen vertical lines, dense near zero and wide apart towards ±1, and below them "
     "sixteen evenly spaced ticks.")  # fmt: skip

# %% [markdown]
# ## 4. The bytes
#
# A weight now costs half a byte for its code, and its share of the block's scale. With an fp32 scale for 64
# weights that is another half bit. **Double quantization** stores the scales themselves in 8 bits: they are
# quantized in blocks of 256, with one fp32 constant each, after their mean has been taken off. (All scales are
# positive; without taking off the mean, half of the signed codes would be wasted.)
#
# Why not larger blocks, which would make scales cheaper still? Because absmax grows with the block: one large weight
# then pushes all the others of its block towards zero, where they share few levels. 64 is a compromise.

# %%
torch.manual_seed(0)
weight = torch.randn(1024, 1024) * 0.02
single, double = (quantize_nf4(weight, double_quant=nested) for nested in (False, True))
for name, q in (("fp32 scales", single), ("double quantization", double)):
    print(f"{name:20} {q.nbytes:,} bytes, {8 * q.nbytes / weight.numel():.4f} bits per weight")

fig, (bits, bars_) = figure(7.5, 2.9, columns=2, width_ratios=(3, 2))
first = double.packed[0].item()
bit_row(bits, f"{first:08b}", {"weight 0": 4, "weight 1": 4}, y=2, label="one of 32 bytes")
bit_row(bits, f"{double.absmax[0].item():08b}", {"code of the scale": 8}, y=1, label="for 64 weights")
word = double.nested.absmax[0].view(torch.int32).item() & 0xFFFFFFFF
bit_row(bits, f"{word >> 24:08b}", {"fp32 constant, its first 8 of 32 bits": 8}, y=0, label="for 16,384 weights")
bits.set_xlim(-7.5, 8.5)
counts = {
    "codes": [8 * q.packed.numel() / weight.numel() for q in (single, double)],
    "scales": [8 * q.absmax.numel() * q.absmax.element_size() / weight.numel() for q in (single, double)],
    "constants": [0.0, 32 * double.nested.absmax.numel() / weight.numel()],
}
stacked(bars_, ["fp32 scales", "double"], counts, "bits per weight", form="{:.3f}")
show(fig, alt="Left: the bits of one packed byte with two codes, of one 8-bit scale code, and of the fp32 constant of "
     "256 scales. Right: 4.5 bits per weight with fp32 scales, 4.127 with double quantization.")  # fmt: skip

# %% [markdown]
# ## 5. Which scheme errs least?
#
# 003 calls NF4 the format designed for the weights of neural networks. Compare it with two evenly spaced schemes:
# **absmax-int4** (codes −7 … 7 times absmax / 7: one constant per block, like NF4) and **affine** (two constants per block,
# section 1). **Write down your guess** of the order on normally distributed weights, and on uniform ones.

# %%
lessons.guess("09.b", "the order of the errors on normal weights, and on uniform ones, from the best?")
def absmax_int4(x, block=64):
    blocks = x.view(-1, block)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / step).round() * step).view(x.shape)


SCHEMES = {
    "NF4": lambda x: dequantize_nf4(quantize_nf4(x, double_quant=False)),
    "absmax-int4": absmax_int4,
    "affine, 64": lambda x: dequantize_affine(quantize_affine(x, group_size=64)),
    "affine, 128": lambda x: dequantize_affine(quantize_affine(x, group_size=128)),
}
BITS = {"NF4": 4.5, "absmax-int4": 4.5, "affine, 64": 5.0, "affine, 128": 4.5}  # constants as fp32
torch.manual_seed(0)
count = 1 << 18
samples = {
    "normal": torch.randn(count),
    "uniform": torch.rand(count) * 2 - 1,
    "Laplace": torch.distributions.Laplace(0, 1).sample((count,)),
}
error = {name: {scheme: relative_error(run(x), x) for scheme, run in SCHEMES.items()} for name, x in samples.items()}
print(f"{'':10}" + "".join(f"{scheme:>14}" for scheme in SCHEMES))
print(f"{'bits':10}" + "".join(f"{BITS[scheme]:14.1f}" for scheme in SCHEMES))
for name, row in error.items():
    print(f"{name:10}" + "".join(f"{value:14.4f}" for value in row.values()))
lessons.measured(
    "09.b",
    "; ".join(f"{name}: " + ", ".join(sorted(error[name], key=error[name].get)) for name in ("normal", "uniform")),
)

# %% [markdown]
# Read the rows together with the bits. On normal weights affine is a little better than NF4, but it pays for a second
# constant; at equal bits it is worse. On uniform weights NF4 spends levels near zero that nobody needs there. With heavy
# tails, as in Laplace's distribution, the evenly spaced schemes suffer most: the few large weights set the step for all.
#
# Where is the crossing? Take a family of distributions with density ∝ exp(−|w|^β). β = 1 is Laplace, β = 2 is normal, and
# large β comes close to uniform.

# %%
shapes = np.array([1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 16.0])
rng = np.random.default_rng(0)
curves = {scheme: [] for scheme in SCHEMES}
for beta in shapes:
    size = rng.gamma(1 / beta, size=count // 2) ** (1 / beta)
    x = torch.from_numpy((size * rng.choice([-1, 1], size=size.shape)).astype(np.float32))
    for scheme, run in SCHEMES.items():
        curves[scheme].append(relative_error(run(x), x))

fig, ax = figure(7, 2.8)
styles = {"NF4": (ACCENT, "-", "o"), "absmax-int4": (GREYS[1], ":", "s"), "affine, 64": (GREYS[0], "--", "^"),
          "affine, 128": (GREYS[2], "-.", "v")}  # fmt: skip
for scheme, values in curves.items():
    color, line, marker = styles[scheme]
    ax.plot(shapes, values, color=color, linestyle=line, marker=marker, markersize=4,
            label=f"{scheme} ({BITS[scheme]:g} bits)")  # fmt: skip
ax.set(xscale="log", xlabel="β: heavier tails ←   → closer to uniform", ylabel="relative error", ylim=(0, None))
ax.set_xticks([1, 2, 4, 8, 16], ["1 Laplace", "2 normal", "4", "8", "16"])
ax.minorticks_off()
ax.legend()
show(fig, alt="Relative error of four 4-bit schemes from heavy-tailed to nearly uniform weights. NF4 is flat near 0.09; "
     "the evenly spaced schemes are worse for heavy tails and better for nearly uniform weights.")  # fmt: skip
normal, uniform = error["normal"], error["uniform"]
claim(
    53,
    f"normal weights: NF4 {normal['NF4']:.3f}, absmax-int4 {normal['absmax-int4']:.3f}, affine {normal['affine, 64']:.3f} "
    f"with two constants in blocks of 64 and {normal['affine, 128']:.3f} at NF4's bits. Uniform weights: affine "
    f"{uniform['affine, 64']:.3f}, NF4 {uniform['NF4']:.3f}. NF4 is made for normal weights, and there it is the best for "
    "one constant per block; for other shapes it is not.",
    normal["affine, 64"] < normal["NF4"] < min(normal["absmax-int4"], normal["affine, 128"])
    and uniform["affine, 64"] < uniform["NF4"],
)

# %% [markdown]
# ## 6. What does double quantization cost in accuracy?
#
# 003 says: little, because the error of the scales "is shrunk by the scale". **Write down your guess**: if every
# scale of a block is off by 5 %, by how much are its weights off?
#
# First the mechanism, on four scales: take off the mean, divide by the largest remainder, look up the nearest of 256
# values. The map is a small float format of its own: fine near zero, where centred scales crowd.

# %%
lessons.guess("09.c", "every scale off by 5 %: by how much are the weights off?")
scales = torch.tensor([0.050, 0.062, 0.048, 0.056])
centred = scales - scales.mean()
largest = centred.abs().max()
table = dynamic_map()
codes = (centred[:, None] / largest - table[None, :]).abs().argmin(1)
decoded = table[codes] * largest + scales.mean()
print("codes", codes.tolist(), " decoded", decoded.numpy(), " off by", ((decoded - scales) / scales).numpy())
print("library:", quantize_scales(scales, table)[0].tolist())

scale_error = relative_error(nf4.decode_scales(double.absmax, double.nested), single.absmax)
with_single, with_double = (relative_error(q.dequantize(), weight) for q in (single, double))
decoded = single.dequantize()
shaken = {}
for off in (0.0, 0.005, 0.02, 0.05, 0.1):
    sign = torch.randint(0, 2, (single.absmax.numel(), 1)) * 2.0 - 1
    blocks = decoded.view(-1, 64)
    moved = blocks * (1 + off * sign)
    shaken[off] = relative_error(moved, blocks), relative_error(moved.view_as(weight), weight)
for off, (alone, total) in shaken.items():
    print(f"scales off by {off:5.1%}: weights move by {alone:.4f}, total error {total:.4f}, "
          f"√(NF4² + scale²) = {np.hypot(with_single, off):.4f}")  # fmt: skip
lessons.measured("09.c", f"{shaken[0.05][0]:.1%}")
claim(
    52,
    f"nothing shrinks it: scales off by 5 % put weights off by {shaken[0.05][0]:.1%}. But double quantization puts "
    f"scales off by only {scale_error:.2%}, and independent errors add as squares: NF4 errs {with_single:.4f} without "
    f"it, {with_double:.4f} with it.",
    abs(shaken[0.05][0] - 0.05) < 1e-4 and abs(with_double - with_single) < 5e-4 and round(with_double, 3) == 0.092,
)

# %% [markdown]
# ## 7. The kernel
#
# Decoding happens in every forward and backward pass of QLoRA, so it should run at the speed of memory. **Math**:
# y[i] = level[code[i]] · scale[i // 64]. **On four numbers**, from two bytes:

# %%
two_bytes = nf4_of_W.packed.numpy()
unpacked = np.stack([two_bytes >> 4, two_bytes & 15], axis=1).reshape(-1)  # high nibble first
print("bytes", two_bytes, "→ codes", unpacked, "→", levels[unpacked] * nf4_of_W.absmax.numpy())

# %% [markdown]
# **In torch**: a byte has only 256 values, so a table of 256 *pairs* of levels answers for both codes at once, and a
# pair of fp32 values is one int64. The loop goes tile by tile so that everything stays in cache. (Outside of these lessons
# a CPU runs neither this nor the kernel to make fp32 or bf16, if there was a compiler at installation: `kernels/nf4_cpu.c` does the
# same in one pass, and a test holds it to the reference's bits. There the 16 levels lie in *one* 512-bit register.)

# %%
source(nf4.nf4_dequantize_tiled, first="table = pair_table", last="tile.copy_(")

# %% [markdown]
# **In Triton** the table is gathered from on chip (`tl.gather`), and has only the 16 levels. Shared memory gives each of 32
# threads a number at once if these lie in different banks, or are one and the same; 16 levels fill 16 banks, so no two ever
# collide. 256 pairs would: threads wait for one another, though each asks half as often. A program makes 8,192 values. It
# reads 4,096 bytes of codes, 128 scale codes and one constant of double quantization (256 scales share one), and writes 8,192
# values, nobody else's. All offsets inside a program are small, so only its start is a 64-bit number. Everything that may lie
# beyond the end has a mask.

# %%
source(nf4._nf4_dequantize, first="offs_r =")

# %%
fig, axes = figure(7.5, 3.2, rows=4)
VALUES, SHARE = 8, 4  # a small copy: 8 values per program, 4 values per block, a constant for 4 scales
values = 22
owner = [i // VALUES for i in range(24)]
who_reads(axes[0], [2 * i // VALUES for i in range(12)], "bytes of codes (two values each): read by program", outside=11)
who_reads(axes[1], [SHARE * j // VALUES for j in range(6)], "scale codes (one per block): read by program")
who_reads(axes[2], [-1, -1], "constants, offset, tables: read by every program that needs them")
who_reads(axes[3], owner, "out: written by program; crossed: beyond the end, masked", outside=values)
show(fig, alt="Four rows of boxes numbered by program. Program 0 reads the first four bytes of codes and the first two "
     "scale codes and writes the first eight values, and so on; the last program hangs over the end and is masked.")  # fmt: skip

packed_bytes, scale_bytes = 0.5, 1 / 64 + 4 / (64 * 256)
for name, out in (("fp16 or bf16", 2), ("fp32", 4)):
    print(f"to {name}: {packed_bytes + scale_bytes:.3f} bytes per value in, {out} out; {out / (packed_bytes + scale_bytes):.1f} "
          "bytes are written for each that is read")  # fmt: skip

# %%
forced = os.environ.pop("HANDTUNED_BACKEND", None)  # from here the real kernel runs, interpreted on a CPU
torch.manual_seed(0)
sample = quantize_nf4(torch.randn(257, 65, device="cuda" if gpu() else "cpu"))  # 16,705 values: the tail is masked
by_kernel = dequantize_nf4(sample)
print("dequantized by:", handtuned.kernels.backend(sample.packed))
if forced:
    os.environ["HANDTUNED_BACKEND"] = forced
reference = nf4.nf4_dequantize_reference(sample, sample.dtype)
assert torch.equal(by_kernel, reference)
print("kernel and reference agree bit for bit on", tuple(sample.shape))

# %% [markdown]
# ## Exercise 09.3: the dequantize kernel
#
# Write the kernel yourself, in its simplest form: fp32 scales, each program makes `BLOCK` values, one
# at a time in the sense that value i looks at byte i // 2. The checker puts NaNs around every buffer, so what is read or
# written out of bounds will be seen. Any size may come: the last block may be short, the last byte half full.

# %%
@triton.jit
def dequantize_kernel(packed_ptr, absmax_ptr, levels_ptr, out_ptr, N, block_size, BLOCK: tl.constexpr):
    pass  # offs = …; load the byte; choose the nibble; look the level up; multiply by the scale; store


def dequantize(packed, absmax, levels, out, block_size):
    raise NotImplementedError  # dequantize_kernel[(…,)](packed, absmax, levels, out, out.numel(), block_size, BLOCK=128)


lessons.check("09.3", dequantize);

# %% [markdown]
# ## Exercise 09.4: dequantize with double quantization
#
# This is the third kernel that the course is about. The scales come as 8-bit codes themselves, and are decoded in the kernel, never written out (section 4):
#
# $$\mathrm{scale}_j = \mathrm{table}[c_j] \cdot \mathrm{constant}[\lfloor j / \mathit{nested\_block} \rfloor] + \mathrm{offset}$$
#
# Write `dequantize_nested(packed, codes, constants, table, offset, levels, out, block_size, nested_block)`: `codes` is uint8, one for each block; `table` holds 256 fp32 values; `offset` has one element.

# %%
@triton.jit
def nested_kernel(packed_ptr, codes_ptr, constants_ptr, table_ptr, offset_ptr, levels_ptr, out_ptr, N, block_size, nested_block, BLOCK: tl.constexpr):
    pass  # 09.3's kernel; only where the scale comes from is new


def dequantize_nested(packed, codes, constants, table, offset, levels, out, block_size, nested_block):
    raise NotImplementedError


lessons.check("09.4", dequantize_nested);

# %% [markdown]
# ## Exercise 09.5: quantize
#
# And back. Write `quantize(x, levels, packed, absmax, block_size)` for a vector x of fp32 numbers: absmax (one for each block) and packed codes, the nearest level for each. An odd count is filled up with code 7, and a block of zeros has absmax 0 and codes 7. Two codes share a byte: who writes it? Two programs that each fill a nibble would race.

# %%
@triton.jit
def quantize_kernel(x_ptr, levels_ptr, packed_ptr, absmax_ptr, N, BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr):
    pass  # one block: the largest magnitude, a count of borders for each value, two codes a byte


def quantize(x, levels, packed, absmax, block_size):
    raise NotImplementedError


lessons.check("09.5", quantize);

# %% [markdown]
# **The last rung.** The library's kernels compute the same, to the bit. Beyond yours, dequantize writes 16 bytes per thread and looks codes up in 16 banks of shared memory that never collide (section 7, and 02.8); quantize searches no 15 borders: 32 cells hold one border at most, so two look-ups replace the search; it takes its maximum over the *bits*, so that NaN cannot hide. What that is worth, counted in the emulator on 65,536 values:

# %%
from handtuned.kernels import nf4_quantize as library

values = torch.randn(65536)
with lessons.emulated("A100") as emulated:
    packed, absmax = library.nf4_quantize(values, 64)
    nf4.nf4_dequantize(nf4.NF4Weight(packed, absmax, values.shape, torch.float32, 64), torch.float16)
for launch in emulated.launches:
    counters = launch.counters
    print(f"{launch.name:16} {32 * counters.warp_instructions / values.numel():5.1f} instructions per value, "
          f"{counters.shared.per_request:.2f} wavefronts per request of shared memory, "
          f"{(counters.dram_read_bytes + counters.dram_written_bytes) / values.numel():.3f} bytes per value")  # fmt: skip

# %%
if gpu():
    from handtuned.harness import compare

    large = quantize_nf4(torch.randn(8192, 8192, device="cuda"))
    out = torch.empty(8192, 8192, device="cuda", dtype=torch.float16)
    seconds = compare({"nf4": lambda: dequantize_nf4(large, torch.float16, out)}, device="cuda")["nf4"]["median"]
    moved = large.nbytes + out.numel() * 2
    print(f"{torch.cuda.get_device_name()}: {seconds * 1e6:.0f} µs, {moved / seconds / 1e9:,.0f} GB/s")
else:
    skipped("the dequantize kernel's time and the bytes per second that it moves")

# %% [markdown]
# ## 8. NF4, LoRA and product quantization
#
# 004 ends with a question: how are LoRA and PQ related? **Product quantization** (Jégou et al. 2011) comes from vector
# search. Cut each vector into short pieces, find by k-means a codebook of 256 typical pieces, and store for each piece the
# number of its nearest entry: one byte. (**K-means**: give each piece to its nearest entry, move each entry to the mean
# of its pieces, repeat.) **Write down your guess**: a 512 × 512 matrix of normal numbers is to be stored in
# about 4 bits per number. How far off are NF4, PQ with pieces of 2 numbers, and the best low-rank matrix? And if the
# matrix is a planted update of rank 8?

# %%
lessons.guess("09.d", "how far off are NF4, PQ and low rank: on normal numbers, and on an update of rank 8?")
def k_means(points, entries, rounds=20, seed=0):
    """A codebook (entries, dim) for points (n, dim), by Lloyd's algorithm."""
    draws = torch.Generator().manual_seed(seed)
    book = points[torch.randperm(len(points), generator=draws)[:entries]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, book).argmin(1)
        total = torch.zeros_like(book).index_add_(0, nearest, points)
        members = torch.bincount(nearest, minlength=entries)
        book = torch.where(members[:, None] > 0, total / members.clamp(min=1)[:, None], book)
    return book


def product_quantize(matrix, dim, entries):
    """(matrix as PQ stores it, codebook, bytes)."""
    pieces = matrix.reshape(-1, dim)
    book = k_means(pieces[:: max(1, len(pieces) // 16384)], entries)
    nearest = torch.cdist(pieces, book).argmin(1)
    size = len(pieces) * np.log2(entries) / 8 + book.numel() * 4
    return book[nearest].view(matrix.shape), book, size


def low_rank(matrix, size):
    """(best matrix of a rank that takes `size` bytes as fp16 factors, its rank)."""
    rank = int(size // (2 * sum(matrix.shape)))
    U, s, Vt = torch.linalg.svd(matrix)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank], rank


torch.manual_seed(0)
matrices = {
    "normal W": torch.randn(512, 512),
    "ΔW of rank 8": torch.randn(512, 8) @ torch.randn(8, 512) / 8**0.5,
}
distance = {}
for name, matrix in matrices.items():
    stored = quantize_nf4(matrix)
    by_pq, book, pq_bytes = product_quantize(matrix, dim=2, entries=256)
    by_svd, rank = low_rank(matrix, stored.nbytes)
    distance[name] = {
        "NF4": relative_error(stored.dequantize(), matrix),
        "PQ": relative_error(by_pq, matrix),
        "SVD": relative_error(by_svd, matrix),
    }
    print(f"{name:14} NF4 {distance[name]['NF4']:.4f} ({stored.nbytes:,} B)   PQ {distance[name]['PQ']:.4f} "
          f"({pq_bytes:,.0f} B)   rank {rank} {distance[name]['SVD']:.2g} ({4 * rank * 512:,} B)")  # fmt: skip
lessons.measured(
    "09.d",
    "; ".join(f"{name}: " + ", ".join(f"{way} {value:.2g}" for way, value in row.items()) for name, row in distance.items()),
)

# %% [markdown]
# Look at the codebooks. PQ's 256 entries for pairs of weights lie where pairs are. NF4 codes each number of a pair for
# itself: its entries are a 16 × 16 grid of products. NF4 *is* product quantization with pieces of one number, a
# codebook that is fixed instead of learnt, and a scale for each block. Let k-means choose the 16 levels and see.

# %%
blocks = matrices["normal W"].view(-1, 64)
scaled = blocks / blocks.abs().amax(1, keepdim=True)
learnt = k_means(scaled.view(-1, 1)[::8], 16, rounds=60).sort(0).values
rounded = learnt[torch.cdist(scaled.view(-1, 1), learnt).argmin(1)].view(scaled.shape)
learnt_error = relative_error(rounded * blocks.abs().amax(1, keepdim=True), blocks)

_, book, _ = product_quantize(matrices["normal W"], dim=2, entries=256)
fig, (left, right) = figure(7.5, 3.3, columns=2)
step = NF4_CODE * blocks.abs().amax(1).mean()
left.scatter(*torch.cartesian_prod(step, step).t().numpy(), s=6, color=GREYS[0])
left.set_title("NF4: 16 × 16, at a block's usual scale")
right.scatter(*book.t().numpy(), s=6, color=ACCENT, marker="^")
right.set_title("PQ: 256 pairs found by k-means")
for ax in (left, right):
    ax.scatter(*matrices["normal W"].view(-1, 2)[:1500].t().numpy(), s=1, color=GREYS[3], zorder=0)
    ax.set(xlim=(-3.4, 3.4), ylim=(-3.4, 3.4), aspect="equal", xlabel="first weight", ylabel="second")
show(fig, alt="Two codebooks over a cloud of weight pairs. NF4's entries form a square grid that is dense along the "
     "axes; PQ's entries fill a disc, following the cloud.")  # fmt: skip
print("levels learnt by k-means:", learnt.flatten().numpy())
print("levels of NF4:           ", levels)
flat, planted = distance["normal W"], distance["ΔW of rank 8"]
claim(
    58,
    f"on a normal W at equal bytes: NF4 {flat['NF4']:.3f}, PQ {flat['PQ']:.3f}, low rank {flat['SVD']:.2f}. On a ΔW of rank 8: "
    f"NF4 {planted['NF4']:.3f}, PQ {planted['PQ']:.3f}, low rank {planted['SVD']:.0e}. PQ and NF4 code data that exist, LoRA "
    "learns an update that does not exist yet; each pays off where its structure is there. NF4 is PQ with pieces of one "
    f"number: 16 learnt levels would err {learnt_error:.4f}.",
    flat["NF4"] < 0.1 and flat["PQ"] < 0.1 and flat["SVD"] > 0.7 and planted["SVD"] < 1e-5 and planted["NF4"] > 0.05,
)

# %% [markdown]
# So the reader who answers "both look at a part of the space only" is half right. PQ divides the *coordinates* and
# looks at all of them; low rank keeps a few *directions* and drops the others. The two meet in QLoRA, the next lesson:
# NF4 holds the weights that are, low rank learns what is to be added.

# %% [markdown]
# ## What to remember
#
# - A 4-bit weight is a code, a codebook and a share of a scale: 4.127 bits with NF4 and double quantization.
# - NF4's levels are quantiles of the normal distribution. For normal weights with one constant per block they win.
# - Errors of scales are not shrunk. They are small, and they add as squares.
# - Decoding is limited by memory; the kernel reads half a byte and writes two or four.
#
# On a real model: `handtuned finetune` packs all linear layers into NF4 with double quantization first, and says what that saves.
#
# Next: [10. How does QLoRA train through 4 bits?](10_qlora.ipynb)
