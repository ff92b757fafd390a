"""What the commands at a lesson's end print: `runs/NN.txt`, the text of a terminal, which the notebook shows.

    (a CPU with 2 cores, PyTorch 2.13.0)
    $ handtuned finetune --method lora --max-steps 4
    model        smollm2: 134,515,008 parameters
    …

`python -m handtuned.lessons record 07` runs the lines that begin with `$` again, in their order and in one empty
directory, and writes what they print: of a long output the first and last lines.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FIRST, LAST = 8, 25  # lines that stay of a longer output: the plan of a run, its results


def run_file(script: Path) -> Path:
    """Where the commands of a lesson and their output lie."""
    return script.parent / "runs" / f"{script.name[:2]}.txt"


def printed(script: Path) -> str:
    """The recorded text of a lesson; empty if it has none."""
    return run_file(script).read_text(encoding="utf-8").strip() if run_file(script).exists() else ""


def record(script: Path) -> None:
    """Run a lesson's commands, and write what they print.

    Raises:
        ValueError: there are no commands, or one failed; nothing is written.
    """
    import torch

    commands = [line for line in printed(script).splitlines() if line.startswith("$ ")]
    if not commands:
        raise ValueError(f"{run_file(script)} has no commands: lines that begin with `$ `")
    lines = [f"(a CPU with {os.cpu_count()} cores, PyTorch {torch.__version__.partition('+')[0]})"]
    with tempfile.TemporaryDirectory() as place:
        for command in commands:
            lines += [command, *_output(command[2:], place), ""]
    run_file(script).write_text("\n".join(lines), encoding="utf-8")


def _output(command: str, place: str) -> list[str]:
    around = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
    # torch's launcher is a module everywhere, and a script where torch is in this very environment.
    line = re.sub(r"^torchrun\b", f'"{sys.executable}" -m torch.distributed.run', command)
    done = subprocess.run(line, shell=True, cwd=place, capture_output=True, text=True,
                          env={**around, "TQDM_DISABLE": "1"})  # fmt: skip
    if done.returncode:
        raise ValueError(f"{command}\n{done.stderr.strip()}")
    lines = done.stdout.replace(place + os.sep, "").strip().splitlines()
    return lines if len(lines) <= FIRST + LAST else [*lines[:FIRST], "…", *lines[-LAST:]]
