"""A run of `handtuned finetune` on a tiny model, and the fixtures that its tests share."""

import json
from pathlib import Path
from unittest import mock

import forked
import pytest
from tiny import make_model, write_rows

from handtuned import cli

COMMON = ["--per-device-train-batch-size", "4", "--learning-rate", "1e-2", "--device", "cpu", "--max-seq-length", "64"]


def finetune(model_dir, rows, out, *flags):
    return cli.main(["finetune", "--model", model_dir, "--data", rows, "--output-dir", str(out), *COMMON, *flags])


def merge(run, out, *flags):
    """`handtuned merge`, which reads the model back in a forked process; test_merge_command.py has its own too."""
    with mock.patch("handtuned.merge.subprocess.run", forked.run):
        return cli.main(["merge", "--adapter", str(run), "--out", str(out), *flags])


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(model_dir, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert finetune(model_dir, rows, out, "--max-steps", "12", "--save-steps", "4", "--lora-dropout", "0.1") == 0
    return out
