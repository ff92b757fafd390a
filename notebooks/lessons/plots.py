"""One style for every picture of the lessons: greys and one accent, readable in black and white.

Series differ in line style, marker and hatch as well as in colour. Pictures are small PNGs with alt text.
"""

import base64
import io

ACCENT = "#c2410c"
GREYS = ("#1f2937", "#6b7280", "#9ca3af", "#d1d5db")
COLORS = (GREYS[0], ACCENT, GREYS[1], GREYS[2])
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xx")
MAX_BYTES = 100_000

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREYS[1],
    "axes.grid": False,
    "grid.color": GREYS[3],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}


def figure(width: float = 7, height: float = 3, columns: int = 1, rows: int = 1, **subplots):
    """A figure in the house style.

    Args:
        width, height: inches; at 100 dots per inch.
        columns, rows: of axes.
        **subplots: for `plt.subplots` (sharex, width_ratios, …).

    Returns:
        (figure, axes): one Axes, or an array of them.
    """
    plt = _pyplot()
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **subplots)


def _pyplot():
    import matplotlib

    matplotlib.use("agg")  # no window is ever opened
    import matplotlib.pyplot as plt
    from cycler import cycler

    # For the whole session: what a lesson adds to the axes later (a legend) is to look the same.
    plt.rcParams.update(_STYLE)
    plt.rcParams["axes.prop_cycle"] = cycler(color=COLORS) + cycler(linestyle=LINES)
    return plt


def show(fig, alt: str) -> None:
    """Display a figure as a PNG with alt text, and close it.

    Args:
        alt: what someone who cannot see the picture should know; one or two sentences.

    Raises:
        ValueError: no alt text, or the picture has more than 100 KB.
    """
    if not alt.strip():
        raise ValueError("alt must say what the picture shows")
    from .notebook import display

    plt = _pyplot()
    stream = io.BytesIO()
    fig.savefig(stream, format="png", metadata={"Software": None})
    plt.close(fig)
    data = stream.getvalue()
    if len(data) > MAX_BYTES:
        raise ValueError(f"the picture has {len(data)} bytes; make it smaller or simpler than {MAX_BYTES}")
    # nbconvert and GitHub take the alt text from the metadata.
    display(
        {"image/png": base64.b64encode(data).decode(), "text/plain": f"[picture: {alt}]"},
        metadata={"image/png": {"alt": alt}},
    )


def bars(ax, labels, values, unit: str = "", accent: int | None = None, form: str = "{:,.3g}") -> None:
    """Horizontal bars with their figures written beside them, first label on top.

    Args:
        labels, values: of equal length.
        unit: behind each figure and on the axis.
        accent: index of the bar to stress.
        form: how a figure is written.
    """
    places = range(len(labels))
    for place, value in zip(places, values, strict=True):
        stressed = place == accent
        ax.barh(place, value, height=0.6, color=ACCENT if stressed else GREYS[2],
                edgecolor=GREYS[0], linewidth=0.6, hatch="///" if stressed else "")  # fmt: skip
        ax.text(value, place, f" {form.format(value)} {unit}".rstrip(), va="center", ha="left", fontsize=8)
    ax.set_yticks(list(places), labels)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.margins(x=0.18)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def dots(ax, labels, values, accent: int | None = None, form: str = "{:,.3g}") -> None:
    """Values that are far from zero, as dots with their figures, first label on top: a dot needs no axis from zero.

    Args:
        labels, values: of equal length.
        accent: index of the dot to stress.
        form: how a figure is written.
    """
    for place, value in enumerate(values):
        stressed = place == accent
        ax.plot(value, place, "D" if stressed else "o", color=ACCENT if stressed else GREYS[0])
        ax.annotate(form.format(value), (value, place), (7, 0), textcoords="offset points", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(axis="y")
    ax.margins(x=0.18, y=0.08)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)


def stacked(ax, labels, parts: dict, unit: str = "", form: str = "{:,.3g}") -> None:
    """Horizontal bars that consist of parts, with a legend and the sum beside each.

    Args:
        labels: of the bars, the first on top.
        parts: name → one value per bar.
    """
    left = [0.0] * len(labels)
    fills = ((GREYS[3], ""), (GREYS[2], "///"), (ACCENT, ""), ("white", "..."), (GREYS[1], "xx"), ("white", ""))
    for (name, values), (color, hatch) in zip(parts.items(), fills, strict=False):
        ax.barh(range(len(labels)), values, left=left, height=0.6, label=name, color=color, hatch=hatch,
                edgecolor=GREYS[0], linewidth=0.6)  # fmt: skip
        left = [start + value for start, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        ax.text(total, place, f" {form.format(total)} {unit}".rstrip(), va="center", ha="left", fontsize=8)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.margins(x=0.14)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(parts), 5))


def bit_row(ax, bits: str, names: dict[str, int] | None = None, y: float = 0.0, label: str = "") -> None:
    """A row of bits as boxes, one shade per field.

    Args:
        bits: "0 10000 1100000000"; blanks are ignored.
        names: field name → number of bits, from the left.
        y: height of the row; rows are 1 apart.
        label: written to the left.
    """
    bits = bits.replace(" ", "")
    names = names or {"": len(bits)}
    fills = ("white", GREYS[3], GREYS[2], "#fed7aa")
    place = 0
    for (name, width), color in zip(names.items(), fills, strict=False):
        for bit in bits[place : place + width]:
            ax.add_patch(_rectangle(place, y, 1, 0.7, facecolor=color))
            ax.text(place + 0.5, y + 0.33, bit, ha="center", va="center", fontsize=8)
            place += 1
        middle, align = (place, "right") if width == 1 else (place - width / 2, "center")
        ax.text(middle, y + 0.74, name, ha=align, va="bottom", fontsize=7, color=GREYS[1])
    if label:
        ax.text(-0.4, y + 0.33, label, ha="right", va="center")
    ax.set_xlim(min(ax.get_xlim()[0], -5), max(ax.get_xlim()[1], len(bits) + 0.5))
    ax.set_ylim(min(ax.get_ylim()[0], y - 0.2), max(ax.get_ylim()[1], y + 1.2))
    ax.axis("off")


def who_reads(ax, owners, title: str = "", outside: int | None = None) -> None:
    """A tensor as a grid of boxes, each with the number of the program that touches it.

    Args:
        owners: 1- or 2-dimensional list or array of program numbers; -1 for nobody.
        title: above the grid.
        outside: in a 1-dimensional tensor, elements from here on lie beyond its end and are crossed.
    """
    grid = [list(row) for row in owners] if hasattr(owners[0], "__len__") else [list(owners)]
    fills = (GREYS[3], "#f3f4f6", GREYS[2], "#fed7aa")
    for i, row in enumerate(grid):
        for j, owner in enumerate(row):
            beyond = outside is not None and j >= outside
            color = "white" if owner < 0 else fills[int(owner) % len(fills)]
            ax.add_patch(_rectangle(j, i, 1, 1, facecolor=color, hatch="xxx" if beyond else None,
                                    linestyle="--" if beyond else "-"))  # fmt: skip
            if owner >= 0:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6} if beyond else None
                ax.text(j + 0.5, i + 0.5, str(owner), ha="center", va="center", fontsize=8, bbox=box)
    ax.set_xlim(-0.1, len(grid[0]) + 0.1)
    ax.set_ylim(len(grid) + 0.1, -0.1)
    ax.set_aspect("equal")
    ax.set_title(title)
    ax.axis("off")


def _rectangle(x, y, width, height, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, edgecolor=GREYS[1], linewidth=0.8, **style)
