"""One process of test_zero.py and test_zero_offload.py: a list of checks, in step with the other ranks.

    RANK=0 python zero_worker.py SIZE DIRECTORY CHECK…

meets the others at DIRECTORY/meeting and leaves DIRECTORY/RANK.json: check → "" or the traceback. `run` starts them,
in the folder above, which processes of another run can read.
"""

import datetime
import gc
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import forked
import torch
import torch.distributed as dist
import zero_bytes
import zero_checks
from handtuned.optim import ZeroOptimizer


def run(size, directory, names, seconds=900):
    """Start `size` processes and wait; returns check → what went wrong on the ranks, empty if nothing."""
    directory.mkdir()
    around = {"OMP_NUM_THREADS": "1", "HANDTUNED_BACKEND": "torch"}
    ranks = [around | {"RANK": str(rank)} for rank in range(size)]
    said = forked.together([__file__, size, directory, *names], ranks, seconds, directory.parent).stdout
    failures = {}
    for name in names:
        for rank in range(size):
            file = directory / f"{rank}.json"
            results = json.loads(file.read_text()) if file.exists() else {}
            told = results.get(name, f"not run: {said[-2000:]}")
            if told:
                failures[name] = failures.get(name, "") + f"rank {rank}: {told}\n"
    return failures


def main(rank, size, directory, names):
    directory = Path(directory)
    torch.set_num_threads(1)
    ZeroOptimizer.bucket_elements = 150  # several buckets of a small model
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{directory / 'meeting'}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=600),
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # makes the walks over all objects short, which count live tensors
    results = {}
    for name in names:
        check = getattr(zero_checks, f"check_{name}", None) or getattr(zero_bytes, f"check_{name}")
        try:
            check()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        (directory / f"{rank}.json").write_text(json.dumps(results))
        if results[name]:
            break  # the ranks are out of step
    gc.collect()  # reducers before the group, as in `handtuned.training.distributed.start`
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), int(sys.argv[1]), sys.argv[2], sys.argv[3:])
