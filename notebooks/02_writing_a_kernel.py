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
# In this lesson you write eight, each a small step from the one before: vectors, rows, blocks with two dimensions, a tiled matrix product, and two whose cost is counted. Lessons 03, 07 and 09 build the three kernels that this course is about on top of them.
#
# You need no GPU: Triton has an **interpreter**, which runs a kernel on the CPU, one copy after the other, with NumPy. It is slow, and it computes the same numbers. And there is an **emulator**, part of this library, which runs the machine code that a GPU would get, and counts what it costs.
#
# There is one trap, and it is the reason why our tests and exercises are built the way they are. A kernel that reads or writes outside of its tensors gets no error message.
#
# Terms: kernel 算子, program instance 程序实例, block 数据块, grid 网格, mask 掩码, pointer 指针, stride 步长, out of bounds 越界, reduction 归约, bandwidth 带宽, warp 线程束, shared memory 共享内存, coalescing 合并访问, bank conflict 存储体冲突, race 竞争

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
# **Write down your guess:** Leave the masks out, and add two vectors of ten elements with a block of 64. What happens? An error? A wrong result?


# %%
lessons.guess("02.a", "ten elements, a block of 64, no masks: an error, a wrong result, or what?")
@triton.jit
def careless_add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(y_ptr + offs))


memory = torch.zeros(100)  # ten numbers for us, and ninety that belong to someone else
ours, others = memory[:10], memory[10:]
careless_add_kernel[(1,)](torch.ones(100)[:10], torch.ones(100)[:10], ours, 10, BLOCK=64)
print("ours:  ", ours.tolist())
print("others:", int((others != 0).sum()), "of the other numbers were overwritten")
lessons.measured(
    "02.a",
    f"no error, a right result, and {int((others != 0).sum())} numbers of somebody else overwritten",
)
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
# Write a kernel for $a x + y$, where $a$ is a number and $x$, $y$ are vectors, and `axpy(a, x, y, out)`, which launches it. The checker tries lengths that are not a multiple of anything, with canaries. (A number is passed to a kernel like a length: without a pointer.)


# %%
def axpy(a, x, y, out):
    raise NotImplementedError


lessons.check("02.1", axpy);

# %% [markdown]
# ## Watch a kernel at work
#
# A checker says that something is wrong. To see *where*, go through the launch line by line: `lessons.step` takes what a launch takes, the kernel, the grid and the arguments, and shows for each program what every line made of its values, which elements a load or store touched, and which of them the mask kept. (With `pip install ipywidgets` it is a slider.) Five numbers and blocks of four; look at the second program:

# %%
five, out = torch.arange(5.0), torch.zeros(5)
steps = lessons.step(add_kernel, (2,), five, 10 * five, out, 5, BLOCK=4)
print(steps)

# %% [markdown]
# Now without masks. **Write down your guess:** What will the second program's loads say?

# %%
lessons.guess("02.b", "what will the second program's loads say?")
lessons.step(careless_add_kernel, (2,), torch.ones(8)[:5], torch.ones(8)[:5], torch.zeros(8)[:5], 5, BLOCK=4)

# %% [markdown]
# ### print, breakpoint, and a typo
#
# An interpreted kernel is ordinary Python. So `print` works in it, and `breakpoint()` stops in the middle of a program, with all the debugger's commands: `p x` prints a value, `n` goes to the next line, `c` goes on. (Ask for one program only, or you will stop in each.) In your own cell you type the commands; here they are given in advance, so that the output can be stored. Both must go before the kernel is compiled for a GPU.

# %%
import pdb


class Scripted(pdb.Pdb):
    """The debugger, with commands from a list instead of the keyboard."""

    def precmd(self, line):
        print("(Pdb)", line)
        return super().precmd(line)

    def print_stack_entry(self, entry, prefix=""):
        print("stopped in", entry[0].f_code.co_name)


debugger = Scripted(nosigint=True, readrc=False)
debugger.cmdqueue = ["p offs", "p offs < N", "p x * 100", "c"]
sys.breakpointhook = lambda: debugger.set_trace(sys._getframe(1))


@triton.jit
def debugged_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    if tl.program_id(0) == 1:
        print("program 1 loaded", x)
        breakpoint()
    tl.store(x_ptr + offs, 2 * x, mask=offs < N)


debugged_kernel[(2,)](five, 5, BLOCK=4)
sys.breakpointhook = sys.__breakpointhook__

# %% [markdown]
# A mistake inside a kernel is reported at the kernel's own line, the last one of your code in the traceback. `lessons.step` shows what was computed before it, and so do the checkers:

# %%
@triton.jit
def mistyped_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + off, mask=offs < N)  # noqa: F821 the mistake that is meant
    tl.store(out_ptr + offs, x, mask=offs < N)


