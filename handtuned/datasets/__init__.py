"""The rows that come with the package, a spoken request at home → one small JSON command (see `make.py`)."""

from pathlib import Path


def shipped_dataset() -> tuple[Path, Path]:
    """Training and held-out file."""
    directory = Path(__file__).parent
    return directory / "home_train.jsonl", directory / "home_eval.jsonl"
