"""`python -m handtuned.lessons build|check|index`: execute the notebooks, test them, write their index and glossary."""

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from . import build, index


def main(words=None) -> int:
    """Returns 0, or 1 if a notebook failed or differs from its script."""
    parser = argparse.ArgumentParser(prog="python -m handtuned.lessons", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("build", "check", "index"))
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

    began = time.perf_counter()
    try:
        trouble = build.drift(script) if action == "check" else []
        build.execute(script) if action == "check" else build.build(script)
    except (CellExecutionError, CellTimeoutError, DeadKernelError, FileNotFoundError) as error:
        trouble = [re.sub(r"\x1b\[[0-9;]*m", "", str(error))]
    seconds = time.perf_counter() - began
    print(f"{script.stem}: {'failed' if trouble else 'ok'}, {seconds:.0f} s", *trouble, sep="\n  ", flush=True)
    return 1 if trouble else 0


def _many(action: str, scripts: list, jobs: int) -> int:
    """A process for each notebook, so that output and failures stay apart."""

    def run(script):
        words = [action, script.name[:2], "--notebooks", script.parent]
        return subprocess.run([sys.executable, "-m", "handtuned.lessons", *words]).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(run, scripts))


if __name__ == "__main__":
    raise SystemExit(main())