lessons.step(mistyped_kernel, (2,), five, out, 5, BLOCK=4)

# %% [markdown]
# There is a program that *draws* this, triton-viz (`pip install triton-viz`; it brings a web server, Z3 and Arrow along). Two lines show every load, store and product of a launch as blocks in a browser:
#
# ```python
# import triton_viz
# triton_viz.trace("tracer")(add_kernel)[(2,)](five, 10 * five, out, 5, BLOCK=4); triton_viz.launch()
# ```
#
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
# **Write down your guess:** What does this give in FP32 for the row (1000, 1001)?

# %%
lessons.guess("02.c", "what does the naive softmax give for a row like (1000, 1001)?")
row = np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32)
print("four numbers:      ", np.exp(row) / np.exp(row).sum())
large = row + 1000
with np.errstate(all="ignore"):
    naive = np.exp(large) / np.exp(large).sum()
    print("plus 1000, naive:  ", naive)
shifted = large - large.max()
print("plus 1000, shifted:", np.exp(shifted) / np.exp(shifted).sum())
print("torch:             ", torch.softmax(torch.from_numpy(large), 0).numpy())
lessons.measured("02.c", str(naive))

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
# Write `softmax(x, out)` for a matrix of $M$ rows, one program per row. The checker uses rows of various lengths, rows with gaps between them, and large values. `out` is contiguous.


# %%
def softmax(x, out):
    raise NotImplementedError


lessons.check("02.3", softmax);

# %% [markdown]
# ## Blocks with two dimensions
#
# A matrix wants blocks of rows and columns. The offsets of such a block are a matrix too, and it is built from two vectors. `m = tl.arange(0, 2)` has the shape [2]. Indexing with `None` adds a dimension of length 1: `m[:, None]` has the shape [2, 1], a column; `n[None, :]` has [1, 4], a row. A column and a row in one operation are **broadcast**: the column is repeated to the right, the row downward, and a block [2, 4] comes out. NumPy, torch and Triton agree about this.
#
# Row $m$ of a contiguous matrix with $N$ columns begins at $mN$. So element $(m, n)$ lies at $mN + n$:

# %%
m, n = np.arange(2), np.arange(4)
print("m[:, None], shape", m[:, None].shape, "\n", m[:, None])
print("n[None, :], shape", n[None, :].shape, "\n", n[None, :])
print("m[:, None] * 4 + n[None, :], shape", (m[:, None] * 4 + n[None, :]).shape, "\n", m[:, None] * 4 + n[None, :])

# %% [markdown]
# ## Exercise 02.4: an outer sum
#
# Write `outer_sum(x, y, out)`: out[i, j] = x[i] + y[j], for an x of M numbers and a y of N. One program does all of it; M and N are powers of two, so there is nothing to mask.


# %%
def outer_sum(x, y, out):
    raise NotImplementedError


lessons.check("02.4", outer_sum);

# %% [markdown]
# ## Exercise 02.5: masks at both edges
#
# A large matrix is cut into tiles, and a grid of two dimensions numbers them: `tl.program_id(0)` is the row of tiles, `tl.program_id(1)` the column. At the right edge and at the bottom tiles hang over, in the corner on two sides. A mask is a block like any other: `(m < M)[:, None] & (n < N)[None, :]`.
#
# Write `scale_columns(x, w, out)`: out[m, n] = x[m, n] · w[n]. Rows of x may have gaps between them; out is contiguous.


# %%
def scale_columns(x, w, out):
    raise NotImplementedError


lessons.check("02.5", scale_columns);

# %% [markdown]
# ## Tiles: the matrix product
#
# Most of the time of a model goes into matrix products. There each program computes one **tile** of the result, as in the right-hand picture above. It walks along a row of tiles of $A$ and down a column of tiles of $B$, multiplies them in pairs, and adds up, in FP32, even where $A$ and $B$ are FP16: a sum of many small products needs the digits.
#
# `tl.dot` multiplies two tiles; on a GPU it uses the **tensor cores**, which do nothing but small matrix products. In NumPy, for one tile of the result:

# %%
A, B = np.arange(8.0).reshape(2, 4), np.arange(12.0).reshape(4, 3)
acc = np.zeros((2, 3))
for k in range(0, 4, 2):
    acc += A[:, k : k + 2] @ B[k : k + 2]
    print(f"after columns {k} and {k + 1} of A:\n{acc}")
assert np.array_equal(acc, A @ B)

# %% [markdown]
# ## Exercise 02.6: a tiled product
#
# Write `matmul(a, b, c)` for contiguous FP16 matrices a (M, K) and b (K, N) and an FP32 c (M, N). A grid of tiles; each program loops over K. Which of the masks need `other=0.0`?


