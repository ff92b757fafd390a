"""Guess first: a lesson asks before it measures, and sets your guess beside the result.

lessons.guess("07.d", "by what factor does the step grow from r = 4 to r = 64?")
…                                                # the measurement
lessons.measured("07.d", f"{growth:.1f} ×")
"""

import re

from .reader import recall, remember, table


def guess(key: str, question: str) -> None:
    """Ask the reader for a prediction, once; what follows in the cell then measures it.

    Where nobody can answer (a notebook that is built, a program without a terminal) the question is only printed.

    Args:
        key: lesson and letter, "07.a".
        question: short, and such that a few words or one number answer it.

    Raises:
        ValueError: not such a key, or no question.
    """
    if not re.fullmatch(r"\d\d\.[a-z]", key):
        raise ValueError(f'key must be a lesson and a letter, such as "07.a", got {key!r}')
    if not question.strip():
        raise ValueError("question must say what is to be guessed, got nothing")
    said = recall()["guesses"].get(key, {}).get("guess")
    if said is None:
        said = _ask(f"{key} guess first: {question} ")
        entry = {"question": question} | ({"guess": said} if said else {})
        remember(lambda kept: kept["guesses"].update({key: entry}))
    else:
        print(f"{key} {question} You guessed: {said}")


def _ask(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except (EOFError, OSError, NotImplementedError):  # the last: a kernel whose frontend takes no input
        print(prompt.rstrip())
        return ""


def measured(key: str, result: str) -> None:
    """Reveal what was measured, beside the guess: `guess(key, …)` stands before it in the lesson."""
    said = recall()["guesses"].get(key, {}).get("guess")
    print(f"{key} measured: {result}" + (f"  (you guessed: {said})" if said else ""))
    remember(lambda kept: kept["guesses"].setdefault(key, {"question": "–"}).update(measured=result))


def guesses(lesson: str | None = None) -> None:
    """Show the page of your guesses beside what was measured: of one lesson ("07"), or of all."""
    kept = sorted(recall()["guesses"].items())
    rows = [[key, entry["question"], entry.get("guess", "–"), entry.get("measured", "–")]
            for key, entry in kept if lesson in (None, key[:2])]  # fmt: skip
    if rows:
        table(["", "question", "your guess", "measured"], rows)
    else:
        print("no guesses yet")
