"""Cards in numbers: what an architecture allows to be resident at once, and what NVIDIA publishes of some of them.

Occupancy is how many programs (blocks) and warps a multiprocessor holds at the same time. Each resource allows its
own number; the smallest counts:

    blocks = min(most blocks, most warps / warps, registers / allocated registers, shared / allocated shared)

Limits: CUDA C++ Programming Guide 13, "Technical Specifications per Compute Capability". Allocation: registers go to a
warp in units of 256, shared memory to a block in units of 128 bytes (256 on sm_75), with 1 KiB reserved for each block
since sm_80 (CUDA Occupancy Calculator).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """Limits of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    reserved_shared: int = 1024
    shared_unit: int = 128


ARCHS = {
    "sm_75": Arch(warps=32, blocks=16, shared_bytes=64 * 1024, reserved_shared=0, shared_unit=256),
    "sm_80": Arch(warps=64, blocks=32, shared_bytes=164 * 1024),
    "sm_86": Arch(warps=48, blocks=16, shared_bytes=100 * 1024),
    "sm_89": Arch(warps=48, blocks=24, shared_bytes=100 * 1024),
    "sm_90": Arch(warps=64, blocks=32, shared_bytes=228 * 1024),
    "sm_100": Arch(warps=64, blocks=32, shared_bytes=228 * 1024),
    "sm_120": Arch(warps=48, blocks=24, shared_bytes=100 * 1024),
}


def number(arch: str) -> int:
    """90 of "sm_90"; ValueError for an architecture that is not known."""
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    return int(arch[3:])


def shared_per_program(arch: str) -> int:
    """Bytes of shared memory that a card of this architecture allows one program."""
    return ARCHS[arch].shared_bytes - ARCHS[arch].reserved_shared


@dataclass(frozen=True)
class Occupancy:
    """What a multiprocessor holds at once, and the resource that allows no more; 0 blocks: a program does not fit."""

    blocks: int
    warps: int
    of_warps: int
    limit: str


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """How many blocks fit on one multiprocessor of an `arch` (key of ARCHS); registers are those of a thread."""
    has = ARCHS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    shared = -(-(shared_bytes + has.reserved_shared) // has.shared_unit) * has.shared_unit
    allowed = {"blocks": has.blocks, "warps": has.warps // warps}
    if per_warp:
        # registers are handed out in four equal parts, one per scheduler
        allowed["registers"] = 4 * (has.registers // 4 // per_warp) // warps
    if shared:
        allowed["shared memory"] = has.shared_bytes // shared
    limit = min(allowed, key=allowed.get)
    return Occupancy(allowed[limit], allowed[limit] * warps, has.warps, limit)


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # boost clock, Hz; of an H100 and H200 the one that `tensor` follows from (1.98 GHz for FP32)
    bandwidth: float  # of memory, bytes per second
    tensor: float  # dense FP16 with FP32 accumulation, FLOPs per second
    tensor_per_clock: int  # the same per multiprocessor and clock; clock × multiprocessors × this is `tensor`
    source: str  # where the figures are published

    def __str__(self) -> str:
        units = f"{self.multiprocessors} multiprocessors, {self.clock / 1e9:.2f} GHz"
        rates = f"{self.bandwidth / 1e9:.0f} GB/s, {self.tensor / 1e12:.0f} TFLOP/s dense FP16"
        return f"{self.name}: {units}, {rates} ({self.source})"


GPUS = (
    Gpu("T4", "sm_75", 40, 1.590e9, 320e9, 65e12, 1024, "NVIDIA Turing GPU Architecture whitepaper; T4 datasheet"),
    Gpu("A100", "sm_80", 108, 1.410e9, 2039e9, 312e12, 2048,
        "NVIDIA A100 datasheet (80 GB SXM); A100 Tensor Core GPU Architecture whitepaper"),
    Gpu("L4", "sm_89", 58, 2.040e9, 300e9, 121e12, 1024,
        "NVIDIA L4 datasheet (242 TFLOP/s are with sparsity); 58 multiprocessors from its 7,424 CUDA cores"),
    Gpu("RTX 4090", "sm_89", 128, 2.520e9, 1008e9, 165.2e12, 512, "NVIDIA Ada GPU Architecture whitepaper"),
    Gpu("H100", "sm_90", 132, 1.830e9, 3352e9, 989.4e12, 4096,
        "NVIDIA H100 datasheet (SXM5); H100 Tensor Core GPU Architecture whitepaper"),
    Gpu("H200", "sm_90", 132, 1.830e9, 4800e9, 989.4e12, 4096, "NVIDIA H200 datasheet (SXM)"),
    Gpu("B200", "sm_100", 148, 1.856e9, 8000e9, 2250e12, 8192,
        "NVIDIA HGX B200 datasheet; no clock is published: this one follows from the FLOP rate"),
)  # fmt: skip
