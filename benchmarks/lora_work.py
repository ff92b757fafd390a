"""The work of a LoRA layer, counted from its kernels' tiles: FLOPs, and bytes on two sides of the cache.

A product reads its operands many times over: every tile of y needs its rows of x and of W, and
nearly all of these reads are served by the cache. So there are two honest counts of bytes:

    requested   what all programs load and store; the traffic between the cache and the processors
    cold        every array once for each kernel that touches it; what memory would move if
                nothing stayed in the cache from one kernel to the next

The floor is what any implementation must move: every array once for the whole pass.
`tests/test_lora_work.py` holds the counts against the loads, stores and products that the kernels
really execute, one by one, in Triton's interpreter.
"""

from collections import Counter
from dataclasses import dataclass, field

from handtuned.kernels.lora_gemms import down_blocks, down_grad_blocks, up_grads_blocks
from handtuned.kernels.matmul import LORA_TILES
from handtuned.kernels.runtime import block_of, cdiv


@dataclass
class Work:
    """FLOPs (multiplications and additions of the tensor-core products, padding included) and bytes."""

    flops: int = 0
    requested: int = 0
    arrays: Counter = field(default_factory=Counter)  # (kernel, array) → bytes, once

    @property
    def cold(self) -> int:
        return sum(self.arrays.values())

    def touch(self, kernel: str, array: str, size: int, times: int = 1) -> None:
        """`times` programs load or store `size` bytes of an array in total; memory moves them once."""
        self.requested += size * times
        self.arrays[kernel, array] += size


def _product(work, kernel, M, N, K, r, low, adapter, tile):
    """x (M, K) · Wᵀ (N, K) with an accumulator that starts at S (M, r) · Bᵀ (N, r); r = 0: without."""
    rows, columns = cdiv(M, tile["BLOCK_M"]), cdiv(N, tile["BLOCK_N"])
    padded = rows * tile["BLOCK_M"] * columns * tile["BLOCK_N"]
    work.flops += 2 * padded * cdiv(K, tile["BLOCK_K"]) * tile["BLOCK_K"]
    work.touch(kernel, "x", M * K * low, columns)
    work.requested += (rows * tile["BLOCK_M"] - M) * K * low * columns  # rows past the end read the last one again
    work.touch(kernel, "W", N * K * low, rows)
    work.touch(kernel, "y", M * N * low)
    if r:
        block_r = block_of(r, 16, 64)
        work.flops += 2 * padded * cdiv(r, block_r) * block_r
        work.touch(kernel, "S", M * r * low, columns)
        work.touch(kernel, "B", N * r * adapter, rows)


def _sum(work, kernel, parts, size, low):
    """A sum over `parts` fp32 arrays of `size` elements, stored in `low` bytes each."""
    if parts > 1:
        work.touch(kernel, "sum of parts", parts * size * 4)
        work.touch(kernel, "sum", size * low)


def forward(M, N, K, r, low=2, adapter=4, tile=None) -> Work:
    """y = x Wᵀ + s (x Aᵀ) Bᵀ. r = 0: the base product alone.

    Args:
        M, N, K, r: rows of x, output and input features, rank.
        low, adapter: bytes an element of x, W and y; of A and B.
        tile: block sizes of the product (by default 128 × 256 × 64).
    """
    work = Work()
    tile = tile or LORA_TILES[1].kwargs
    if r:
        b = down_blocks(M, K, r)
        rows, ranks = cdiv(M, b["BLOCK_M"]), cdiv(r, b["BLOCK_R"])
        steps = cdiv(K, b["BLOCK_K"])
        work.flops += 2 * rows * b["BLOCK_M"] * ranks * b["BLOCK_R"] * steps * b["BLOCK_K"]
        work.touch("down", "x", M * K * low, ranks)
        work.touch("down", "A", r * K * adapter, rows)
        work.touch("down", "S", M * r * (4 * b["splits"] if b["splits"] > 1 else low))
        _sum(work, "down", b["splits"], M * r, low)
    _product(work, "product", M, N, K, r, low, adapter, tile)
    return work


def backward(M, N, K, r, low=2, adapter=4, tile=None) -> Work:
    """dx, dA and dB for a frozen W. r = 0: dx of the base layer alone. Arguments as for `forward`."""
    work = Work()
    tile = tile or LORA_TILES[1].kwargs
    if r:
        b = up_grads_blocks(M, N, r)
        slabs, ranks, splits = cdiv(M, b["BLOCK_M"]), cdiv(r, b["BLOCK_R"]), b["splits"]
        steps = cdiv(N, b["BLOCK_N"])
        work.flops += 4 * slabs * b["BLOCK_M"] * steps * b["BLOCK_N"] * ranks * b["BLOCK_R"]
        work.touch("up_grads", "dy", M * N * low, ranks)
        work.touch("up_grads", "S", M * r * low, splits)
        work.touch("up_grads", "B", N * r * adapter, slabs)
        work.touch("up_grads", "dS", M * r * (4 * splits if splits > 1 else low))
        work.touch("up_grads", "dB", N * r * (4 * slabs if slabs > 1 else adapter))
        _sum(work, "up_grads dS", splits, M * r, low)
        _sum(work, "up_grads dB", slabs, N * r, adapter)
        b = down_grad_blocks(M, K, r)
        columns, ranks, splits = cdiv(K, b["BLOCK_K"]), cdiv(r, b["BLOCK_R"]), b["splits"]
        steps = cdiv(M, b["BLOCK_M"])
        work.flops += 2 * columns * b["BLOCK_K"] * steps * b["BLOCK_M"] * ranks * b["BLOCK_R"]
        work.touch("down_grad", "x", M * K * low, ranks)
        work.touch("down_grad", "dS", M * r * low, columns)
        work.touch("down_grad", "dA", r * K * (4 * splits if splits > 1 else adapter))
        _sum(work, "down_grad", splits, r * K, adapter)
    _product(work, "dx", M, K, N, r, low, adapter, tile)
    return work


def floors(M, N, K, r, low=2) -> dict[str, int]:
    """Bytes that any implementation must move: every array once (adapter in `low` bytes too)."""
    return {
        "forward": low * (M * K + N * K + M * N) + low * r * (N + K),
        "backward": low * (M * N + N * K + 2 * M * K + 2 * r * (N + K) + M * r),
    }


def report(M, N, K, r) -> str:
    """The counts of both passes as text, with what LoRA adds to the base layer in percent."""
    lines = [f"M {M}, N {N}, K {K}, r {r}, 16-bit activations, fp32 adapter; LoRA's addition to the base layer"]
    for name, count in (("forward", forward), ("backward", backward)):
        base, full, floor = count(M, N, K, 0), count(M, N, K, r), floors(M, N, K, r)[name]
        added = {key: 100 * (getattr(full, key) / getattr(base, key) - 1) for key in ("flops", "requested", "cold")}
        lines += [
            f"{name:9} FLOPs           {full.flops / 1e9:9.2f} G   {added['flops']:+6.2f} %",
            f"{'':9} bytes requested {full.requested / 1e6:9.1f} MB  {added['requested']:+6.2f} %",
            f"{'':9} bytes, cold     {full.cold / 1e6:9.1f} MB  {added['cold']:+6.2f} %   floor {floor / 1e6:.1f} MB",
        ]
    lines.append(f"saved for backward: x {2 * M * K / 1e6:.1f} MB and S {2 * M * r / 1e6:.3f} MB")
    return "\n".join(lines)
