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
# # 02. How do I write a kernel?
#
# A GPU is fast because it runs thousands of copies of one small program at the same time, each on its own piece of the data. Such a program is a **kernel**. This library's kernels are written in Triton, a language that looks like Python.
#
# In this lesson you read three kernels and write three. You need no GPU: Triton has an interpreter, which runs a kernel on the CPU, one copy after the other, with NumPy. It is slow, and it computes the same numbers.
#
# There is one trap, and it is the reason why our tests and exercises are built the way they are. A kernel that reads or writes outside of its tensors gets no error message.
#
# Terms: kernel 算子, program instance 程序实例, block 数据块, grid 网格, mask 掩码, pointer 指针, stride 步长, out of bounds 越界, reduction 归约, bandwidth 带宽

# %% [markdown]
# Triton decides whether to interpret at the moment a kernel is defined. So the switch must be set before anything that uses Triton is imported. If you forget, restart the kernel of the notebook.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import subprocess
import sys

import numpy as np
import torch
import triton
import triton.language as tl

from handtuned import lessons
from handtuned.lessons.canaries import check_canaries, guarded

# %% [markdown]
# ## One program, many copies
#
# Take the simplest job: add two vectors of $N$ numbers. In Python one would write a loop over all elements. A GPU has no use for a loop; it has many workers. So the work is cut into **blocks** of, say, four elements, and one copy of the program takes one block. The copies are called **program instances**, or simply programs. Each knows its own number, and nothing else distinguishes it from the others.
#
# In NumPy, with four programs played one after the other:

# %%
x = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], dtype=np.float32)
y = np.full(10, 100.0, dtype=np.float32)
out = np.zeros(10, dtype=np.float32)
BLOCK = 4


def add_program(pid):
    offs = pid * BLOCK + np.arange(BLOCK)  # which elements are mine
    mask = offs < len(x)  # which of them exist
    out[offs[mask]] = x[offs[mask]] + y[offs[mask]]
    print(f"program {pid}: elements {offs}, of which {mask.sum()} exist")


