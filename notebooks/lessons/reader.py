"""What a reader has guessed and solved, and how far the course is.

It lies in `$XDG_DATA_HOME/handtuned/lessons.json` (`~/.local/share` without that variable). Only a notebook writes
there. A notebook that is being built has an empty folder of its own (build.py).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from ..nn.files import write_json
from .exercise import exercises_of
from .notebook import display, in_notebook

LESSONS = tuple(f"{number:02d}" for number in range(13))


def kept_in() -> Path:
    """The file of a reader's guesses and answers."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / "handtuned" / "lessons.json"


def recall() -> dict[str, dict[str, dict]]:
    """{"guesses": {"07.a": {"question", "guess", "measured"}}, "answers": {"07.1": {"tries", "right"}}}.

    Raises:
        ValueError: the file is not ours.
    """
    kept = {"guesses": {}, "answers": {}}
    if not kept_in().exists():
        return kept
    try:
        return kept | json.loads(kept_in().read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{kept_in()} does not hold a reader's guesses and answers ({error}); move it away") from None


def remember(change: Callable[[dict], object]) -> None:
    """Apply `change` to what is kept. Outside of a notebook nothing is."""
    if in_notebook():
        kept = recall()
        change(kept)
        kept_in().parent.mkdir(parents=True, exist_ok=True)
        write_json(kept_in(), kept)


def tried(key: str, right: bool) -> None:
    """An answer to exercise `key` was checked."""

    def change(kept):
        before = kept["answers"].get(key, {"tries": 0, "right": False})
        kept["answers"][key] = {"tries": before["tries"] + 1, "right": before["right"] or right}

    remember(change)


def progress() -> None:
    """Show, lesson by lesson, the exercises that you have solved or tried and the guesses that you have made."""
    kept, rows = recall(), []
    for lesson in LESSONS:
        keys = exercises_of(lesson)
        answers = [kept["answers"].get(key, {"tries": 0, "right": False}) for key in keys]
        right = sum(answer["right"] for answer in answers)
        open_ = [key for key, answer in zip(keys, answers, strict=True) if answer["tries"] and not answer["right"]]
        guesses = sum(1 for key, entry in kept["guesses"].items() if key[:2] == lesson and "guess" in entry)
        rows.append([lesson, f"{right} of {len(keys)}", ", ".join(open_) or "–", str(guesses)])
    table(["lesson", "solved", "tried, still open", "guesses"], rows)


def table(heads: list[str], rows: list[list[str]]) -> None:
    """Show a table: Markdown in a notebook, aligned text elsewhere."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [heads, *rows]]  # fmt: skip
    safe = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in [heads, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in safe]
    lines.insert(1, "|---" * len(heads) + "|")
    display({"text/plain": "\n".join(text), "text/markdown": "\n".join(lines)})
