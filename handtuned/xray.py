"""`handtuned xray`: call the library's operations without a GPU, count what their kernels do, predict their times.

    handtuned xray nf4 --arch sm_80,sm_90,sm_100

`gpu/operations.py` says what is called, `gpu/examine.py` calls it in the emulator, `gpu/cards.py` says how many
programs a multiprocessor holds at once, and `gpu/roofline.py` models the time on the cards of that architecture; where
`benchmarks/` holds times from such a card they stand beside it.

Each operation is called twice: at a small size where every program is executed, so that bytes are exact, and at the
size asked for, where a few programs of each launch stand for all.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .gpu.cards import ARCHS, GPUS
from .gpu.examine import WHOLE, Xray, examine
from .gpu.operations import OPERATIONS, Size
from .gpu.published import published
from .gpu.roofline import ASSUMES, KINDS, Prediction, measurements, predictions
from .gpu.session import LaunchRecord
from .nn.files import whole_file

SAMPLE = 2  # programs of a launch that are executed for a prediction
COLOURS = dict(zip(KINDS, ("#4878a8", "#d0803c", "#8a64a8", "#6a9a58"), strict=True))
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { font-size: 1rem; margin: 1.6rem 0 .2rem } p, pre { margin: .2rem 0 } pre { white-space: pre-wrap }
.note { color: #666; white-space: pre-line }
.row { display: grid; grid-template-columns: 6rem 1fr 15rem; gap: .6rem; align-items: center; margin: .3rem 0 }
.track { position: relative; background: #f2f2f2 } .bar { height: .5rem; margin: 1px 0 }
.mark { position: absolute; top: -2px; bottom: -2px; width: 2px } .floor { background: #222 }
.measured { background: #c02020 }
"""
SIZES = {"rows": "M", "out-features": "N", "in-features": "K", "rank": "r"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add xray's options to a parser."""
    parser.add_argument("names", nargs="*", help="only operations whose name contains one of these (default: all)")
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help=f"of {','.join(ARCHS)}")
    parser.add_argument("--every-tile", action="store_true", help="of tuned kernels, not the first that fits alone")
    parser.add_argument("--check", action="store_true", help="only compile; print what fails")
    parser.add_argument("--sass", action="store_true", help="also print the machine code")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the predicted times as bars")
    for flag, meaning in SIZES.items():
        default = 16 if flag == "rank" else 4096
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} of the predicted problem")
    parser.add_argument("--parameters", type=int, default=Size.parameters, help="for kernels over all tensors")
    parser.add_argument("--results", default="benchmarks", metavar="DIR", type=Path,
                        help="where GPU results lie (default: ./benchmarks)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a kernel does not compile, does not fit on its card, or spills, else 0."""
    chosen = [op for op in OPERATIONS.values() if not args.names or any(name in op.name for name in args.names)]
    if not chosen:
        raise ValueError(f"no operation's name contains {args.names}; there are {list(OPERATIONS)}")
    for flag in (*SIZES, "parameters"):
        if (value := getattr(args, flag.replace("-", "_"))) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    size = Size(args.rows, args.out_features, args.in_features, args.rank, args.parameters)
    archs, known = args.arch.split(","), measurements(args.results)
    if args.check:
        return _check(chosen, archs, size, args.every_tile)
    print(f"problem: {size}; counted whole at {WHOLE}", flush=True)
    found = []
    for operation in chosen:
        for arch in archs:
            cards = [gpu for gpu in GPUS if gpu.arch == arch]
            measured = [size.but(m.size) for m in known if any(m.fits(operation.name, gpu) for gpu in cards)]
            for at in [WHOLE, *dict.fromkeys([size, *measured])]:
                whole = at is WHOLE
                for ray in examine(operation, arch, at, None if whole else SAMPLE, args.every_tile):
                    found.append((ray, [] if whole else list(predictions(ray, known))))
                    print(describe(*found[-1]), flush=True)
                    if args.sass and not whole:
                        print(*(launch.sass for launch in ray.launches), sep="\n")
    print(f"\n{ASSUMES}")
    for arch in archs:
        print(*(gpu for gpu in GPUS if gpu.arch == arch), *published(arch), sep="\n")
    if args.html:
        write_page(Path(args.html), found, size)
    return int(any(ray.error or ray.spill_bytes for ray, _ in found))


def _check(chosen, archs, size, every_tile) -> int:
    failed = kernels = 0
    for operation in chosen:
        for ray in (ray for arch in archs for ray in examine(operation, arch, size, 0, every_tile)):
            kernels += len(ray.launches)
            if ray.error or ray.spill_bytes:
                failed += 1
                print(describe(ray), flush=True)
    print(f"{len(chosen)} operations, {kernels} kernels compiled for {', '.join(archs)}: {failed} fail")
    return int(failed > 0)


def describe(ray: Xray, expected: Sequence[Prediction] = ()) -> str:
    """What one operation launched as text, and below it what that lets one expect."""
    if ray.error:
        return f"{ray.name}  {ray.arch}  fails: {ray.error}"
    lines = [f"{ray.name}  {ray.arch}  at {ray.size}"]
    for launch in ray.launches:
        lines += _launch_lines(ray, launch)
    if ray.whole:
        moved = sum(launch.counters.dram_read_bytes + launch.counters.dram_written_bytes for launch in ray.launches)
        floor = ray.operation.bytes(ray.size)
        lines.append(f"    DRAM {moved:,} B from a cold L2, floor {floor:,} B: {moved / floor:.2f} ×")
    lines += [f"    {_prediction_line(p)}" for p in expected]
    return "\n".join(lines)


def _launch_lines(ray: Xray, launch: LaunchRecord):
    held, counted = launch.occupancy, launch.counters
    yield (f"    {launch.name}: {launch.programs} programs of {launch.threads} threads, {launch.registers} "
           f"registers, {launch.spill_bytes} B spilled, {launch.shared_bytes} B shared")  # fmt: skip
    yield (f"        a multiprocessor holds {held.blocks} programs, {held.warps} of {held.of_warps} warps; "
           f"no more for {held.limit}")  # fmt: skip
    if not launch.sampled:
        loops = ", ".join(f"{loop.instructions} ({loop.tensor_core} tensor-core)" for loop in launch.code.loops)
        memory = sorted(launch.code.memory.items())
        yield f"        not executed; {launch.code.instructions} instructions, loops of {loops or 'none'}"
        yield "        " + ", ".join(f"{n} × {kind} {bits} bit" for (kind, bits), n in memory)
        return
    units = ray.operation.units(ray.size)
    each = 32 * launch.scale / units
    pipes = sorted(counted.instructions.items(), key=lambda pipe: -pipe[1])
    yield (f"        {32 * launch.warp_instructions / units:.2f} instructions for each {ray.operation.unit}; of PTX "
           + ", ".join(f"{pipe} {n * each:.2f}" for pipe, n in pipes if n * each >= 0.005))  # fmt: skip
    traffic = (("load", counted.global_loads), ("store", counted.global_stores), ("shared access", counted.shared))
    parts = [f"{t.per_request:.1f} {t.unit} per {name} ({t.least / t.requests:.1f} at least)"
             for name, t in traffic if t.requests]  # fmt: skip
    if counted.tensor_flops:
        parts.append(f"{counted.tensor_flops * launch.scale / 1e9:.4g} GFLOP on tensor cores")
    yield "        " + ", ".join(parts)


def _microseconds(times) -> str:
    low, high = (1e6 * t for t in times)
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f}–{high:.1f}"