for pid in range(-(-len(x) // BLOCK)):  # 10 / 4, rounded up
    add_program(pid)
print(out)

# %% [markdown]
# Ten elements need three programs. The last block hangs over the end by two. Those two elements do not exist, and the **mask** keeps the program away from them.

# %%
fig, ax = lessons.figure(7, 1.2)
lessons.who_reads(ax, [i // BLOCK for i in range(12)], "which program reads which element of x", outside=10)
lessons.show(
    fig,
    alt="Twelve boxes in a row. Program 0 has elements 0 to 3, program 1 has 4 to 7, program 2 has 8 to 11, "
    "of which 10 and 11 are crossed out because the tensor ends at 10.",
)

# %% [markdown]
# ## The same in Triton
#
# A kernel gets **pointers**: the address of a tensor's first element. `x_ptr + offs` is a block of addresses, `tl.load` fetches what is there, `tl.store` writes. `tl.constexpr` marks what must be known when the kernel is compiled, such as the block's size (a power of two).
#
# A launch looks odd at first: `kernel[grid](arguments)`. The **grid** says how many programs to start, as a tuple.


# %%
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


def add(x, y, out):
    grid = (triton.cdiv(x.numel(), 64),)  # cdiv divides and rounds up
    add_kernel[grid](x, y, out, x.numel(), BLOCK=64)


a, b = torch.randn(1000), torch.randn(1000)
result = torch.empty(1000)
add(a, b, result)
print("largest difference from torch:", (result - (a + b)).abs().max().item())
assert torch.equal(result, a + b)

# %% [markdown]
# ## The trap
#
# **Prediction.** Leave the masks out, and add two vectors of ten elements with a block of 64. What happens? An error? A wrong result?


# %%
@triton.jit
def careless_add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(y_ptr + offs))


memory = torch.zeros(100)  # ten numbers for us, and ninety that belong to someone else
ours, others = memory[:10], memory[10:]
careless_add_kernel[(1,)](torch.ones(100)[:10], torch.ones(100)[:10], ours, 10, BLOCK=64)
print("ours:  ", ours.tolist())
print("others:", int((others != 0).sum()), "of the other numbers were overwritten")
assert torch.equal(ours, torch.full((10,), 2.0)) and (others != 0).sum() == 54

# %% [markdown]
# Our ten numbers are right. Nothing complains. And 54 numbers that belong to somebody else are gone. On a GPU it is the same: memory next to a tensor usually belongs to another tensor of the same process, and the mistake shows up later, elsewhere, or never.
#
# So tests cannot only look at the result. Miners once took canaries down with them, which noticed gas before people did. We put each tensor into the middle of a larger buffer and fill the rest with known values, the **canaries**. If one has changed afterwards, the kernel wrote out of bounds. Our canaries are NaNs, so that a value *read* out of bounds spoils the result as well.

# %%
guarded_out = guarded(10)
careless_add_kernel[(1,)](guarded(10, values=torch.ones(10)), guarded(10, values=torch.ones(10)), guarded_out, 10, BLOCK=64)
try:
    check_canaries("out", guarded_out)
except lessons.WrongAnswer as caught:
    print(caught)

# %% [markdown]
# ## Exercise 02.1: out = a·x + y
#
# Write a kernel for $a x + y$, where $a$ is a number and $x$, $y$ are vectors, and `axpy(a, x, y, out)`, which launches it. The checker tries lengths that are no multiple of anything, with canaries. (A number is passed to a kernel like a length: without a pointer.)


# %%
def axpy(a, x, y, out):
    raise NotImplementedError


lessons.check("02.1", axpy);

# %% [markdown]
# ## What does a kernel cost?
#
# Adding two numbers is nothing. Fetching them is not. For each element the add kernel moves 12 bytes: two loads and one store of 4 bytes. How many bytes a GPU can move in a second is its **bandwidth**; its arithmetic units could do many more additions in the time that the bytes take. A kernel like this is *bound by memory*. There is a floor for its time, bytes divided by bandwidth, and no cleverness gets below.
#
# The consequence: do as much as possible to a number while it is there. Three operations as three kernels read and write everything three times; **fused** into one kernel, once.

# %%
n = 2**24
operations = {"x · 2": (1, 1), "… + y": (2, 1), "… max 0": (1, 1)}  # (reads, writes) of each
separate = sum(reads + writes for reads, writes in operations.values()) * 4 * n
fused = (2 + 1) * 4 * n
fig, ax = lessons.figure(7, 1.5)
lessons.bars(ax, ["three kernels", "one fused kernel"], [separate / 1e6, fused / 1e6], "MB", accent=1)
lessons.show(
    fig,
    alt="Bytes moved for max(2x + y, 0) on 16.8 million elements: 470 MB as three kernels, 201 MB as one.",
)
print(f"{separate / fused:.2f} times less traffic")

# %% [markdown]
# ## SiLU: forward and backward
#
# The second kernel computes a function that today's language models use, **SiLU** ("sigmoid linear unit"):
#
# $$\mathrm{SiLU}(x) = x \cdot s, \qquad s = \frac{1}{1 + e^{-x}} .$$
#
# Four numbers in NumPy, then PyTorch's own as the **reference**, the result that the kernel must reproduce:

# %%
four = np.array([-4.0, -1.0, 0.0, 2.0], dtype=np.float32)
by_hand = four / (1 + np.exp(-four))
reference = torch.nn.functional.silu(torch.from_numpy(four))
print(by_hand, reference.numpy())
assert np.allclose(by_hand, reference.numpy(), rtol=1e-6)

# %% [markdown]
# The numbers may come as FP16, with three digits only (lesson 01). A kernel converts after the load, computes in FP32, and rounds once, when it stores. This costs nothing, because arithmetic is not what the time goes into.


# %%
@triton.jit
def silu_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    tl.store(out_ptr + offs, x / (1 + tl.exp(-x)), mask=mask)  # the store rounds to out's dtype


values = torch.linspace(-12, 12, 1000).half()
out = torch.empty_like(values)
silu_kernel[(triton.cdiv(1000, 128),)](values, out, 1000, BLOCK=128)
exact = torch.nn.functional.silu(values.double())
ours = (out.double() - exact).abs().max().item()
torchs = (torch.nn.functional.silu(values).double() - exact).abs().max().item()
print(f"largest error against FP64: our kernel {ours:.2e}, torch in FP16 {torchs:.2e}")
assert ours <= 2 * torchs

# %% [markdown]
# That last line is how the library's tests decide what is close enough: at most twice the error that PyTorch makes with the same number of bits.
#
# ## Exercise 02.2: SiLU, backward
#
# Training needs the derivative. Let $L$ be the loss, and `dy` the gradient of $L$ with respect to SiLU's output. Write `silu_backward(x, dy, dx)`, which launches a kernel that writes the gradient with respect to $x$ into `dx`. Differentiate $x \cdot s(x)$ first; $s' = s (1 - s)$.


# %%
def silu_backward(x, dy, dx):
    raise NotImplementedError


lessons.check("02.2", silu_backward);

# %% [markdown]
# ## An elementwise kernel of the library
#
# Here is the inner part of a kernel that lesson 03 uses: it divides gradients by a scale. Load, mask, convert, compute, store: you have seen all of it. `if … is not None` is decided when the kernel is compiled.

# %%
from handtuned.kernels import unscale

lessons.source(unscale._unscale_tile)
lessons.source(unscale.unscale_reference_)

# %% [markdown]
# Below it stands its reference, in plain PyTorch. Each kernel file of the library holds both, and the tests compare them on lengths like 1, 63, 64, 65 and 1000.
#
# ## Rows: a program that reduces
#
# So far no element needed another. **Softmax** turns a row of numbers into probabilities, and there every output needs the whole row:
#
# $$p_i = \frac{e^{x_i}}{\sum_j e^{x_j}} .$$
#
# **Prediction.** What does this give in FP32 for the row (1000, 1001)?

# %%
row = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
print("four numbers:      ", np.exp(row) / np.exp(row).sum())
large = row + 1000
with np.errstate(all="ignore"):
    print("plus 1000, naive:  ", np.exp(large) / np.exp(large).sum())
shifted = large - large.max()
print("plus 1000, shifted:", np.exp(shifted) / np.exp(shifted).sum())
print("torch:             ", torch.softmax(torch.from_numpy(large), 0).numpy())

# %% [markdown]
# $e^{1000}$ is infinite, and infinity by infinity is NaN. Subtract the row's maximum first: the factor $e^{-\max}$ cancels in the quotient, and the largest exponent becomes $e^0 = 1$.
#
# A sum or a maximum over a block is a **reduction**: `tl.sum(e, axis=0)`, `tl.max(x, axis=0)`. One program takes one whole row. Where do rows begin? A tensor's **stride** says how far apart in memory neighbours are: row $i$ begins at `i * x.stride(0)`. In a contiguous tensor that is the number of columns; in a slice of a wider one it is not.

# %%
wide = torch.arange(40.0).view(4, 10)
narrow = wide[:, :6]
print("shape", tuple(narrow.shape), " strides", narrow.stride(), " contiguous:", narrow.is_contiguous())

owners = [[i if j < 6 else -1 for j in range(10)] for i in range(4)]
fig, axes = lessons.figure(7, 2.0, columns=2)
lessons.who_reads(axes[0], owners, "softmax: program i reads row i\n(4 × 6, a slice of 4 × 10)")
tiles = [[2 * (i // 2) + j // 5 for j in range(10)] for i in range(4)]
lessons.who_reads(axes[1], tiles, "matrix product: program (i, j)\nwrites one tile of the result")
lessons.show(
    fig,
    alt="Two grids of 4 by 10 boxes. Left: program i reads the first six boxes of row i, the last four are nobody's. "
    "Right: four programs each own a tile of 2 by 5 boxes.",
)

# %% [markdown]
# A row's block has a power of two of elements, at least as many as the row. What lies beyond the end must not count. For a sum, load zeros there. For a softmax, zeros would be wrong, as $e^0 = 1$. `tl.load(…, mask=mask, other=…)` says what stands in for masked elements.
#
# ## Exercise 02.3: softmax of rows
#
# Write `softmax(x, out)` for a matrix of $M$ rows, one program per row. The checker uses rows of odd lengths, rows with gaps between them, and large values. `out` is contiguous.


# %%
def softmax(x, out):
    raise NotImplementedError


lessons.check("02.3", softmax);

# %% [markdown]
# ## Tiles: the matrix product
#
# Most of the time of a model goes into matrix products. There each program computes one **tile** of the result, as in the right-hand picture. It walks along a row of tiles of $A$ and down a column of tiles of $B$, multiplies them in pairs, and adds up. `tl.dot` multiplies two tiles; on a GPU it uses the tensor cores, which do nothing but small matrix products. This is the heart of the library's kernel:

# %%
from handtuned.kernels import matmul

lessons.source(matmul._matmul_kernel, "acc = tl.zeros", "b_tile +=")

# %% [markdown]
# `acc` is FP32 even where $A$ and $B$ are FP16: a sum of many small products needs the digits. Lesson 03 comes back to this kernel.
#
# The same function, run here by the interpreter, against PyTorch:

# %%
torch.manual_seed(0)
a, b = torch.randn(70, 33).half(), torch.randn(33, 40).half()
c, found_inf = matmul.scaled_matmul(a, b)
exact = a.double() @ b.double()
print(f"largest error: {(c.double() - exact).abs().max().item():.1e}, for results up to {exact.abs().max().item():.1f} in FP16")
half_a_step = 0.5 * exact.abs().max().item() * 2**-10
assert (c.double() - exact).abs().max() <= 2 * half_a_step

# %% [markdown]
# ## From here to a GPU
#
# Without the interpreter, Triton compiles the kernel for the GPU at the first launch. Nothing in the kernel changes. What does change is that now the order matters in which neighbouring threads read neighbouring addresses, how large the blocks are, and how many values fit into a program's **registers**, the small storage beside the arithmetic units.
#
# One look at compiled code is possible without any GPU: `handtuned xray` compiles a kernel for a given architecture and counts instructions and registers.

# %%
environment = {**os.environ, "TRITON_INTERPRET": "0"}
words = [sys.executable, "-m", "handtuned", "xray", "unscale", "--arch", "sm_90"]
done = subprocess.run(words, capture_output=True, text=True, env=environment)
print("$ handtuned xray unscale --arch sm_90")
print(done.stdout or done.stderr)

# %%
if lessons.gpu():
    speed = subprocess.run([sys.executable, "-m", "handtuned", "bench", "adamw"], capture_output=True, text=True, env=environment)
    print(speed.stdout or speed.stderr)
else:
    lessons.skipped("GB/s of the AdamW kernel beside torch's, and the share of the bandwidth that it reaches")

# %% [markdown]
# ## What to remember
#
# * A kernel is one program in many copies. A copy knows its number; from that it computes which elements are its own.
# * The last block hangs over. Mask every load and store, and choose `other` by what comes next: 0 for a sum, −∞ for a maximum or softmax.
# * Out of bounds, nothing complains. Test with canaries, on lengths that are no multiple of the block.
# * Load, convert to FP32, do everything, round once, store. Elementwise kernels are bound by memory: count bytes.
# * A row begins at a stride, not at the number of columns.
#
# Next: [03. How does FP16 training survive?](03_fp16_training.ipynb)
