"""The simulator: its formulas by hand, what it counts, and that docs/scale.md holds what it says."""

from pathlib import Path

import pytest
from handtuned.optim.zero_collectives import Collectives

from handtuned.harness.runner import load

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
scale = load(ROOT / "benchmarks" / "scale.py")
FAST, SLOW, Cluster = scale.FAST, scale.SLOW, scale.Cluster
break_even, counted, fill, ring, simulate = scale.break_even, scale.counted, scale.fill, scale.ring, scale.simulate


def test_the_page_holds_the_tables_that_the_command_writes(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    assert fill(text) == text, "run: python benchmarks/scale.py docs/scale.md"
    emptied = tmp_path / "scale.md"
    emptied.write_text(text.replace("| 8 | DDP |", "| 9 | DDP |"), encoding="utf-8")
    scale.main([str(emptied)])
    assert emptied.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["scale.md"]


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="<!-- volume -->"):
        fill("nothing")


@pytest.mark.parametrize(("stage", "volume", "of_eight"), [(0, 2, 2), (1, 2, 2), (2, 2, 9), (3, 3, 24)])
def test_counted_elements(stage, volume, of_eight):
    """One process calls the same collectives; test_zero.py counts them in two and four."""
    assert sum(counted(stage)[0].values()) == volume
    assert sum(counted(stage, micro_batches=8)[0].values()) == of_eight


def test_it_is_counted_and_not_written_down(monkeypatch):
    """A stage 2 that gathered its parameters twice would show."""
    gather = Collectives.gather_whole
    monkeypatch.setattr(Collectives, "gather_whole", lambda *args: (list(gather(*args)), list(gather(*args)))[1])
    assert sum(counted.__wrapped__(2)[0].values()) == 3


def test_stage_3_calls_a_collective_for_each_layer():
    assert counted(3)[1] == {"reduce-scatter": 1, "all-gather": 2}


def test_a_ring_by_hand():
    cluster = Cluster("", network=100.0, link=10.0, latency=0.0)
    assert ring(80.0, 8, cluster) == 80 * 7 / 8 / 10
    assert ring(80.0, 16, Cluster("", network=1.0, link=10.0)) == 80 * 8 / 16 / 1.0  # the network is slower
    assert ring(80.0, 1, cluster) == 0


def test_a_step_by_hand():
    step = simulate("7b", 3, 8, FAST)
    assert step.compute == 8 * 7e9 * 4096 / (0.4 * 989e12)
    assert step.sent == pytest.approx(3 * 2 * 7e9 * 7 / 8)
    assert step.communication == pytest.approx(3 * 14e9 * 7 / 8 / 450e9 + 3 * 32 * 7 * 2e-6)
    assert step.hidden == step.compute and step.exposed == step.compute + step.communication
    assert simulate("7b", 3, 1, FAST).communication == 0
    moving = simulate("7b", 2, 8, FAST, offload=True).offloading
    assert moving == pytest.approx(7e9 / 8 * (4 / 64e9 + 28 / 76.8e9))


@pytest.mark.parametrize(("stage", "expected"), [(0, 112), (1, 38.5), (2, 26.25), (3, 14)])
def test_notes_002_states_of_a_7b_model_on_8_gpus(stage, expected):
    assert simulate("7b", stage, 8, FAST).states == expected * 10**9


def test_break_even_is_where_the_times_meet_whatever_the_model():
    for cluster in (FAST, SLOW):
        still = Cluster("", network=cluster.network, latency=0.0)
        tokens = round(break_even(3, 64, still))
        for model in ("7b", "70b"):
            step = simulate(model, 3, 64, still, tokens=tokens)
            assert step.communication == pytest.approx(step.compute, rel=1e-3)


class TestWhatThePageSays:
    def test_stage_1_sends_what_ddp_sends(self):
        assert simulate("7b", 1, 64, FAST).sent == simulate("7b", 0, 64, FAST).sent

    def test_who_fits_in_80_gb(self):
        fits = {
            (model, stage, devices): simulate(model, stage, devices, FAST).peak <= FAST.memory
            for model in ("7b", "70b") for stage in (0, 1, 2, 3) for devices in (8, 64, 1024)
        }  # fmt: skip
        assert all(fits["7b", stage, devices] == (stage > 0) for stage in (0, 1, 2, 3) for devices in (8, 64, 1024))
        assert [key for key, yes in fits.items() if yes and key[0] == "70b"] == [("70b", 3, 64), ("70b", 3, 1024)]

    def test_from_64_to_1024_stage_2_gets_less_than_a_tenth_smaller(self):
        few, many = (simulate("7b", 2, devices, FAST).states for devices in (64, 1024))
        assert 0.9 < many / few < 1 and simulate("7b", 3, 1024, FAST).states == pytest.approx(
            simulate("7b", 3, 64, FAST).states / 16
        )

    def test_notes_002_order_of_offloading_and_stage_3(self):
        """The notes: speed 2 + offload > 3, memory 2 + offload < 3 (read as: 3 takes less)."""
        offloaded, third = simulate("7b", 2, 8, FAST, offload=True), simulate("7b", 3, 8, FAST)
        assert offloaded.states == third.states == 14 * 10**9
        assert offloaded.hidden > third.exposed
        assert simulate("7b", 2, 64, FAST, offload=True).states > simulate("7b", 3, 64, FAST).states

    def test_a_slow_network_binds_every_stage(self):
        assert all(round(break_even(stage, 64, SLOW), -3) == 14_000 for stage in (1, 2))
        assert break_even(3, 64, SLOW) == pytest.approx(1.5 * break_even(2, 64, SLOW))
        assert all(simulate("7b", stage, 64, SLOW).communication > simulate("7b", stage, 64, SLOW).compute
                   for stage in (0, 1, 2, 3))  # fmt: skip
