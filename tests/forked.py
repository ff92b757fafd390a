"""Python processes that need not begin with imports: forked from a server that has made them once.

For tests that need another process, but not that it begins as a user's does: `python -m handtuned` imports for seconds.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload([
    "handtuned.finetune", "handtuned.training.distributed", "handtuned.training.loop", "handtuned.nn.live_memory",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "transformers.generation",
    "matplotlib.pyplot", "tokenizers",
])  # fmt: skip


def python(*words, seconds=280, **environments) -> CompletedProcess:
    """`python WORDS` (-c CODE, -m MODULE or a file, and arguments) to its end."""
    return together(words, [environments], seconds)


def run(words, env, **options) -> CompletedProcess:
    """For `subprocess.run` in a module that starts Python and reads what it prints."""
    done = python(*words[1:], **env)
    return CompletedProcess(words, done.returncode, done.stdout, done.stdout)


def together(words, environments, seconds=280, cwd=".") -> CompletedProcess:
    """A process of `python WORDS` for each of `environments`, and what all print in one; a failure ends all."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place, "output")
        output.touch()
        given = list(map(str, words)), os.path.abspath(cwd), output
        processes = [CONTEXT.Process(target=_run, args=(*given, os.environ | more)) for more in environments]
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        try:
            while running and not any(process.exitcode for process in processes):
                if not (ended := wait(running, seconds)):
                    break
                for sentinel in ended:
                    running.pop(sentinel).join()
        finally:
            for process in running.values():
                process.kill()
                process.join()
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return CompletedProcess(words, code, output.read_text(), "")


def _run(words, directory, output, environment):
    import torch

    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
