"""`python -m handtuned.lessons ACTION [NN …]`: execute the lessons, test them, pair their two languages.

build: run a lesson and write its notebooks. check: run it and write nothing. text: write its notebooks with
changed texts over the outputs that are there. paired: the Chinese text has been compared with the English
of today; say so in its file, and name the cells that are still English. record: run the commands of runs/NN.txt
on a real model, and write what they print; then text. mine: copies without outputs to work in,
notebooks/mine/, which leave your work as it is. index: write README.md and GLOSSARY.md.
"""

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from . import build, index, paired, record


def main(words=None) -> int:
    """Returns 0, or 1 if a notebook failed or differs from its script."""
    parser = argparse.ArgumentParser(prog="python -m handtuned.lessons", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("action", choices=("build", "check", "text", "paired", "record", "mine", "index"))
    parser.add_argument("lessons", nargs="*", metavar="NN", help="all, if none is given")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time (check, build)")
    parser.add_argument("--notebooks", metavar="DIR", help="where they lie (default: ./notebooks, or here)")
    settings = parser.parse_args(words)
    try:
        folder = build.notebooks_folder(settings.notebooks)
        scripts = build.sources(folder, settings.lessons)
    except ValueError as error:
        parser.error(str(error))
    if settings.action == "index":
        (folder / "README.md").write_text(index.index(folder), encoding="utf-8")
        (folder / "GLOSSARY.md").write_text(index.glossary(folder), encoding="utf-8")
        return 0
    if settings.jobs > 1 and len(scripts) > 1:
        return _many(settings.action, scripts, settings.jobs)
    return max([_one(settings.action, script) for script in scripts], default=0)


def _one(action: str, script) -> int:
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    began, remarks = time.perf_counter(), []
    try:
        trouble = _act(action, script, remarks)
    except (CellExecutionError, CellTimeoutError, DeadKernelError, FileNotFoundError, ValueError) as error:
        trouble = [re.sub(r"\x1b\[[0-9;]*m", "", str(error))]
    seconds = time.perf_counter() - began
    verdict = "failed" if trouble else "ok"
    print(f"{script.stem}: {verdict}, {seconds:.0f} s", *trouble, *remarks, sep="\n  ", flush=True)
    return 1 if trouble else 0


def _act(action: str, script, remarks: list[str]) -> list[str]:
    """What is wrong with a lesson; what only should be known goes to `remarks`."""
    if not paired.text_file(script).exists():
        remarks.append("no Chinese text yet")
    if action == "mine":
        remarks[:] = [f"{path.relative_to(script.parent)} written" for path in build.copies(script)]
        return []
    if action == "check":
        trouble = build.drift(script)
        build.execute(script)
        return trouble
    if action != "paired":
        {"build": build.build, "text": build.text, "record": record.record}[action](script)
    elif not remarks:
        remarks.append(f"{paired.mark(script)} cells newly marked as compared")
        remarks.extend(f"text cell {number} is still English" for number in paired.untranslated(script))
        return paired.trouble(script)
    return []


def _many(action: str, scripts: list, jobs: int) -> int:
    """A process for each notebook, so that output and failures stay apart."""

    def run(script):
        words = [action, script.name[:2], "--notebooks", script.parent]
        return subprocess.run([sys.executable, "-m", "handtuned.lessons", *words]).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(run, scripts))


if __name__ == "__main__":
    raise SystemExit(main())
