"""What the emulator says in words: a table of launches, and a kernel's source with its costs beside it."""

_HEAD = ("kernel", "launches", "programs", "warps", "shared", "instructions", "tensor GFLOP", "sectors/load",
         "sectors/store", "wavefronts/access", "DRAM in", "DRAM out", "barriers", "divergent")  # fmt: skip


def amount(n: float) -> str:
    """1234567 → "1.2 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(n) < 1000 or unit == " G":
            return f"{n:.0f}{unit}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return ""


def _ratio(traffic) -> str:
    """Cost of a request, and the least possible where that is lower."""
    if not traffic.requests:
        return "–"
    cost, least = traffic.cost / traffic.requests, traffic.least / traffic.requests
    return f"{cost:.1f}" if abs(cost - least) < 0.05 else f"{cost:.1f} ({least:.1f})"


def _rows(gpu):
    for name, launches in gpu.by_kernel().items():
        total = gpu.counters(name)
        yield (
            name, str(len(launches)), amount(sum(launch.programs for launch in launches)), str(launches[0].warps),
            f"{max(launch.shared_bytes for launch in launches)} B", amount(total.warp_instructions),
            f"{total.tensor_flops / 1e9:.3f}" if total.tensor_flops else "–", _ratio(total.global_loads),
            _ratio(total.global_stores), _ratio(total.shared), f"{amount(total.dram_read_bytes)}B",
            f"{amount(total.dram_written_bytes)}B", amount(total.barriers), amount(total.divergent_branches),
        )  # fmt: skip


def table(gpu) -> str:
    """All kernels of an emulator, one a row."""
    rows = list(_rows(gpu))
    if not rows:
        return f"{gpu.arch}, emulated: no kernel was launched"
    widths = [max(len(row[c]) for row in (_HEAD, *rows)) for c in range(len(_HEAD))]

    def line(row):
        first, *rest = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *rest])

    notes = (
        "instructions: of warps (32 threads each). sectors: of 32 bytes, for a request of a warp. wavefronts: passes\n"
        "over the 32 banks of shared memory. In brackets: the fewest possible. DRAM: each sector once, cold cache."
    )
    return "\n".join([f"{gpu.arch}, emulated: {len(gpu.launches)} launches", line(_HEAD), *map(line, rows), "", notes])


def _costs(counters) -> tuple:
    if counters is None:
        return ("", "", "", "", "")
    return (
        amount(counters.warp_instructions),
        _ratio(counters.global_loads) if counters.global_loads.requests else "",
        _ratio(counters.global_stores) if counters.global_stores.requests else "",
        _ratio(counters.shared) if counters.shared.requests else "",
        str(counters.barriers) if counters.barriers else "",
    )


def source_listing(counters, file, lines, first) -> str:
    """The lines of a function, then those of the functions that it calls, each with its costs.

    Args:
        counters: of the kernel.
        file, lines, first: the source lines of the kernel and the number of the first.
    """
    head = ("instr.", "ld sectors", "st sectors", "wavefronts", "barriers")
    rows = [(*_costs(counters.lines.get((file, n))), f"{n:4} {text.rstrip()}") for n, text in enumerate(lines, first)]
    inside = {(file, n) for n in range(first, first + len(lines))}
    others = sorted(place for place in counters.lines if place not in inside)
    rows += [(*_costs(counters.lines[place]), f"{place[1]:4} {_text(place)}") for place in others]
    widths = [max(len(row[c]) for row in (head, *rows)) for c in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=True)) + "  " + row[-1]
        for row in ((*head, "line"), *rows)
    )


def _text(place):
    """A source line of another function, with its file's name."""
    import linecache
    import os

    return f"{linecache.getline(*place).rstrip()}  [{os.path.basename(place[0])}]"
