"""Drawings of what cannot be plotted: LoRA's side path, the levels of a GPU's memory, the loop of mixed precision,
an adapter's life. Boxes and arrows in the house style; each is shown in the lesson that needs it.
"""

from .plots import ACCENT, GREYS, figure, show

_FILLS = {"": "white", "frozen": GREYS[3], "trained": "#fed7aa"}


def _canvas(width: float, height: float):
    """Axes whose unit is a tenth of an inch, without ticks; whatever is drawn lies inside."""
    fig, ax = figure(width, height)
    ax.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    ax.axis("off")
    return fig, ax


def _box(ax, x, y, width, height, text, kind="", size=9):
    """A box around its centre: frozen ones grey and hatched, trained ones in the accent's tint."""
    from matplotlib.patches import FancyBboxPatch

    edge = ACCENT if kind == "trained" else GREYS[0]
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=_FILLS[kind], edgecolor=edge,
                                boxstyle="round,pad=0,rounding_size=0.8"))  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", fontsize=size)


def _arrow(ax, start, end, text="", at=(0, 0), dashed=False):
    """An arrow; its text stands at the middle, moved by `at`."""
    style = {"arrowstyle": "->", "color": GREYS[0], "shrinkA": 0, "shrinkB": 0, "linestyle": "--" if dashed else "-"}
    ax.annotate("", end, start, arrowprops=style)
    x, y = ((one + other) / 2 + moved for one, other, moved in zip(start, end, at, strict=True))
    ax.text(x, y, text, ha="center", va="center", fontsize=8)


def lora_path() -> None:
    """x goes through the frozen W, and beside it through A and B; the two results are added."""
    fig, ax = _canvas(7, 2.5)
    _box(ax, 5, 12.5, 7, 5, "x\n(in)")
    _box(ax, 31, 19, 20, 7, "W, frozen\n(out, in)", "frozen")
    _box(ax, 19, 6, 10, 5, "A\n(r, in)", "trained")
    _box(ax, 39, 6, 10, 5, "B\n(out, r)", "trained")
    _box(ax, 51.5, 6, 8, 5, "× α/r")
    _box(ax, 57, 16, 4, 4, "+")
    _box(ax, 66, 16, 6, 5, "y\n(out)")
    _arrow(ax, (8.5, 14), (21, 19))
    _arrow(ax, (8.5, 11), (14, 6.5))
    _arrow(ax, (24, 6), (34, 6), "r numbers", (0, 1.8))
    _arrow(ax, (44, 6), (47.5, 6))
    _arrow(ax, (41, 19), (55, 16.8))
    _arrow(ax, (53, 8.5), (56.3, 14))
    _arrow(ax, (59, 16), (63, 16))
    show(
        fig,
        alt="LoRA's side path: x goes through the frozen W (out × in), and beside it through A (r × in) and "
        "B (out × r), which are trained; the side path's result, times alpha / r, is added to W's.",
    )


def memory_levels() -> None:
    """The levels of an A100's memory, from the registers of one multiprocessor to the card's main memory."""
    fig, ax = _canvas(7, 3)
    levels = (
        ("registers", "256 KB per multiprocessor", "a thread's own: tl.zeros, acc", 25),
        ("shared memory and L1", "192 KB per multiprocessor", "a program's own: tiles for tl.dot; 32 banks", 34),
        ("L2 cache", "40 MB", "all programs': no word in Triton", 43),
        ("main memory (HBM)", "40 or 80 GB", "tensors: tl.load, tl.store, in sectors of 32 bytes", 52),
    )
    for place, (name, size, use, width) in enumerate(levels):
        y = 26 - 7.4 * place
        _box(ax, 27, y, width, 5, f"{name}: {size}\n{use}", "trained" if place == 0 else "", 8)
        if place:
            _arrow(ax, (27, y + 2.5), (27, y + 4.9))
    _arrow(ax, (61, 4), (61, 27))
    ax.text(62, 25, "faster", fontsize=8, va="center")
    ax.text(62, 5, "larger", fontsize=8, va="center")
    show(
        fig,
        alt="Four levels of an A100's memory, each larger and slower than the one above: registers, 256 KB per "
        "multiprocessor; shared memory and L1, 192 KB per multiprocessor; L2, 40 MB; main memory, 40 or 80 GB.",
    )


def mixed_precision_loop() -> None:
    """One step: FP32 masters are rounded, forward and backward run in FP16 with a scaled loss, the update in FP32."""
    fig, ax = _canvas(7, 3)
    _box(ax, 10, 23, 16, 6, "weights, FP32\n(masters)", "frozen")
    _box(ax, 35, 23, 16, 6, "forward\nin FP16", "trained")
    _box(ax, 60, 23, 16, 6, "loss, FP32\n× scale", "frozen")
    _box(ax, 60, 7, 16, 6, "backward\nin FP16", "trained")
    _box(ax, 35, 7, 16, 6, "unscale in FP32,\nall finite?", "frozen")
    _box(ax, 10, 7, 16, 6, "clip,\nstep of Adam", "frozen")
    _arrow(ax, (18, 23), (27, 23), "round", (0, 1.8))
    _arrow(ax, (43, 23), (52, 23))
    _arrow(ax, (60, 20), (60, 10))
    _arrow(ax, (52, 7), (43, 7))
    _arrow(ax, (27, 7), (18, 7), "yes", (0, 1.8))
    _arrow(ax, (10, 10), (10, 20))
    _arrow(ax, (35, 10), (35, 15), "no: skip the step,\nhalve the scale", (0, 4.6), dashed=True)
    show(
        fig,
        alt="The loop of mixed precision: FP32 weights are rounded to FP16 for the forward pass, the FP32 loss is "
        "multiplied by the scale, backward runs in FP16, gradients are unscaled in FP32; if all are finite they are "
        "clipped and Adam changes the FP32 weights, otherwise the step is skipped and the scale halved.",
    )


def adapter_life() -> None:
    """Put in, trained, saved; then loaded beside the base, or merged into it and taken out again."""
    fig, ax = _canvas(7, 2.8)
    _box(ax, 8, 22, 14, 6, "base model,\nfrozen", "frozen")
    _box(ax, 31, 22, 14, 6, "A, B put in,\nB = 0", "trained")
    _box(ax, 54, 22, 14, 6, "A, B trained", "trained")
    _box(ax, 54, 6, 14, 6, "adapter file:\nA, B, r, α", "trained")
    _box(ax, 31, 6, 14, 6, "beside W: many\nin one base", "trained")
    _box(ax, 8, 6, 14, 6, "merged: W + s·BA", "frozen", 8)
    _arrow(ax, (15, 22), (24, 22), "apply", (0, 1.8))
    _arrow(ax, (38, 22), (47, 22), "train", (0, 1.8))
    _arrow(ax, (54, 19), (54, 9), "save", (3.5, 0))
    _arrow(ax, (47, 6), (38, 6), "load", (0, 1.8))
    _arrow(ax, (24, 7.2), (15, 7.2), "merge", (0, 1.8))
    _arrow(ax, (15, 4.8), (24, 4.8), "unmerge", (0, -1.8), dashed=True)
    show(
        fig,
        alt="An adapter's life: A and B are put into a frozen base model, with B at zero; trained; saved in a file of "
        "their own; loaded beside the weights, several in one base; merged into W, and taken out again.",
    )
