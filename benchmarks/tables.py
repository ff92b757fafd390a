"""Tables in benchmarks/README.md from the JSON files beside it: `python benchmarks/tables.py`.

Between `<!-- FILE.json -->` and `<!-- end of FILE.json -->` stands what `render` makes of that file and nothing else,
so no figure in the tables is typed by hand.
"""

import argparse
import json
import re
from pathlib import Path

from handtuned.nn.files import whole_file

from handtuned.bench import unit_of
from handtuned.harness.timing import OURS, cut_short

MARKED = re.compile(r"<!-- (?P<file>[\w.-]+\.json) -->\n.*?<!-- end of (?P=file) -->", re.DOTALL)


def _time(seconds: float) -> str:
    factor, unit = unit_of(seconds)
    return f"{seconds * factor:.3g} {unit}"


def _spread(taken: dict) -> str:
    return f"{_time(taken['median'])} ({_time(taken['p20'])} – {_time(taken['p80'])})"


def _head(report: dict) -> str:
    device, ceilings = report["device"], report["ceilings"]
    name = device["name"] + (f", {device['threads']} threads" if device["kind"] == "cpu" else f" ({device['arch']})")
    if device.get("before"):
        clocks = {state["clocks.sm"] for state in device["after"].values() if state}
        name += f", driver {device['before']['driver_version']}, clocks seen {', '.join(sorted(clocks))}"
    known = ", ".join(f"{key} {value}" for key, value in report["versions"].items() if value != "not installed")
    found = ", ".join(
        f"copy {value / 1e9:.3g} GB/s" if key == "copy" else f"{key} product {value / 1e12:.3g} TFLOP/s"
        for key, value in ceilings.items()
    )
    return (f"`{report['command']}`, {report['date'][:10]}, seed {report['seed']}: {name}. {known}. "
            f"Ceilings measured in the run: {found}.")  # fmt: skip


def _rows(record: dict) -> list[str]:
    others = dict(record["contestants"])
    ours = others.pop(OURS, None)
    work = " – ".join([record["name"], *cut_short(record)])
    rows = []
    if ours:
        share = f"{ours['of_ceiling']:.0%}" if "of_ceiling" in ours else "–"
        beside = [f"{name} | {_spread(taken)} | {taken['ratio']:.2f}" for name, taken in others.items()]
        rows = [f"| {work} | {_spread(ours)} | {share} | {cells} |" for cells in beside or ["– | – | –"]]
    notes = {**record["skipped"], **{name: f"not timed: {why}" for name, why in record["failed"].items()}}
    return rows + [f"| {work} | | | {name} | {why.replace('|', '/')} | |" for name, why in notes.items()]


def _training(record: dict) -> list[str]:
    lines = ["", f"{record['name']}:", ""]
    lines += ["| | tokens per second | peak memory | loss of the steps |", "|---|---|---|---|"]
    for name, taken in record["contestants"].items():
        losses = ", ".join(f"{loss:.3f}" for loss in taken["losses"])
        lines.append(f"| {name} | {taken['tokens_per_second']:.0f} | {taken['peak_bytes'] / 1e6:,.0f} MB | {losses} |")
    return lines


def render(report: dict) -> str:
    """One run as Markdown: how it was had, one table of all times and ratios, and one of the training steps."""
    every = [record for results in report["results"].values() for record in results]
    lines = [_head(report), ""]
    lines += ["| work | handtuned: median (p20 – p80) | of ceiling | beside | its median (p20 – p80) | ratio |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [row for record in every for row in _rows(record)]
    for record in every:
        if any("losses" in taken for taken in record["contestants"].values()):
            lines += _training(record)
    return "\n".join(lines)


def updated(text: str, folder: Path) -> str:
    """A page with every marked table made anew from the JSON file that its marker names, in `folder`."""

    def table(found: re.Match) -> str:
        name = found["file"]
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        return f"<!-- {name} -->\n{render(report)}\n<!-- end of {name} -->"

    return MARKED.sub(table, text)


def main() -> int:
    """Rewrite the page; with --check only say whether that would change it (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="of README.md and the JSON files")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the tables are out of date")
    args = parser.parse_args()
    page = args.folder / "README.md"
    before = page.read_text(encoding="utf-8")
    after = updated(before, args.folder)
    if not args.check and after != before:
        with whole_file(page) as temporary:
            temporary.write_text(after, encoding="utf-8")
    return int(args.check and after != before)


if __name__ == "__main__":
    raise SystemExit(main())
