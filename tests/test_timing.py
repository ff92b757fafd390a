"""The timing of providers: nothing wrong is timed, turns alternate, what is reported is what was measured."""

import sys
import time

import torch

from handtuned import bench
from handtuned.harness import Case, timing

CPU = torch.device("cpu")


def doubling(**providers):
    """A case: twice a random vector."""

    def check(x):
        return lambda name, result: torch.testing.assert_close(result, 2 * x)

    makers = {"handtuned": lambda x: lambda: 2 * x} | providers
    return Case("double", lambda: torch.randn(1000), makers, check, bytes=8000, flops=1000, size={"N": 1000})


def test_a_wrong_provider_is_not_timed_and_the_others_are():
    calls = []

    def wrong(x):
        return lambda: calls.append(1) or 3 * x

    record = timing.run_case(doubling(torch=wrong, right=lambda x: lambda: x + x), CPU, rounds=3)
    assert list(record["contestants"]) == ["handtuned", "right"]
    assert "not close" in record["failed"]["torch"]
    assert len(calls) == 1, "it ran for its check and never again"


def test_a_provider_that_raises_does_not_stop_the_rest():
    def broken(x):
        raise ZeroDivisionError("no")

    record = timing.run_case(doubling(torch=broken), CPU, rounds=3)
    assert record["failed"] == {"torch": "ZeroDivisionError: no"} and "handtuned" in record["contestants"]


def test_inputs_that_cannot_be_made_spoil_their_own_case_only():
    case = doubling()

    def too_large():
        raise MemoryError("no room")

    case.inputs = too_large
    record = timing.run_case(case, CPU, rounds=3)
    assert record["failed"] == {"handtuned": "no inputs: MemoryError: no room"}


def test_without_a_right_result_of_ours_nothing_is_told():
    record = timing.run_case(doubling(handtuned=lambda x: lambda: x, right=lambda x: lambda: 2 * x), CPU, rounds=3)
    assert record["contestants"] == {} and list(record["failed"]) == ["handtuned"]


def test_a_rival_that_is_not_installed_is_skipped_and_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)

    def liger(x):
        import liger_kernel  # noqa: F401

    def other(x):
        import no_such_module  # noqa: F401

    record = timing.run_case(doubling(liger=liger, torch=other), CPU, rounds=3)
    assert record["skipped"] == {"liger": "liger_kernel is not installed"}
    assert "no_such_module" in record["failed"]["torch"], "a module missing inside a rival is not an absent rival"


def test_rivals_not_asked_for_are_left_out():
    names = ("torch", "torch fused", "peft + bitsandbytes", "base layer alone")
    case = doubling(**{name: lambda x: lambda: 2 * x for name in names})
    record = timing.run_case(case, CPU, against=["peft", "torch"], rounds=3)
    assert list(record["contestants"]) == ["handtuned", "torch", "torch fused", "base layer alone"]
    assert timing.libraries("peft + bitsandbytes") == {"peft", "bitsandbytes"}


def test_turns_alternate_and_go_round_the_input_sets():
    order = []
    runs = {name: [lambda name=name, i=i: order.append(name + i) for i in "012"] for name in "ab"}
    times = timing.take_turns(runs, rounds=3, device=CPU, least=0.0)
    turns = order[10:]  # after five calls of each to find how long a turn is
    assert turns == ["a2", "b2", "a0", "b0", "a1", "b1"]
    assert times["a"]["rounds"] == 3 and times["a"]["calls"] == 1


def test_input_sets_are_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 20_000)
    made = []
    case = doubling()
    inputs = case.inputs
    case.inputs = lambda: made.append(1) or inputs()
    record = timing.run_case(case, CPU, rounds=3)
    assert len(made) == record["sets"] == 5 and record["cold"]  # 5 × 8,000 ≥ 2 × 20,000
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 10**9)
    record = timing.run_case(case, CPU, rounds=3)
    assert record["sets"] == timing.MOST_SETS and not record["cold"]
    assert "[inputs fit in the cache]" in bench.text(record)


def test_medians_and_spread():
    found = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "min": 1.0, "max": 100.0}


def test_times_and_ratio_are_those_of_the_work():
    slow = lambda x: lambda: (time.sleep(0.02), 2 * x)[1]  # noqa: E731
    quick = lambda x: lambda: (time.sleep(0.005), 2 * x)[1]  # noqa: E731
    times = timing.run_case(doubling(handtuned=quick, torch=slow), CPU, rounds=3)["contestants"]
    assert times["handtuned"]["median"] >= 0.005 and times["torch"]["median"] >= 0.02
    assert times["torch"]["ratio"] == times["torch"]["median"] / times["handtuned"]["median"]


def test_a_time_limit_leaves_three_rounds():
    case = doubling(handtuned=lambda x: lambda: (time.sleep(0.01), 2 * x)[1])
    assert timing.run_case(case, CPU, rounds=1000, share=0.0)["contestants"]["handtuned"]["rounds"] == 3


def test_compare_warms_up_before_it_times():
    order = []
    times = timing.compare({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order[:2] == ["a", "b"] and list(times) == ["a", "b"] and times["a"]["rounds"] == 9
    assert "b" in timing.table(times, ours="a")
