"""`handtuned xray`: compile the kernels without a GPU, count their machine code, and say what it lets one expect.

    handtuned xray nf4 --arch sm_80,sm_90,sm_100

`gpu/machine_code.py` reads the code, `gpu/cards.py` says how many programs a multiprocessor holds at once, and
`gpu/roofline.py` models the time on the cards of that architecture; where `benchmarks/` holds times from such a card
they stand beside it.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .gpu.cards import ARCHS, GPUS
from .gpu.machine_code import Xray, all_specs, xray
from .gpu.roofline import ASSUMES, Prediction, Size, measurements, predictions
from .nn.files import whole_file

COLOURS = {"memory": "#4878a8", "tensor": "#d0803c", "issue": "#6a9a58"}
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
    parser.add_argument("names", nargs="*", help="only kernels whose name contains one of these (default: all)")
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help=f"of {','.join(ARCHS)}")
    parser.add_argument("--sass", action="store_true", help="also print the machine code")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the predicted times as bars")
    for flag, meaning in SIZES.items():
        default = 16 if flag == "rank" else 4096
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{meaning} of the predicted problem")
    parser.add_argument("--parameters", type=int, default=Size.parameters, help="for kernels over all tensors")
    parser.add_argument("--results", default="benchmarks", metavar="DIR", type=Path,
                        help="where GPU results lie (default: ./benchmarks)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a kernel does not compile or spills, else 0."""
    every = all_specs()
    specs = [spec for spec in every if not args.names or any(name in spec.name for name in args.names)]
    if not specs:
        raise ValueError(f"no kernel's name contains {args.names}; there are {[spec.name for spec in every]}")
    for flag in (*SIZES, "parameters"):
        if (value := getattr(args, flag.replace("-", "_"))) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    size = Size(args.rows, args.out_features, args.in_features, args.rank, args.parameters)
    archs, known = args.arch.split(","), measurements(args.results)
    print(f"problem: {size}", flush=True)
    found = []
    for spec in specs:
        for arch in archs:
            ray = xray(spec, arch)
            found.append((ray, list(predictions(spec, ray, size, known))))
            print(describe(*found[-1]), flush=True)
            if args.sass:
                print(ray.sass)
    print(f"\n{ASSUMES}")
    for gpu in (gpu for gpu in GPUS if gpu.arch in archs):
        print(gpu)
    if args.html:
        write_page(Path(args.html), found, size)
    return int(any(ray.error or ray.spill_bytes for ray, _ in found))


def describe(ray: Xray, expected: Sequence[Prediction] = ()) -> str:
    """What one kernel became as text, and below it what that lets one expect."""
    if ray.error:
        return f"{ray.name}  {ray.arch}  does not compile: {ray.error}"
    code, held = ray.code, ray.occupancy
    lines = [
        f"{ray.name}  {ray.arch}  {ray.registers} registers, {ray.spill_bytes} B spilled, "
        f"{ray.shared_bytes} B shared, {ray.threads} threads",
        f"    a multiprocessor holds {held.blocks} programs, {held.warps} of {held.of_warps} warps; "
        f"no more for {held.limit}",
    ]
    if ray.instructions_per_element is not None:
        lines.append(f"    {code.instructions} instructions, {ray.instructions_per_element:.2f} for each {ray.unit}")
    else:
        loops = ", ".join(f"{loop.instructions} ({loop.tensor_core} tensor-core)" for loop in code.loops)
        lines.append(f"    {code.instructions} instructions, loops of {loops}")
    accesses = sorted(code.memory.items(), key=lambda item: (item[0][0], -item[0][1]))
    for counts in ([(f"{kind} {bits} bit", n) for (kind, bits), n in accesses], code.tensor_core.items()):
        if counts:
            lines.append("    " + ", ".join(f"{n} × {what}" for what, n in counts))
    for p in expected:
        parts = ", ".join(f"{kind} {getattr(p, kind) * 1e6:.1f}" for kind in COLOURS)
        line = f"    {p.gpu.name}: predicted {p.seconds * 1e6:.1f} µs, {p.bound} bound "
        line += f"({parts}; floor {p.floor * 1e6:.1f})"
        if p.measured is not None:
            line += f"; measured {p.measured * 1e6:.1f} µs, {p.measured / p.seconds:.2f} × predicted, at {p.size}"
        lines.append(line)
    return "\n".join(lines)


def write_page(path: Path, found: Sequence[tuple[Xray, Sequence[Prediction]]], size: Size) -> None:
    """Write one HTML page without scripts or outside files: a bar each for memory, tensor cores and issue."""
    key = ", ".join(f'<span style="color:{colour}">{kind}</span>' for kind, colour in COLOURS.items())
    parts = [f"<p>Problem: {escape(str(size))}. Bars: {key}; black line: floor; red line: measured.</p>"]
    for ray, expected in found:
        parts.append(f"<h2>{escape(ray.name)} · {ray.arch}</h2><pre>{escape(describe(ray))}</pre>")
        longest = max([p.measured or 0.0 for p in expected] + [p.seconds for p in expected], default=1.0)
        parts += [_row(p, longest) for p in expected]
    with whole_file(path) as temporary:
        temporary.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>handtuned xray</title><style>{STYLE}</style>'
            f'<h1>Kernels, X-rayed</h1>{"".join(parts)}<p class="note">{escape(ASSUMES)}</p></html>\n',
            encoding="utf-8",
        )


def _row(p: Prediction, longest: float) -> str:
    share = {kind: 100 * getattr(p, kind) / longest for kind in (*COLOURS, "floor")}
    bars = "".join(f'<div class="bar" style="width:{share[kind]:.2f}%;background:{colour}"></div>'
                   for kind, colour in COLOURS.items())  # fmt: skip
    marks = f'<div class="mark floor" style="left:{share["floor"]:.2f}%"></div>'
    text = f"{p.seconds * 1e6:.1f} µs, {p.bound} (floor {p.floor * 1e6:.1f})"
    if p.measured is not None:
        marks += f'<div class="mark measured" style="left:{100 * p.measured / longest:.2f}%"></div>'
        text += f"; measured {p.measured * 1e6:.1f} µs at {p.size}"
    return (f'<div class="row"><div>{escape(p.gpu.name)}</div><div class="track">{bars}{marks}</div>'
            f"<div>{escape(text)}</div></div>")  # fmt: skip
