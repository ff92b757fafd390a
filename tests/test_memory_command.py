"""`handtuned memory` with the flags of `finetune`: what it says beside what `--measure` counts, and what it refuses."""

import json
import re
import shutil

import pytest
from finetuned import finetune
from tiny import make_model, write_rows

from handtuned import cli

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that is larger than the tables of the optimizer, and an adapter of it."""
    place = tmp_path_factory.mktemp("memory")
    model, rows = make_model(place / "model", hidden_size=256, intermediate_size=512), write_rows(place / "rows.jsonl")
    assert finetune(model, rows, place / "adapter", "--max-steps", "1", "--lora-r", "12", "--use-dora") == 0
    return place


@pytest.mark.parametrize(
    "flags",
    [
        "--method full --dtype bfloat16",
        "--method full --dtype float16 --optim adamw8bit --gradient-accumulation-steps 2",
        "--method lora --init-lora-weights pissa",
        "--method lora --use-dora",
        "--init-adapter ADAPTER",
        "--init-adapter ADAPTER --method lora --lora-fa --gradient-checkpointing",
    ],
)
def test_within_5_percent_of_what_is_measured(place, capsys, flags):
    words = ["--batch", "4", "--seq", "64", "--measure", *flags.replace("ADAPTER", str(place / "adapter")).split()]
    assert cli.main(["memory", "--model", str(place / "model"), *words]) == 0
    off = re.search(r"off by (\S+) %", capsys.readouterr().out)[1]
    assert abs(float(off)) < 5


def test_a_budget_goes_with_an_adapter_to_start_from(place, tmp_path, capsys):
    flags = ["--max-steps", "1", "--init-adapter", str(place / "adapter"), "--memory-budget", "100MB"]
    assert finetune(str(place / "model"), str(place / "rows.jsonl"), tmp_path / "out", *flags) == 0
    assert "0 of 2 layers recomputed" in capsys.readouterr().out


def test_fsdp_is_priced_as_zero_3(place, capsys):
    said = []
    for flags in (["--parallel", "fsdp"], ["--zero", "3"]):
        assert cli.main(["memory", "--model", str(place / "model"), "--gpus", "4", *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "ZeRO-3 over 4" in said[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method full --lora-r 4", "--lora-r is of adapters, and --method full has none"),
        ("--method lora --skip-modules q_proj", "--skip-modules leaves layers dense under --method qlora"),
        ("--zero 1 --parallel zero2", "--zero 1 is another stage than --parallel zero2"),
        ("--device cuda:77 --measure", "--device cuda:77: this machine has"),
        ("--optim sgd --measure", "adamw or adamw8bit"),
        ("--model 7e9 --method full --measure", "--measure must have a model to load"),
    ],
)
def test_what_finetune_refuses_is_refused(place, capsys, flags, message):
    assert cli.main(["memory", "--model", str(place / "model"), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_code_of_a_model_is_trusted_to_the_end(place, tmp_path, capsys):
    from test_base_sources import CODE

    shutil.copytree(place / "model", tmp_path / "own")
    for name, source in CODE.items():
        (tmp_path / "own" / name).write_text(source)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "configuration_own.OwnConfig",
                            "AutoModelForCausalLM": "modeling_own.OwnModel"}}  # fmt: skip
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    command = ["memory", "--model", str(tmp_path / "own"), "--method", "lora", "--seq", "64"]
    assert cli.main(command) == 2
    assert "then add --trust-remote-code" in capsys.readouterr().err
    assert cli.main([*command, "--trust-remote-code", "--gpu", "24GB"]) == 0
    said = capsys.readouterr().out
    assert "rule of thumb" in said and "24.00 GB" in said


def test_a_model_without_attention_heads(tmp_path, capsys):
    import transformers

    transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    words = ["--method", "full", "--batch", "1", "--seq", "32", "--gpu", "24GB"]
    assert cli.main(["memory", "--model", str(tmp_path), *words]) == 0
    said = capsys.readouterr().out
    assert "rule of thumb" not in said and "24.00 GB" in said
