"""The directory of a run: free for a new one, or that of the run which is to be gone on with."""

import json
from pathlib import Path

from . import records, runstate
from .settings import FinetuneSettings, differences, next_output_dir


def settings_and_checkpoint(
    resume: str | None, typed: dict, fresh: FinetuneSettings, ranks: int
) -> tuple[FinetuneSettings, Path | None]:
    """Settings with a directory that is free, or those of the run to be resumed and the checkpoint that was named.

    Args:
        resume: what follows --resume, "" for nothing; None when it was not typed.
        typed: the settings that were.
        fresh: settings from these.
        ranks: among which the rows of a step are shared out.
    """
    if resume is not None:
        return _to_resume(resume, typed, fresh, ranks)
    fresh.output_dir = fresh.output_dir or next_output_dir()
    directory = Path(fresh.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output-dir {directory} is a file; name a directory")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"--output-dir {directory} holds another run; name a new one, or go on with --resume")
    return fresh, None


def _to_resume(resume: str, typed: dict, fresh: FinetuneSettings, ranks: int) -> tuple[FinetuneSettings, Path | None]:
    """What was typed again must agree with the run. With --output-dir DIR --resume, one that never began starts afresh.

    Another number of ranks than before shares out the same rows a step.
    """
    if not (resume or fresh.output_dir):
        raise ValueError("--resume needs the run's directory: --resume DIR, or --output-dir DIR")
    directory, checkpoint = Path(resume or fresh.output_dir), None
    if directory in runstate.checkpoints(directory.parent):
        directory, checkpoint = directory.parent, directory
    if not (directory / "run.json").exists():
        if resume or (directory.exists() and any(directory.iterdir())):
            raise ValueError(f"--resume: {directory} holds no run (no run.json)")
        print(f"nothing to resume in {directory}: starting afresh")
        fresh.output_dir = str(directory)
        return fresh, None
    run = _read(directory)
    saved = run["settings"]
    free = ("output_dir", "parallel")
    changed = differences({name: getattr(fresh, name) for name in typed if name not in free}, saved)
    if changed:
        raise ValueError("--resume goes on with the run's own settings: " + "; ".join(changed))
    micro, accumulate = saved["per_device_train_batch_size"], saved["gradient_accumulation_steps"]
    rows, odd = divmod(micro * accumulate * run["marks"].get("ranks", 1), ranks)
    if odd:
        raise ValueError(f"--resume: {ranks} ranks cannot evenly share the {rows * ranks + odd} rows of a step")
    micro = max(size for size in range(1, micro + 1) if rows % size == 0)
    shares = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    places = {"output_dir": str(directory), "parallel": fresh.parallel}
    return FinetuneSettings(**saved | shares | places), checkpoint


def begin_or_recognize(directory: Path, settings: FinetuneSettings, marks: dict[str, str]) -> None:
    """Write `run.json`, or check that the one that is there speaks of the same base model and data."""
    if not (directory / "run.json").exists():
        records.write_run(directory, settings.to_json(), marks)
        return
    known = _read(directory)["marks"]
    # On another kind of CPU the scales of the same base may be rounded differently; its 4-bit codes are not.
    base = "base" if known["base"] == marks["base"] or "codes" not in known else "codes"
    for what, name in ((base, f"base model ({settings.model})"), ("data", "training data")):
        if known[what] != marks[what]:
            raise ValueError(f"{directory}: the {name} is not what it was when this run began")


def _read(directory: Path) -> dict:
    path = directory / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": {**run["settings"]}, "marks": {**run["marks"]}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
