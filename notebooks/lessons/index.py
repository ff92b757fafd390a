"""`notebooks/README.md` (map of the course, table of claims) and `GLOSSARY.md`, made from the executed notebooks."""

import re
from dataclasses import dataclass
from pathlib import Path

from .claims import CLAIMS, DOCUMENTS, MIMETYPE


@dataclass(frozen=True)
class Lesson:
    """An executed notebook, as far as the index needs it.

    Attributes:
        number: "00"…"12".
        path: of the .ipynb.
        title: of its first heading.
        terms: English → Chinese, from the line "Terms: …" of the opening cell.
        claims: number → the record that `claim` left, for each output that has one.
    """

    number: str
    path: Path
    title: str
    terms: dict[str, str]
    claims: list[dict]


def lessons(folder: Path) -> list[Lesson]:
    """The executed notebooks of a folder, in order."""
    import nbformat

    found = []
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        heading = re.search(r"^# (?:\d\d\.? )?(.+)$", cells[0].source, re.M)
        outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
        records = [output.data[MIMETYPE] for output in outputs if MIMETYPE in output.get("data", {})]
        title = heading.group(1) if heading else path.stem
        found.append(Lesson(path.name[:2], path, title, _terms(cells[0].source), records))
    return found


def _terms(opening: str) -> dict[str, str]:
    line = re.search(r"^Terms: (.+)$", opening, re.M)
    # The Chinese part begins at the first Chinese character, or at a lone sign before it ("4 位量化").
    found = re.findall(r"([^,，]*?)\s+((?:\w )?[一-鿿][^,，.]*)", line.group(1)) if line else []
    return {english.strip(): chinese.strip() for english, chinese in found}


def index(folder: Path) -> str:
    """The text of `README.md` for the notebooks in a folder."""
    course = lessons(folder)
    measured = {record["claim"]: (lesson, record["measured"]) for lesson in course for record in lesson.claims}
    lines = [
        "# The lessons",
        "",
        "<!-- Written by `python -m handtuned.lessons index`; edit lessons/index.py instead. -->",
        "",
        "`make lessons` installs what is needed and opens them; `make check-lessons` runs them all.",
        "Nothing needs a GPU.",
        "Each `.py` is the source of the `.ipynb` beside it, which holds the outputs and can be read here.",
        "Terms in English and Chinese: [GLOSSARY.md](GLOSSARY.md).",
        "",
        "| | lesson | claims tested |",
        "|---|---|---|",
    ]
    for lesson in course:
        numbers = ", ".join(str(record["claim"]) for record in lesson.claims) or "–"
        lines.append(f"| {lesson.number} | [{lesson.title}]({lesson.path.name}) | {numbers} |")
    lines += [
        "",
        "## What the notes claim, and what came out",
        "",
        "The course follows five study documents: "
        + ", ".join(f"{key} *{name}*" for key, name in DOCUMENTS.items())
        + ". Each claim is measured and asserted in one lesson. *Imprecise* means right in part or under conditions.",
        "",
        "| claim | from | the notes say | lesson | verdict | measured |",
        "|---|---|---|---|---|---|",
    ]
    names = {lesson.number: lesson.path.name for lesson in course}
    for number, entry in CLAIMS.items():
        lesson, figures = measured.get(number, (None, "–"))
        where = f"[{entry.notebook}]({names[entry.notebook]})" if lesson else entry.notebook
        cells = [str(number), ", ".join(entry.documents), entry.says, where, entry.verdict, figures]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def glossary(folder: Path) -> str:
    """The text of `GLOSSARY.md`: every term of the opening cells, where it is first used."""
    lines = [
        "# Glossary 术语表",
        "",
        "<!-- Written by `python -m handtuned.lessons index` from the opening cells of the lessons. -->",
        "",
        "| English | 中文 | first used in |",
        "|---|---|---|",
    ]
    seen: dict[str, tuple[str, Lesson]] = {}
    for lesson in lessons(folder):
        for english, chinese in lesson.terms.items():
            seen.setdefault(english, (chinese, lesson))
    for english, (chinese, lesson) in sorted(seen.items(), key=lambda item: item[0].lower()):
        lines.append(f"| {_cell(english)} | {_cell(chinese)} | [{lesson.number}]({lesson.path.name}) |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell."""
    return " ".join(text.replace("|", "\\|").replace("*", "\\*").split())
