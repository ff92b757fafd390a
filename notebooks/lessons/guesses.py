"""Guess first: a lesson asks before it measures, and sets your guess beside the result.

lessons.guess("07.d", "by what factor does the step grow from r = 4 to r = 64?")
…                                                # the measurement
lessons.measured("07.d", f"{growth:.1f} ×")
"""

from .arguments import lesson_key
from .reader import LESSONS, recall, remember, table

KEY = rf"({'|'.join(LESSONS)})\.[a-z]", 'a lesson and a letter, such as "07.a"'


def guess(key: str, question: str) -> None:
    """Ask the reader for a prediction, once; what follows in the cell then measures it.

    Where nobody can answer (a notebook that is built, a program without a terminal) the question is only printed.

    Args:
        key: lesson and letter, "07.a".
        question: short, and such that a few words or one number answer it.

    Raises:
        ValueError: not such a key, or no question.
    """
    lesson_key(key, *KEY)
    if not (isinstance(question, str) and question.strip()):
        raise ValueError(f"question must say what is to be guessed, got {question!r}")
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
    """Reveal what was measured, beside the guess: `guess(key, …)` stands before it in the lesson.

    Raises:
        ValueError: not such a key.
    """
    lesson_key(key, *KEY)
    said = recall()["guesses"].get(key, {}).get("guess")
    print(f"{key} measured: {result}" + (f"  (you guessed: {said})" if said else ""))
    remember(lambda kept: kept["guesses"].setdefault(key, {"question": "–"}).update(measured=result))


def guesses(lesson: str | None = None) -> None:
    """Show the page of your guesses beside what was measured: of one lesson ("07"), or of all.

    Raises:
        ValueError: no such lesson.
    """
    if lesson not in (None, *LESSONS):
        raise ValueError(f'lesson must be one of "00"…"12", got {lesson!r}')
    kept = sorted(recall()["guesses"].items())
    rows = [[key, entry["question"], entry.get("guess", "–"), entry.get("measured", "–")]
            for key, entry in kept if lesson in (None, key[:2])]  # fmt: skip
    if rows:
        table(["", "question", "your guess", "measured"], rows)
    else:
        print("no guesses yet")
