"""`finetune --parallel` with adapters on fused experts and routers: two CPU processes beside one of twice as much
accumulation. To the bit where gradients are summed (see test_finetune_zero.py), to rounding where they are averaged.
"""

import pytest
import tiny_architectures
from ranks import one_after_another
from test_finetune_zero import UNCLIPPED, assert_close, assert_same_files, saved

from handtuned import cli

pytest.importorskip("transformers")

METHODS = {
    "qlora": ["--method", "qlora"],  # all-linear, which reaches the experts of Qwen3-MoE and their routers
    "lora": ["--method", "lora", "--target-modules", "q_proj", "--target-parameters", "experts.down_proj"],
}
WAYS = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    place = tmp_path_factory.mktemp("given")
    tiny_architectures.make("qwen3_moe", place / "model")
    rows = tiny_architectures.write_rows(place / "rows.jsonl")
    return ["--model", str(place / "model"), "--data", rows, "--eval-fraction", "0", "--learning-rate", "2e-3",
            "--per-device-train-batch-size", "1", "--device", "cpu", "--max-seq-length", "48", "--max-steps", "3",
            "--save-steps", "1", "--save-total-limit", "9", *UNCLIPPED]  # fmt: skip


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """A directory with a run for each way and method."""
    place = tmp_path_factory.mktemp("runs")
    named = {f"{way}-{name}": ["--parallel", way, *words] for way in WAYS for name, words in METHODS.items()}
    codes, printed = one_after_another(flags, place, named)
    assert codes == {rank: ["0"] * len(named) for rank in (0, 1)}, printed
    for name, words in METHODS.items():
        out = ["--output-dir", str(place / name), "--gradient-accumulation-steps", "2"]
        assert cli.main(["finetune", *flags, *words, *out]) == 0
    return place


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("way", WAYS)
def test_experts_learn_as_in_one_process(runs, way, name):
    out, alone = runs / f"{way}-{name}", runs / name
    tensors = saved(out)
    assert any(tensor.any() for key, tensor in tensors.items() if key.endswith("experts.lora_B.weight"))
    (assert_same_files if way.startswith("zero") else assert_close)(out, alone)
