"""Several processes of `handtuned finetune`: started by torchrun, or forked, which takes less time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import torch.distributed as dist

ONE_AFTER_ANOTHER = """
import json, os, sys
from handtuned import cli
# BEFORE
for number, words in enumerate(json.loads(sys.argv[1])):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each run with a part of the store to itself
    code = cli.main([word.replace("RANK", os.environ["RANK"]) for word in words])
    print(f"\\n=== rank {os.environ['RANK']} exit code {code}", flush=True)
"""


def torchrun(words, ranks=2):
    """Start `handtuned finetune` on several ranks; stdout and stderr of all of them in one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait(run):
    """What was printed until the end; nothing that hangs stays behind."""
    try:
        return run.communicate(timeout=280)[0]
    finally:
        if run.poll() is None:
            run.terminate()  # torchrun ends its processes
            run.wait(60)


def finetune(*words, ranks=2):
    forked_ranks(["-m", "handtuned", "finetune", *words], ranks)


def one_after_another(flags, runs, named, ranks=2, before=""):
    """Several runs in one start of the processes; returns ({rank: exit codes}, {name: what was printed})."""
    commands = [["finetune", *flags, "--output-dir", str(runs / name), *more] for name, more in named.items()]
    printed = forked_ranks(["-c", ONE_AFTER_ANOTHER.replace("# BEFORE", before), json.dumps(commands)], ranks)
    codes = {rank: re.findall(rf"^=== rank {rank} exit code (\d)", printed, re.M) for rank in range(ranks)}
    return codes, dict(zip(named, printed.split("=== rank 0 exit code", len(named) - 1), strict=True))


def forked_ranks(words, ranks):
    """What processes print that find around them what torchrun would have put there, its store too."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    around = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
              "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}  # fmt: skip
    own = [around | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    done = forked.together(words, [{name: str(value) for name, value in each.items()} for each in own])
    assert done.returncode == 0, done.stdout
    return done.stdout


def process_of_rank(launcher, rank):
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


def kill_after(checkpoint, launcher, rank):
    """SIGKILL a rank as soon as a checkpoint stands; returns (seconds until all is over, what was printed)."""
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.005)
    os.kill(process_of_rank(launcher, rank), signal.SIGKILL)
    started = time.monotonic()
    printed = wait(launcher)
    return time.monotonic() - started, printed
