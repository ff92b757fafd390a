"""Runs as people begin, stop and go on with them: odd rows, changed files, full disks, tokenizers without padding."""

import gzip
import io
import json
import os
import resource
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import finetuned
import pytest
import torch
from finetuned import COMMON, finetune
from handtuned.nn.files import write_safetensors
from tiny import make_model, write_rows

from handtuned import cli
from handtuned.training import checkpoints
from handtuned.training.evaluation import generate
from handtuned.training.files import read_places
from handtuned.training.models import training_record
from handtuned.training.settings import FinetuneSettings, resumed
from handtuned.training.world import World

transformers = pytest.importorskip("transformers")
model_dir, rows, finished = finetuned.model_dir, finetuned.rows, finetuned.finished
ONE = ["--max-steps", "1", "--eval-fraction", "0"]


def zstd(content):
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """safetensors has an error of its own for it, which is none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.safetensors cannot be written: .*large"):
            write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_needs_no_room_for_the_checkpoints_that_lie_there(tmp_path, monkeypatch):
    settings, base = FinetuneSettings(save_total_limit=2, max_steps=9), SimpleNamespace(marks={"base": "b"})
    training = SimpleNamespace(world=World(), elements=1000, settings=settings, base=base)
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))
    for step, needed in ((4, 48_000), (8, 32_000), (9, 32_000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        free[0] = needed - 1
        with pytest.raises(ValueError, match="no disk space"):
            checkpoints.begin(tmp_path, training)
        free[0] = needed
        assert checkpoints.begin(tmp_path, training) == {}


def test_the_command_that_began_a_run_resumes_it():
    """Its settings are looked at together: pissa needs --method lora."""
    typed = {"method": "lora", "init_lora_weights": "pissa"}
    saved = {"settings": FinetuneSettings(**typed).to_json()}
    assert resumed("run", typed, saved).init_lora_weights == "pissa"
    with pytest.raises(ValueError, match="--lora-r was 8, now 4"):
        resumed("run", typed | {"lora_r": 4}, saved)


def test_held_out_rows_that_have_changed_are_refused(model_dir, rows, tmp_path, capsys):
    held_out = write_rows(tmp_path / "held.jsonl", count=4, seed=1)
    flags = ["--eval-data", held_out, "--max-steps", "2", "--save-steps", "1"]
    assert finetune(model_dir, rows, tmp_path / "out", *flags) == 0
    write_rows(held_out, count=3, seed=2)
    again = ["finetune", "--resume", str(tmp_path / "out"), "--max-steps", "3"]
    assert cli.main(again) == 2
    assert "the held-out data is not what it was when this run began" in capsys.readouterr().err
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    del run["marks"]["held_out"]  # as of a run before there was such a mark
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    write_rows(held_out, count=4, seed=1)
    assert cli.main(again) == 0


def test_rows_from_standard_input_are_not_asked_for_again(model_dir, rows, tmp_path, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(Path(rows).read_bytes())))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert finetune(model_dir, rows, tmp_path / "out", "--max-steps", "1", "--eval-data", "-") == 0
    assert training_record(tmp_path / "out")["eval_data"] is None


def test_a_weight_that_takes_no_row(model_dir, rows, tmp_path, capsys):
    assert finetune(model_dir, f"{rows}:0", tmp_path / "out", *ONE) == 2
    assert "training rows: nothing to learn: no rows" in capsys.readouterr().err


@pytest.mark.parametrize("pack", [bytes, lambda rows: gzip.compress(rows, 1), zstd], ids=["plain", "gzip", "zstd"])
def test_rows_through_a_pipe_that_begins_with_a_single_byte(monkeypatch, pack):
    """From 4 MB on the ratio of packed to unpacked bytes is looked at, and a pipe has no position."""
    line = b'{"prompt": "%06d", "completion": "' + b"b" * 60 + b'"}\n'
    content = pack(b'{"rows": [' + b",".join(line % number for number in range(50_000)) + b"]}")
    reading, writing = os.pipe()
    os.write(writing, content[:1])
    file = os.fdopen(reading, "rb")
    assert len(file.peek()) == 1

    def write_on():
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(content[1:])

    threading.Thread(target=write_on, daemon=True).start()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
    found = [row["prompt"] for _, row in read_places("-")]
    assert found == [f"{number:06d}" for number in range(50_000)]


def test_epochs_of_the_shipped_task_are_those_that_were_asked_for():
    assert FinetuneSettings().with_defaults().max_steps == 80
    assert FinetuneSettings(num_train_epochs=3.0).with_defaults().max_steps is None
    assert FinetuneSettings(num_train_epochs=1.0, max_steps=7).with_defaults().max_steps == 7


def test_the_files_of_a_processor_go_with_a_whole_model(model_dir, rows, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(model_dir, place)
    (place / "preprocessor_config.json").write_text("{}")
    assert finetune(str(place), rows, tmp_path / "out", *ONE, "--method", "full") == 0
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"


def test_answers_without_a_padding_token(tmp_path):
    place = make_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    chats = [[{"role": "user", "content": words}] for words in ("w1", "w1 w2 w3")]
    want = generate(model, tokenizer, chats, 4)
    tokenizer.pad_token = tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    assert len(generate(model, tokenizer, chats, 4)) == len(want) == 2


def test_a_lone_space_of_sentencepiece_is_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from handtuned.training.encoding import _is_special

    inner = Tokenizer(models.BPE({"▁": 0, "a": 1, "<s>": 2, "</s>": 3}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([0]) == ""
    assert [_is_special(token, tokenizer) for token in range(4)] == [False, False, True, True]


def test_two_ranks_where_rows_miss_an_adapted_layer(tmp_path):
    """Under ddp each rank joins in the sum of a gradient that only others have."""
    pytest.importorskip("peft")
    import tiny_architectures
    from ranks import one_after_another

    tiny_architectures.make("deepseek_v4", tmp_path / "model")
    data = tiny_architectures.write_rows(tmp_path / "rows.jsonl")
    flags = ["--model", str(tmp_path / "model"), "--data", data, *COMMON, *ONE, "--method", "lora",
             "--per-device-train-batch-size", "1", "--max-steps", "3", "--max-seq-length", "48"]  # fmt: skip
    codes, printed = one_after_another(flags, tmp_path, {"ddp": ["--parallel", "ddp"]})
    assert codes == {0: ["0"], 1: ["0"]}, printed
