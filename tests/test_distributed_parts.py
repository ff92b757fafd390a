"""What `finetune --parallel` is made of, looked at in one process."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import forked
import pytest
import torch
from handtuned.amp import GradScaler

from handtuned import cli
from handtuned.training import evaluation, rank_failure
from handtuned.training.checkpoints import settings_and_checkpoint
from handtuned.training.data import EncodedRows
from handtuned.training.distributed import FSDPWorld, World
from handtuned.training.settings import FinetuneSettings


def test_parallel_and_torchrun_go_together(tmp_path, capsys, monkeypatch):
    words = ["finetune", "--output-dir", str(tmp_path / "out")]
    assert cli.main([*words, "--parallel", "ddp"]) == 2
    assert "torchrun --nproc-per-node 2 -m handtuned finetune --parallel ddp" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(words) == 2
    assert "--parallel ddp or --parallel fsdp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_failure_detector_finds_out_who_is_lost(monkeypatch):
    """Rank 0 asks; each case has ranks that left word before, and ranks whose process is gone or far away."""
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    here, there, dead = (socket.gethostname(), os.getpid()), ("elsewhere", 1), (socket.gethostname(), gone.pid)
    monkeypatch.setattr(rank_failure, "TIMEOUT", 0.3)
    for homes, words, text, told in (
        ([here, dead], {}, "rank 1 has died", True),
        ([here, here, dead], {1: ""}, "rank 2 has died", True),
        ([here, dead, dead], {}, "ranks 1, 2 have died", True),
        ([here, there], {}, "rank 1 has died, or not answered for 0.3 s", True),
        ([here, dead], {1: "OSError: disk"}, "rank 1 has failed: OSError: disk", True),
        ([here, there], {1: ""}, "rank 0 has lost its connection to the others", True),
    ):
        store = torch.distributed.HashStore()
        for rank, word in words.items():
            store.set(f"word/{rank}", word)
        failure = rank_failure.FailureDetector(store, 0, homes).diagnose()
        assert (str(failure), failure.print_it) == (text, told)
    store = torch.distributed.HashStore()
    store.set("word/0", "")
    failure = rank_failure.FailureDetector(store, 2, [here, dead, here]).diagnose()
    assert not failure.print_it, "the lowest rank that is left tells"


def test_a_rank_alone_takes_the_gpu_that_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert World("ddp", store=torch.distributed.HashStore()).device("cuda:1") == torch.device("cuda:1")
    assert World("ddp", local_rank=1, store=torch.distributed.HashStore()).device("cuda") == torch.device("cuda:1")


def test_nothing_held_out():
    results = {}
    training = SimpleNamespace(lm=None, world=World(), base=SimpleNamespace(held_out=EncodedRows()))
    evaluation.evaluate(training, results, "before")
    assert results == {"before": None, "answers": []}


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 8], ids=lambda n: f"{n}-rows")
def test_held_out_rows_are_shared_out_once_and_in_step(rows):
    dealt = [evaluation.share_out(list(range(rows)), rank, 3) for rank in range(3)]
    counted = [row for mine, extra, counts in dealt for row in mine + extra * counts]
    assert sorted(counted) == list(range(rows))
    assert len({(len(mine), len(extra)) for mine, extra, _ in dealt}) == 1


@pytest.mark.parametrize(
    "ranks, micro, accumulate", [(1, 4, 6), (2, 4, 3), (3, 4, 2), (4, 3, 2), (8, 3, 1), (24, 1, 1)]
)
def test_resume_shares_the_same_rows_among_other_ranks(tmp_path, ranks, micro, accumulate):
    saved = FinetuneSettings(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    run = {"settings": saved.to_json(), "marks": {"base": "", "data": "", "ranks": 2}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    settings, _ = settings_and_checkpoint(str(tmp_path), {}, FinetuneSettings(parallel="ddp"), ranks)
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (micro, accumulate)
    with pytest.raises(ValueError, match="5 ranks cannot evenly share the 24 rows"):
        settings_and_checkpoint(str(tmp_path), {}, FinetuneSettings(parallel="ddp"), 5)


def test_of_forked_processes_the_first_that_fails_ends_all():
    code = "import os, sys, time; time.sleep(int(os.environ['RANK']) * 600); print(*sys.argv[1:]); sys.exit('end')"
    done = forked.together(["-c", code, "two", 2], [{"RANK": "0"}, {"RANK": "1"}])
    assert (done.returncode, done.stdout) == (1, "two 2\nend\n")
    assert forked.python("-m", "platform", "--terse", seconds=60).returncode == 0


def test_an_overflow_under_fsdp_is_known_where_all_shards_are_empty():
    """Else that rank's loss scale would grow while the others' shrinks."""
    world, owner = FSDPWorld.__new__(FSDPWorld), torch.nn.Parameter(torch.ones(0, 3))
    world.shards = {owner: torch.nn.Parameter(torch.ones(0, 3))}
    world.sum = lambda overflows: overflows + 1  # another rank's
    optimizer, scaler = torch.optim.SGD(world.shards.values()), GradScaler(init_scale=4.0)
    scaler.scale(owner.sum()).backward()
    world.collect_gradients(None, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
