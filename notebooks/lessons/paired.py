"""The Chinese text of a lesson: `zh/NN_slug.md`, one piece per English text cell, over the same code and outputs.

    <!-- cell 3 5f0e12ab -->
    The text, in Chinese, of the lesson's fourth text cell.

The eight digits are the beginning of the SHA-256 of the English cell that was translated, so an English cell
that changes later is noticed. Links are written as in the English cell; they are bent to the other folder here.
"""

import copy
import hashlib
import re
from pathlib import Path

_HEAD = re.compile(r"^<!-- cell (\d+) ([0-9a-f]{8}) -->\n", re.M)
_LINK = re.compile(r"```.*?```|`[^`]*`|\]\(([^)\s#]+)", re.S)  # code is stepped over
_CHINESE = re.compile(r"[一-鿿]")


def text_file(script: Path) -> Path:
    """Where the Chinese text of a lesson lies, or would lie."""
    return script.parent / "zh" / f"{script.stem}.md"


def notebook_file(script: Path) -> Path:
    """Where the Chinese notebook is written."""
    return text_file(script).with_suffix(".ipynb")


def english(script: Path) -> list[str]:
    """The text cells of a script."""
    import jupytext

    return [cell.source for cell in jupytext.read(script).cells if cell.cell_type == "markdown"]


def digest(text: str) -> str:
    """The first 8 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def pieces(script: Path) -> list[tuple[int, str, str]]:
    """(number of the text cell, digest, Chinese text) in the order of the file."""
    parts = _HEAD.split(text_file(script).read_text(encoding="utf-8"))
    return [(int(parts[i]), parts[i + 1], parts[i + 2].strip()) for i in range(1, len(parts), 3)]


def trouble(script: Path) -> list[str]:
    """What keeps a lesson's two texts apart: each line names the lesson and the cell. Empty if they are in step."""
    theirs, found = pieces(script), []
    cells = english(script)
    order = [number for number, _, _ in theirs]
    for number in sorted(set(order) | set(range(len(cells)))):
        where = f"{script.stem}, text cell {number}: "
        count = order.count(number)
        if number >= len(cells):
            found.append(where + f"the lesson has only {len(cells)}")
        elif count != 1:
            found.append(where + ("no Chinese text" if count == 0 else f"there {count} times"))
        else:
            _, mark, text = theirs[order.index(number)]
            if mark != digest(cells[number]):
                found.append(where + "the English has changed since it was translated")
            if not text:
                found.append(where + "the Chinese text is empty")
    return found


def untranslated(script: Path) -> list[int]:
    """Numbers of the text cells that have words but no Chinese character."""
    return [number for number, _, text in pieces(script)
            if re.search(r"[A-Za-z]{3}", text) and not _CHINESE.search(text)]  # fmt: skip


def mark(script: Path) -> int:
    """Write today's digests into the Chinese text, after somebody has compared it; returns how many were others."""
    cells, changed = english(script), 0

    def renewed(head):
        nonlocal changed
        number = int(head[1])
        now = digest(cells[number]) if number < len(cells) else head[2]
        changed += now != head[2]
        return f"<!-- cell {number} {now} -->\n"

    path = text_file(script)
    path.write_text(_HEAD.sub(renewed, path.read_text(encoding="utf-8")), encoding="utf-8")
    return changed


def translated(notebook, script: Path):
    """The executed notebook of a lesson with Chinese text cells: the same code, outputs and ids.

    Raises:
        ValueError: a cell has no Chinese text, or one of another English text.
    """
    if wrong := trouble(script):
        raise ValueError("\n  ".join(wrong))
    chinese = copy.deepcopy(notebook)
    texts = {number: text for number, _, text in pieces(script)}
    cells = [cell for cell in chinese.cells if cell.cell_type == "markdown"]
    for number, cell in enumerate(cells):
        cell["source"] = bent(texts[number], script)
    return chinese


def bent(text: str, script: Path) -> str:
    """Text whose relative links, written as from the scripts' folder, lead to the same places from `zh/`."""

    def link(found):
        target = found[1]
        if target is None or re.match(r"\w+:|/", target):
            return found[0]
        meant = script.parent / target
        translated_too = meant.suffix == ".ipynb" and text_file(meant).exists()
        return f"](../{target}" if meant.exists() and not translated_too else found[0]

    return _LINK.sub(link, text)
