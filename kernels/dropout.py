"""Dropout masks that are drawn twice instead of stored: in forward, and again in backward, from one seed.

A mask over x (M, K) would cost MK bytes until backward. Philox (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3") makes random bits from a counter and a key alone, so any
tile of the mask can be made anywhere, in any order: the counter is the position, the key the seed.

    one Philox call → 4 × 32 bits = 8 × 16 bits → 8 neighbours (m, 8g … 8g + 7)
    keep element ⇔ its 16 bits ≥ threshold,   threshold = round(65536 p)

One call for eight elements matters: a call costs about 60 integer instructions, and a mask is
made three times over a training step (x for S, x for dA, dx). Seven rounds pass the usual
statistical tests (table 2 of the paper); ten is the cautious default elsewhere.

The expectation is exact, since the caller divides by the probability that is really used,
`1 - threshold / 65536`. The seed comes from torch's generator, so that `torch.manual_seed`,
`torch.get_rng_state` and checkpointing govern the mask as they do `F.dropout`. Products draw the mask of the tile
that they hold (`lora_gemms.py`, `matmul.py`); where the vendor's library multiplies, a kernel writes the same mask out.
"""

import torch

from .runtime import backend, cdiv, launch, tl, triton

LANES = 8  # elements from one Philox call
ROUNDS = 7


def dropout_mask_reference(seed: torch.Tensor, rows: int, columns: int, threshold: int) -> torch.Tensor:
    """(rows, columns) bool, True to keep: the kernels' mask, written in torch. The specification of `keep_tile`."""
    group = torch.arange(cdiv(columns, LANES), device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    words = philox(group, row, 0, 0, seed & 0xFFFFFFFF, seed >> 32)
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes.flatten(1) >= threshold)[:, :columns]


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32 with ROUNDS rounds: counter and key as int64 tensors of 32-bit words → four tensors of words."""
    low32 = 0xFFFFFFFF
    for _ in range(ROUNDS):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits; the sign does not matter under the masks
        c0, c1, c2, c3 = ((b >> 32) & low32) ^ c1 ^ k0, b & low32, ((a >> 32) & low32) ^ c3 ^ k1, a & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c0, c1, c2, c3


def dropout_mask(seed: torch.Tensor, rows: int, columns: int, threshold: int) -> torch.Tensor:
    """(rows, columns) bool, True to keep: the mask of the path without kernels, the same for the same seed.

    Made by torch's own generator, 16 bits per element, which on a CPU is ten times as fast as
    `bernoulli_` and faster than Philox written in tensor operations.
    """
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    bits = torch.empty(-(-rows * columns // 4), dtype=torch.int64, device=seed.device)
    bits.random_(-(2**63), None, generator=generator)
    return (bits.view(torch.int16)[: rows * columns] >= threshold - 32768).view(rows, columns)


@triton.jit
def keep_tile(
    seed_ptr, threshold, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr
):
    """[ROWS, COLUMNS] of the mask, starting at (first_row, first_column); the column is a multiple of 8."""
    GROUPS: tl.constexpr = COLUMNS // 8
    zeros = tl.zeros([ROWS, GROUPS], dtype=tl.int32)
    groups = zeros + (first_column // 8 + tl.arange(0, GROUPS))[None, :]
    rows = zeros + (first_row + tl.arange(0, ROWS))[:, None]
    c0, c1, c2, c3 = tl.philox(tl.load(seed_ptr), groups, rows, zeros, zeros, ROUNDS)
    # [ROWS, GROUPS, which of c0…c3 (two bits, the last joined is the fastest), low or high half]
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [ROWS, GROUPS, 2, 2], index (i, j) holds c[2 i + j]
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [ROWS, COLUMNS]).to(tl.int32) >= threshold


@triton.jit
def _mask_kernel(
    seed_ptr,
    mask_ptr,  # (M, N), of any dtype
    M, N, threshold,
    ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    keep = keep_tile(seed_ptr, threshold, m, n, BLOCK_M, BLOCK_N, ROUNDS)
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(mask_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], keep, mask=inside)


def threshold_of(p: float) -> int:
    """Of 65536 equally likely values, how many drop an element."""
    return min(round(p * 65536), 65535)


def new_seed(device: torch.device) -> torch.Tensor:
    """(1,) int64 on `device`, from torch's default generator. It stays there: reading it would stall a GPU."""
    return torch.randint(0, 2**62, (1,), device=device)


class Dropout:
    """The dropout of one pass: kernels take `seed` and `threshold` and draw the mask themselves, torch takes `mask`.

    Args:
        seed: (1,) int64, from `new_seed`.
        threshold: from `threshold_of`.
    """

    def __init__(self, seed: torch.Tensor, threshold: int):
        self.seed, self.threshold, self._mask = seed, threshold, None

    def mask(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """(rows, columns) of zeros and ones in `dtype` (products with bool are slow on a CPU), drawn once."""
        if self._mask is None and backend(self.seed) == "torch":
            self._mask = dropout_mask(self.seed, rows, columns, self.threshold).to(dtype)
        elif self._mask is None:
            self._mask = torch.empty((rows, columns), dtype=dtype, device=self.seed.device)
            grid = (cdiv(rows, 16), cdiv(columns, 256), 1)
            blocks = {"ROUNDS": ROUNDS, "BLOCK_M": 16, "BLOCK_N": 256}
            launch(_mask_kernel, grid, self.seed, self._mask, rows, columns, self.threshold, **blocks)
        return self._mask
