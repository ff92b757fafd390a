"""`notebooks/README.md` (map of the course, table of claims) and `GLOSSARY.md`, made from the executed notebooks."""

import re
from dataclasses import dataclass
from pathlib import Path

from . import build, paired
from .claims import CLAIMS, DOCUMENTS, MIMETYPE, VERDICTS
from .course import level
from .exercise import exercises_of


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


def chinese_title(path: Path) -> str:
    """Of a Chinese notebook: its first heading without the lesson's number."""
    import nbformat

    heading = re.search(r"^# (?:\d\d[.．、]? *)?(.+)$", nbformat.read(path, as_version=4).cells[0].source, re.M)
    return heading.group(1) if heading else path.stem


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
        "`make lessons` installs what is needed and opens copies without outputs, in `notebooks/mine/`; your work",
        "there is never overwritten. `make check-lessons` runs all lessons. Nothing needs a GPU.",
        "A lesson asks for your guess before it measures; `lessons.guesses()` sets all of them beside the results,",
        "`lessons.progress()` says what you have solved, `lessons.solution(key)` shows a reference answer once you",
        "have tried.",
        "Minutes are for reading, at 150 words per minute, and for the exercises.",
        "Each `.py` is the source of the `.ipynb` beside it, which holds the outputs and can be read here.",
        "Terms in English and Chinese: [GLOSSARY.md](GLOSSARY.md).",
        "",
        "Lessons 02, 03, 07, 09 and 10 are a ladder: in small steps, each an exercise with a checker, you write",
        "three kernels, wrap them in autograd Functions, and train layers with them.",
        "A checker counts what your kernel launches, reads and writes, lets torch compute nothing, and looks for",
        "races in the emulator. `lessons.step(kernel, grid, …)` goes through a launch line by line;",
        '`lessons.profile(kernel, grid, …, card="A100")` counts sectors, wavefronts and the tensor cores\' share.',
        "",
        "| | lesson | 中文 | minutes | | exercises | claims tested |",
        "|---|---|---|---|---|---|---|",
    ]
    for lesson in course:
        numbers = ", ".join(str(record["claim"]) for record in lesson.claims) or "–"
        exercises = len(exercises_of(lesson.number))
        chinese = paired.notebook_file(lesson.path)
        link = f"[{chinese_title(chinese)}](zh/{chinese.name})" if chinese.exists() else "–"
        name, takes = f"[{lesson.title}]({lesson.path.name})", build.takes(lesson.path.with_suffix(".py"))
        cells = (lesson.number, name, link, takes, level(lesson.number), exercises, numbers)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "## What the notes claim, and what came out",
        "",
        "The course follows five study documents: "
        + ", ".join(f"{key} *{name}*" for key, name in DOCUMENTS.items())
        + ". Each claim is measured and asserted in one lesson.",
        "",
        "| verdict | means | claims |",
        "|---|---|---|",
    ]
    for verdict, meaning in VERDICTS.items():
        lines.append(f"| {verdict} | {meaning} | {sum(entry.verdict == verdict for entry in CLAIMS.values())} |")
    lines += [
        "",
        "| claim | from | the notes say | in their words | lesson | verdict | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {lesson.number: lesson.path.name for lesson in course}
    for number, entry in CLAIMS.items():
        lesson, figures = measured.get(number, (None, "–"))
        where = f"[{entry.notebook}]({names[entry.notebook]})" if lesson else entry.notebook
        said = [entry.says, entry.original, where]
        cells = [str(number), ", ".join(entry.documents), *said, entry.verdict, figures]
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