def _prediction_line(p: Prediction) -> str:
    parts = ", ".join(f"{kind} {_microseconds(getattr(p, kind))}" for kind in KINDS if max(getattr(p, kind)))
    predicted = f"predicted {_microseconds(p.seconds)} µs, {p.bound} bound"
    line = f"{p.gpu.name}: {predicted} ({parts}; floor {p.floor * 1e6:.1f})"
    if p.measured is not None:
        low, high = p.seconds
        line += f"; measured {p.measured * 1e6:.1f} µs, {p.measured / ((low + high) / 2):.2f} × the middle"
    return line


def write_page(path: Path, found: Sequence[tuple[Xray, Sequence[Prediction]]], size: Size) -> None:
    """Write one HTML page without scripts or outside files: a bar each for memory, tensor, shared memory and issue."""
    key = ", ".join(f'<span style="color:{colour}">{kind}</span>' for kind, colour in COLOURS.items())
    parts = [f"<p>Problem: {escape(str(size))}. Bars: {key}, to their pessimistic ends; black line: floor; "
             "red line: measured.</p>"]  # fmt: skip
    for ray, expected in found:
        parts.append(f"<h2>{escape(ray.name)} · {ray.arch}</h2><pre>{escape(describe(ray))}</pre>")
        longest = max([p.measured or 0.0 for p in expected] + [max(p.seconds) for p in expected], default=1.0)
        parts += [_row(p, longest) for p in expected]
    with whole_file(path) as temporary:
        temporary.write_text('<!doctype html><html lang="en"><meta charset="utf-8"><title>handtuned xray</title>'
                             f'<style>{STYLE}</style><h1>Kernels, X-rayed</h1>{"".join(parts)}'
                             f'<p class="note">{escape(ASSUMES)}</p></html>\n', encoding="utf-8")  # fmt: skip


def _row(p: Prediction, longest: float) -> str:
    bars = "".join(f'<div class="bar" style="width:{100 * max(getattr(p, kind)) / longest:.2f}%;background:{colour}">'
                   "</div>" for kind, colour in COLOURS.items())  # fmt: skip
    marks = f'<div class="mark floor" style="left:{100 * p.floor / longest:.2f}%"></div>'
    if p.measured is not None:
        marks += f'<div class="mark measured" style="left:{100 * p.measured / longest:.2f}%"></div>'
    return (f'<div class="row"><div>{escape(p.gpu.name)}</div><div class="track">{bars}{marks}</div>'
            f"<div>{escape(_prediction_line(p))}</div></div>")  # fmt: skip
