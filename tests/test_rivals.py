"""Rivals that need a GPU to be timed, computed by Triton's interpreter: our call of them gives the right result.

Each is skipped where it is not installed. unsloth cannot be imported without a GPU, so it has no test here.
"""

import pytest
import torch
from bench_command import script
from handtuned.kernels.runtime import INTERPRETED

from handtuned.harness import timing

CPU = torch.device("cpu")


@pytest.mark.skipif(not INTERPRETED, reason="Liger's kernels would be compiled for a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_liger_is_called_as_it_wants_to_be(dtype, monkeypatch):
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    case = script("loss").case(12, 64, 500, dtype, CPU)
    record = timing.run_case(case, CPU, against=["liger"], rounds=1)
    assert record["failed"] == {} == record["skipped"] and set(record["contestants"]) == {"handtuned", "liger"}
