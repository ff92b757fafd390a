"""Kernels that are not ours: what Triton's tutorials teach, written anew, as any user would write them."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, inside) + tl.load(y_ptr + offs, inside), inside)


@triton.jit
def column_to_row(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    """y (N, M) = xᵀ, a column of x (M, N) to each program."""
    column, offs = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y_ptr + column * M + offs, tl.load(x_ptr + offs * N + column, offs < M), offs < M)


@triton.jit
def softmax(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """y = softmax of each row of x (M, N); a row to each program, read once."""
    offs = tl.arange(0, BLOCK)
    at = tl.program_id(0) * N + offs
    x = tl.load(x_ptr + at, offs < N, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + at, e / tl.sum(e, axis=0), offs < N)


_TILES = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 4}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in ((64, 32, 32, 4, 3), (128, 64, 64, 4, 3))
]


@triton.autotune(_TILES, key=["M", "N", "K"])
@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) b (K, N); GROUP rows of tiles are walked down together, so that they share b in the L2."""
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band, within = tl.program_id(0) // (GROUP * n_tiles), tl.program_id(0) % (GROUP * n_tiles)
    height = min(GROUP, m_tiles - band * GROUP)
    m = (band * GROUP + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (m % M)[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + k[:, None] * stride_bk + (n % N)[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for left in range(K, 0, -BLOCK_K):
        a = tl.load(a_ptrs, k[None, :] < left, other=0.0)
        b = tl.load(b_ptrs, k[:, None] < left, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_ptr + m[:, None] * stride_cm + n[None, :] * stride_cn, acc.to(c_ptr.dtype.element_ty), inside)


@triton.jit
def matmul_by_descriptors(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """c (M, N) = a (M, K) bᵀ with b (N, K); tiles are fetched by the hardware that knows the tensors' shapes (TMA)."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def layer_norm(x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, N, eps, BLOCK: tl.constexpr):
    """y = (x − mean) · rstd · w + b for each row of x (M, N), walked in blocks: mean, then variance, then y."""
    row = tl.program_id(0)
    x_ptr += row * N
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offs, offs < N, other=0.0)
    mean = tl.sum(total, axis=0) / N
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        away = tl.where(offs < N, tl.load(x_ptr + offs, offs < N, other=0.0) - mean, 0.0)
        squares += away * away
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=0) / N + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < N
        scaled = (tl.load(x_ptr + offs, inside) - mean) * rstd * tl.load(w_ptr + offs, inside)
        tl.store(y_ptr + row * N + offs, scaled + tl.load(b_ptr + offs, inside), inside)


@triton.jit
def layer_norm_grads(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, lock_ptr, N, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of a row; its parts of dw and db go to one of SLOTS sums (SLOTS, N), zero before, each behind a lock."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    inside = offs < N
    dy = tl.load(dy_ptr + row * N + offs, inside, other=0.0)
    normed = (tl.load(x_ptr + row * N + offs, inside, other=0.0) - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
    normed = tl.where(inside, normed, 0.0)
    dnormed = dy * tl.load(w_ptr + offs, inside, other=0.0)
    along, mean = tl.sum(normed * dnormed, axis=0) / N, tl.sum(dnormed, axis=0) / N
    tl.store(dx_ptr + row * N + offs, (dnormed - normed * along - mean) * tl.load(rstd_ptr + row), inside)

    lock = lock_ptr + row % SLOTS
    dw_ptrs, db_ptrs = dw_ptr + row % SLOTS * N + offs, db_ptr + row % SLOTS * N + offs
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(dw_ptrs, tl.load(dw_ptrs, inside) + dy * normed, inside)
    tl.store(db_ptrs, tl.load(db_ptrs, inside) + dy, inside)
    tl.debug_barrier()  # all threads have written, then one gives the lock back
    tl.atomic_xchg(lock, 0)


@triton.jit
def column_sums(x_ptr, sums_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums (N,) of x (M, N)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        acc += tl.load(x_ptr + m[:, None] * N + n[None, :], (m[:, None] < M) & (n[None, :] < N), other=0.0)
    tl.store(sums_ptr + n, tl.sum(acc, axis=0), n < N)
