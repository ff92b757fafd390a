"""What one multiprocessor of each architecture holds, for the emulator. The figures stand in handtuned/gpu/cards.py."""

import dataclasses

from . import cards

# Compute capability 8.6 and 12.0 have 8.9's limits but for the number of programs.
_MORE = {
    "sm_86": dataclasses.replace(cards.ARCHS["sm_89"], blocks=16),
    "sm_120": cards.ARCHS["sm_89"],
}
ARCHS = {**_MORE, **cards.ARCHS}


def number(arch: str) -> int:
    """90 of "sm_90"; ValueError for an architecture that is not known."""
    if arch not in ARCHS:
        known = ", ".join(sorted(ARCHS, key=lambda name: int(name[3:])))
        raise ValueError(f"arch must be one of {known}, got {arch!r}")
    return int(arch[3:])


def shared_per_program(arch: str) -> int:
    """Bytes of shared memory that a card of this architecture allows one program."""
    return ARCHS[arch].shared_bytes - ARCHS[arch].reserved_shared


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> cards.Occupancy:
    """How many programs fit on one multiprocessor; see handtuned/gpu/cards.py."""
    if arch in cards.ARCHS:
        return cards.occupancy(arch, threads, registers, shared_bytes)
    alike = cards.occupancy("sm_89", threads, registers, shared_bytes)
    blocks = min(alike.blocks, ARCHS[arch].blocks)
    limit = alike.limit if blocks == alike.blocks else "blocks"
    return cards.Occupancy(blocks, blocks * alike.warps // max(alike.blocks, 1), alike.of_warps, limit)
