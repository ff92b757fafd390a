"""What the emulator says in words: a table of launches, and a kernel's source with its costs beside it."""

import linecache
import os

_WORK = ("kernel", "launches", "programs", "warps", "shared memory", "instructions", "tensor FLOPs", "barriers",
         "divergent branches")  # fmt: skip
_MEMORY = ("", "sectors per load", "(least)", "sectors per store", "(least)", "wavefronts", "(least)", "read from DRAM",
           "written")  # fmt: skip
_NOTES = """\
programs: of all launches; warps: 32 threads each, and shared memory, of one program. instructions: of warps.
A load or store of a warp moves sectors of 32 bytes: 4 if its threads take 4 bytes each, side by side. A wavefront is
one pass over the 32 banks of shared memory, for one access of a warp. (least): the fewest that the same bytes need.
DRAM: every sector once, as from an empty cache."""
_WIDTH = 120
_LONGEST = 32  # characters of a kernel's name


def amount(n: float) -> str:
    """1234567 → "1.2 M"."""
    for unit in ("", " k", " M"):
        if abs(n) < 1000:
            return f"{n:.1f}{unit}" if unit else f"{n:.0f}"
        n /= 1000
    return f"{n:.1f} G"


def _each(traffic) -> tuple[str, str]:
    """(cost of a request, the least possible)."""
    if not traffic.requests:
        return "–", "–"
    return f"{traffic.cost / traffic.requests:.1f}", f"{traffic.least / traffic.requests:.1f}"


def _columns(rows):
    """Rows of cells, the first to the left, the others to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip


def table(gpu) -> str:
    """All kernels of an emulator: what they did, then what it cost in memory."""
    if not gpu.launches:
        return f"{gpu.arch}, emulated: no kernel was launched"
    work, memory = [_WORK], [_MEMORY]
    for name in dict.fromkeys(launch.name for launch in gpu.launches):
        launches, total = gpu.of_kernel(name), gpu.counters(name)
        name = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        shared = max(launch.shared_bytes for launch in launches)
        work.append((name, str(len(launches)), amount(sum(launch.programs for launch in launches)),
                     str(launches[0].warps), f"{shared / 1024:.1f} KiB" if shared else "–",
                     amount(total.warp_instructions), amount(total.tensor_flops), amount(total.barriers),
                     amount(total.divergent_branches)))  # fmt: skip
        memory.append((name, *_each(total.global_loads), *_each(total.global_stores), *_each(total.shared),
                       f"{amount(total.dram_read_bytes)}B", f"{amount(total.dram_written_bytes)}B"))  # fmt: skip
    launched = f"{gpu.arch}, emulated: {len(gpu.launches)} launch{'es' if len(gpu.launches) > 1 else ''}"
    return "\n".join([launched, "", *_columns(work), "", *_columns(memory), "", _NOTES])


def _with_least(traffic) -> str:
    """Cost of a request; behind it the least possible, where that is lower."""
    if not traffic.requests:
        return ""
    cost, least = _each(traffic)
    return cost + (f" ({least})" if cost != least else "").ljust(7)


def _costs(counters) -> tuple:
    if counters is None:
        return ("", "", "", "", "")
    return (amount(counters.warp_instructions), _with_least(counters.global_loads), _with_least(counters.global_stores),
            _with_least(counters.shared), amount(counters.barriers) if counters.barriers else "")  # fmt: skip


def source_listing(counters, file, lines, first) -> str:
    """The lines of a kernel in `file`, the first of this number, then those of the functions that it calls, each with
    its costs."""
    heads = [("instruc-", "sectors", "sectors", "wave-", "bar-", ""),
             ("tions", "per load", "per store", "fronts", "riers", "line")]  # fmt: skip
    rows = [(*_costs(counters.lines.get((file, n))), f"{n:4}  {text.rstrip()}") for n, text in enumerate(lines, first)]
    inside = {(file, n) for n in range(first, first + len(lines))}
    others = sorted(place for place in counters.lines if place not in inside and place[1])
    for file in dict.fromkeys(place[0] for place in others):
        rows.append(("",) * 5 + (f"functions that it calls, in {os.path.basename(file)}:",))
        rows += [(*_costs(counters.lines[place]), f"{place[1]:4}  {linecache.getline(*place).rstrip()}")
                 for place in others if place[0] == file]  # fmt: skip
    widths = [max(len(row[c]) for row in (*heads, *rows)) for c in range(5)]
    out = ["  ".join([*(cell.rjust(w) for cell, w in zip(row[:5], widths, strict=True)), row[5]]).rstrip()
           for row in (*heads, *rows)]  # fmt: skip
    out = [line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…" for line in out]
    return "\n".join([*out, "", "Sectors and wavefronts: of one access of a warp. In brackets: the least, if less."])
