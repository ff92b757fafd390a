"""ZeRO beside DistributedDataParallel in two and four processes, the documents' figures, and what is refused."""

import pytest
import torch
import zero_worker
from handtuned.optim import ZeroOptimizer
from torch import nn

from handtuned.cli import main
from handtuned.memory import estimate

TWO = (
    "equals_the_reference",
    "50_steps_bit_equal",
    "bf16_with_masters_bit_equal",
    "accumulation",
    "clipping",
    "clipping_where_a_rank_owns_nothing",
    "scalers_skip_together",
    "an_overflow_of_few_elements_is_seen_by_all",
    "fp16_parameters_with_a_scaler",
    "state_dict_is_the_whole_optimizers",
    "save_for_another_world_size",
    "load_from_another_world_size",
    "bytes_a_rank",
    "elements_a_step",
    "full_gradients_do_not_pile_up",
    "stage_3_whole_parameters_are_few",
    "stage_3_takes_layers_as_a_whole",
    "checkpointed_models",
    "parameters_begin_as_rank_0s",
    "a_rank_without_any_gradient",
    "8_bit_blocks_are_as_alone",
)
FOUR = ("5_steps_to_rounding", "the_same_batch_equals_one_process", "load_from_another_world_size",
        "bytes_a_rank", "elements_a_step", "8_bit_blocks_are_as_alone")  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def two(directory):
    return zero_worker.run(2, directory / "two", TWO)


@pytest.fixture(scope="module")
def four(directory, two):
    return zero_worker.run(4, directory / "four", FOUR)


@pytest.mark.parametrize("name", TWO)
def test_two_processes(two, name):
    assert name not in two, two[name]


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(four, name):
    assert name not in four, four[name]


@pytest.mark.slow
def test_four_processes_for_50_steps(directory):
    assert not zero_worker.run(4, directory / "long", ["50_steps_to_rounding"])


@pytest.mark.parametrize(("stage", "expected"), [(0, 112), (1, 38.5), (2, 26.25), (3, 14)])
def test_notes_002_a_7b_model_on_eight_devices(stage, expected):
    """The notes: 112, 38.5, 26.25, 14 GB; the same formulas are held against counted bytes in the processes above."""
    assert estimate(7e9, dtype="bfloat16", zero=stage, world_size=8).states == expected * 10**9


def test_the_command_says_so(capsys):
    for stage, told in ((1, "38.50 GB"), (2, "26.25 GB"), (3, "14.00 GB")):
        words = f"memory --model 7e9 --method full --dtype bfloat16 --zero {stage} --gpus 8"
        assert main(words.split()) == 0
        assert f"model states {told}" in capsys.readouterr().out


def test_masters_are_stepped_with_fp32_gradients_beside_the_16_bit_ones():
    """Stage 1 of 7B on 8: weights and gradients 28 GB, masters and moments 84 / 8, FP32 gradients of a shard 28 / 8."""
    breakdown = estimate(7e9, dtype="bfloat16", zero=1, world_size=8)
    assert breakdown.moments["optimizer step"] == 42 * 10**9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stage": 0}, ValueError, "stage must be 1, 2 or 3, got 0"),
        ({"stage": "2"}, ValueError, "stage must be 1, 2 or 3, got '2'"),
        ({"optimizer_class": "AdamW"}, TypeError, "optimizer_class must be a class of optimizers, got 'AdamW'"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": [torch.zeros(2, dtype=torch.complex64)]}, TypeError, "params must be real, got torch.complex64"),
        ({"params": torch.zeros(2)}, TypeError, "iterable"),
        ({"lr": -1.0}, ValueError, "-1"),
    ],
)
def test_what_is_refused(arguments, error, message):
    arguments = {"params": nn.Linear(2, 3).parameters(), "optimizer_class": torch.optim.AdamW} | arguments
    with pytest.raises(error, match=message):
        ZeroOptimizer(**arguments)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice_and_later_groups_are_refused():
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="params must hold each parameter once"):
        ZeroOptimizer([weight, weight], torch.optim.SGD)
    zero = ZeroOptimizer([weight], torch.optim.SGD)
    with pytest.raises(ValueError, match="cannot be added"):
        zero.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_stage_3_cuts_parameters_where_they_are():
    weights = [nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "meta")]
    ZeroOptimizer(weights, torch.optim.SGD, stage=3).close()
    assert [weight.device.type for weight in weights] == ["cpu", "meta"]


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    ZeroOptimizer(embedding.parameters(), torch.optim.SGD)
    zero = ZeroOptimizer(embedding.parameters(), torch.optim.SGD)
    with pytest.raises(RuntimeError, match="sparse"):
        embedding(torch.tensor([1])).sum().backward()
    del zero
