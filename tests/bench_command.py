"""The benchmark command and the scripts of benchmarks/, as the tests call them."""

import argparse
from pathlib import Path

from handtuned import bench
from handtuned.harness import runner

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name):
    """benchmarks/bench_NAME.py as a module."""
    return runner.load(BENCHMARKS / f"bench_{name}.py")


def run_bench(*words):
    """`handtuned bench WORDS`; gives the exit code."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args([str(word) for word in words]))


def stay_in_this_process(monkeypatch):
    """What is replaced in this process holds for the benchmarks too."""
    monkeypatch.setattr(runner, "in_a_process", lambda args, names, stop: runner.run_benchmarks(args, names))