# %%
def matmul(a, b, c):
    raise NotImplementedError


lessons.check("02.6", matmul);

# %% [markdown]
# The same loop is the heart of the library's kernel:

# %%
from handtuned.kernels import matmul as library

lessons.source(library._matmul_kernel, "acc = tl.zeros", "b_tile +=")

# %% [markdown]
# What it does more than yours: it takes any strides, walks through the tiles in an order in which neighbours share data in the cache, leaves the masks out where no tile hangs over, and has four more uses, which lessons 03 and 07 come to. Here it is run by the interpreter, against PyTorch:

# %%
torch.manual_seed(0)
a, b = torch.randn(70, 33).half(), torch.randn(33, 40).half()
c, found_inf = library.scaled_matmul(a, b)
exact = a.double() @ b.double()
print(f"largest error: {(c.double() - exact).abs().max().item():.1e}, for results up to {exact.abs().max().item():.1f} in FP16")
half_a_step = 0.5 * exact.abs().max().item() * 2**-10
assert (c.double() - exact).abs().max() <= 2 * half_a_step

# %% [markdown]
# ## From here to a GPU: threads, warps, and levels of memory
#
# Without the interpreter, Triton compiles the kernel at the first launch. Nothing in it changes. What it becomes is worth knowing.
#
# * A program is run by **warps**, four by default. A warp is 32 **threads** that do the same instruction at the same time. Triton deals out the elements of a block to the threads.
# * A thread's values lie in **registers**, the small storage beside the arithmetic units.
# * Threads of one program exchange values through **shared memory**, 64 KB (T4) to 228 KB (H100) on each multiprocessor, of which these cards have 40 and 132. When `tl.sum` or `tl.dot` needs what another thread has, Triton puts it there.
# * Tensors lie in the GPU's main memory, tens of GB, also called HBM or DRAM, with a cache in front of it, L2. Of all levels it is the largest, the farthest away, and the one that all programs wait for together.
#
# ### Coalescing
#
# The 32 threads of a warp ask for memory *together*, in one **request**, and get it in **sectors** of 32 bytes. If they ask for neighbours, 32 numbers of 4 bytes, that is 4 sectors. If they ask for elements that lie far apart, each in a sector of its own, it is 32, and 28 bytes of each are thrown away. Requests for neighbours are called **coalesced**.
#
# `lessons.profile` takes what a launch takes, runs the compiled kernel in the emulator, and counts. `card` is the GPU that is emulated: "T4", "A100", "L4", "RTX 4090", "H100". Nothing is timed.
#
# **Write down your guess:** A program copies a row of a matrix into a column of another one, so it transposes. How many sectors does a load take, how many a store?

# %%
from handtuned.lessons import drawings

drawings.memory_levels()

# %%
lessons.guess("02.d", "how many sectors does a load of a warp take, how many a store?")
@triton.jit
def row_to_column_kernel(x_ptr, out_ptr, M, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + n, mask=n < N)
    tl.store(out_ptr + n * M + row, x, mask=n < N)


x, transposed = torch.randn(64, 128), torch.empty(128, 64)
counted = lessons.profile(row_to_column_kernel, (64,), x, transposed, 64, 128, BLOCK=128, card="A100")
print(counted)
lessons.measured("02.d", f"{counted.sectors_per_load:g} and {counted.sectors_per_store:g}")
assert torch.equal(transposed, x.t()) and counted.sectors_per_store == 32

# %% [markdown]
# ## Exercise 02.7: a transposition within 16 sectors
#
# Write `transpose(x, out)`, out (N, M) = xᵀ for any M and N, such that neither a load nor a store takes more than 16 sectors per request. (Not 4? A thread that has four neighbours moves 16 bytes at once, and 32 of them ask for 16 sectors, all of them used. The profile's brackets say when fewer would do.)


# %%
def transpose(x, out):
    raise NotImplementedError


lessons.check("02.7", transpose);

# %% [markdown]
# ### Banks
#
# Shared memory has 32 **banks**. Word 0 (4 bytes) lies in bank 0, word 31 in bank 31, word 32 in bank 0 again. In one pass, a **wavefront**, each bank gives one word. If the threads of a warp want words of 32 different banks, or the same word, one wavefront serves all. If they want different words of one bank, they queue: a **bank conflict**.
#
# The kernel below transposes tiles of 32 × 32 the hard way: a tile is loaded as 1,024 numbers in a row, and `tl.gather` looks up which of them belongs where; on a GPU that goes through shared memory.
#
# **Write down your guess:** Thread $i$ of a warp looks up place $32 i + c$. Which banks are asked?

