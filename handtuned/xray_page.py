"""The X-ray as one HTML page without scripts or outside files: a bar each for memory, tensor cores and issue."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .nn.files import whole_file
from .predict import ASSUMES, Prediction, Size

COLOURS = {"memory": "#4878a8", "tensor": "#d0803c", "issue": "#6a9a58"}
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { font-size: 1rem; margin: 1.6rem 0 .2rem } p { margin: .2rem 0 } .note { color: #666; white-space: pre-line }
.row { display: grid; grid-template-columns: 6rem 1fr 15rem; gap: .6rem; align-items: center; margin: .3rem 0 }
.track { position: relative; background: #f2f2f2 } .bar { height: .5rem; margin: 1px 0 }
.mark { position: absolute; top: -2px; bottom: -2px; width: 2px } .floor { background: #222 }
.measured { background: #c02020 }
"""


def _row(p: Prediction, longest: float) -> str:
    share = lambda seconds: 100 * seconds / longest  # noqa: E731
    bars = "".join(
        f'<div class="bar" style="width:{share(getattr(p, kind)):.2f}%;background:{colour}"></div>'
        for kind, colour in COLOURS.items()
    )
    marks = f'<div class="mark floor" style="left:{share(p.floor):.2f}%"></div>'
    said = f"{p.seconds * 1e6:.1f} µs, {p.bound} (floor {p.floor * 1e6:.1f})"
    if p.measured is not None:
        marks += f'<div class="mark measured" style="left:{share(p.measured):.2f}%"></div>'
        said += f"; measured {p.measured * 1e6:.1f} µs at {p.size}"
    return (f'<div class="row"><div>{escape(p.gpu.name)}</div><div class="track">{bars}{marks}</div>'
            f"<div>{escape(said)}</div></div>")  # fmt: skip


def page(found: Sequence, size: Size) -> str:
    """HTML of [(X-ray, its predictions)]."""
    key = ", ".join(f'<span style="color:{colour}">{kind}</span>' for kind, colour in COLOURS.items())
    parts = [f"<p>Problem: {escape(str(size))}. Bars: {key}; black line: floor; red line: measured.</p>"]
    for ray, expected in found:
        parts.append(f"<h2>{escape(ray.name)} · {ray.arch}</h2>")
        if ray.error:
            parts.append(f"<p>does not compile: {escape(ray.error)}</p>")
            continue
        held = ray.occupancy
        tensor = ", ".join(f"{n} × {family}" for family, n in ray.code.tensor_core.items()) or "none"
        parts.append(
            f"<p>{ray.registers} registers, {ray.spill_bytes} B spilled, {ray.shared_bytes} B shared, {ray.threads} "
            f"threads; {held.blocks} programs and {held.warps} of {held.of_warps} warps a multiprocessor "
            f"({held.limit}); {ray.code.instructions} instructions; tensor-core instructions: {tensor}</p>"
        )
        longest = max([p.measured or 0.0 for p in expected] + [p.seconds for p in expected], default=1.0)
        parts += [_row(p, longest) for p in expected]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>handtuned xray</title><style>{STYLE}</style>'
            f'<h1>Kernels, X-rayed</h1>{"".join(parts)}<p class="note">{escape(ASSUMES)}</p></html>\n')  # fmt: skip


def write_page(path: Path, found: Sequence, size: Size) -> None:
    """Write `page`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(page(found, size), encoding="utf-8")