# %%
lessons.guess("02.e", "thread i looks up place 32 i + c: which banks are asked?")
@triton.jit
def gather_kernel(x_ptr, out_ptr, SIDE: tl.constexpr):
    start = tl.program_id(0) * SIDE * SIDE
    place = tl.arange(0, SIDE * SIDE)
    row, column = place // SIDE, place % SIDE
    tile = tl.load(x_ptr + start + place)
    turned = tl.gather(tile, column * SIDE + row, 0)
    tl.store(out_ptr + start + place, turned)


tiles, turned = torch.randn(4, 32, 32), torch.empty(4, 32, 32)
counted = lessons.profile(gather_kernel, (4,), tiles, turned, SIDE=32, card="A100")
print(counted)
lessons.measured("02.e", f"always the same one, and an access of shared memory takes {counted.wavefronts:.1f} wavefronts on average")
assert torch.equal(turned, tiles.transpose(1, 2)) and counted.wavefronts > 4

# %% [markdown]
# All in one bank. (The average is below 32, because the stores into shared memory are counted with the look-ups, and they have no conflict.)
#
# ## Exercise 02.8: a transposition within 2 wavefronts
#
# Write `transpose_tiles(x, out)`: out[t] = x[t]ᵀ for x (T, 32, 32), through shared memory, with at most 2 wavefronts per request and 16 sectors per load and per store. You may begin with the kernel above. Which element lies at which place of the block is yours to choose: what if row $r$ keeps its element of column $c$ at place $32 r + (c \oplus r)$? (`c ^ r` exchanges the columns of a row among themselves, in each row differently.)


# %%
def transpose_tiles(x, out):
    raise NotImplementedError


lessons.check("02.8", transpose_tiles);

# %% [markdown]
# ### Registers, tensor cores, and what no counter says
#
# The library's product, counted on two cards. The **tensor cores' share** is the part of all floating-point operations that they do; what is left is done to the finished sums before they are stored (the epilogue, lesson 03).

# %%
x, W = torch.randn(128, 128).half(), torch.randn(128, 128).half()
for card in ("A100", "H100"):
    with lessons.emulated(card) as gpu:
        library.scaled_matmul(x, W)
    counted = lessons.Profile(gpu)
    print(f"{card}: tensor cores' share {counted.tensor_share:.1%}, sectors per load {counted.sectors_per_load:.0f}, "
          f"wavefronts {counted.wavefronts:.1f}, shared memory {counted.launch.shared_bytes:,} bytes per program")  # fmt: skip
    assert counted.tensor_share > 0.9

# %% [markdown]
# The registers of a thread limit how many programs fit on a multiprocessor at once. If a program needs more than there are, values are **spilled** to main memory. What limits the last launch:

# %%
held = counted.launch.occupancy
print(f"{counted.launch.registers} registers per thread, {counted.launch.spill_bytes} bytes spilled; a multiprocessor holds "
      f"{held.blocks} programs at once, {held.warps} of {held.of_warps} warps, limited by: {held.limit}")  # fmt: skip

# %% [markdown]
# Which tile is fastest no counter says: latency, caches and clocks decide together. So the tile is *measured*, once for each size, on the card at hand; Triton calls it **autotuning** (`@triton.autotune`), and the library keeps its choices in a file.

# %%
if lessons.gpu():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    words = [sys.executable, "-m", "handtuned", "bench", "adamw"]
    speed = subprocess.run(words, capture_output=True, text=True, env=environment)
    print(speed.stdout or speed.stderr)
else:
    lessons.skipped("GB/s of the AdamW kernel beside torch's, and the share of the bandwidth that it reaches")

# %% [markdown]
# ## What to remember
#
# * A kernel is one program in many copies. A copy knows its number; from that it computes which elements are its own.
# * The last block hangs over. Mask every load and store, and choose `other` by what comes next: 0 for a sum, −∞ for a maximum or softmax.
# * Out of bounds, nothing complains. Test with canaries, on lengths that are not a multiple of the block.
# * Load, convert to FP32, do everything, round once, store. Elementwise kernels are bound by memory: count bytes.
# * A row begins at a stride, not at the number of columns. A block with two dimensions is a column of offsets plus a row of them.
# * Threads of a warp ask together: neighbours should read neighbours (sectors), and different banks (wavefronts).
# * The interpreter runs programs one after the other, so it hides races. The checkers run your kernels in the emulator too.
#
# On a real model: on a GPU `handtuned finetune` runs the library's kernels; `handtuned bench adamw` times one of them, `handtuned xray adamw --arch sm_90` counts what it does without a GPU.
#
# Next: [03. How does FP16 training survive?](03_fp16_training.ipynb)
