"""`handtuned finetune --method full`: every parameter trained, in FP32 or from FP32 masters, and used afterwards."""

import json
import shutil

import finetuned
import pytest
import torch
from finetuned import finetune, losses

from handtuned import cli

pytest.importorskip("transformers")

model_dir, rows = finetuned.model_dir, finetuned.rows
FULL = ["--method", "full", "--max-steps", "6", "--save-steps", "2"]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def runs(model_dir, rows, tmp_path_factory):
    """A run of each dtype, made when it is first asked for."""
    made = {}

    def run(dtype):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("full") / dtype
            assert finetune(model_dir, rows, made[dtype], *FULL, "--dtype", dtype) == 0
        return made[dtype]

    return run


def steps(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def load(place, dtype="auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_parameter_is_trained_and_a_plain_model_is_left(model_dir, runs, dtype):
    out = runs(dtype)
    before, after = load(model_dir), load(out)
    assert {p.dtype for p in after.parameters()} == {getattr(torch, dtype)}
    for name, parameter in after.named_parameters():
        assert not torch.equal(parameter, before.get_parameter(name).to(parameter.dtype)), f"{name} was not trained"
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "handtuned.json",
                     "chat_template.jinja", "results.json"}  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp") or "adapter" in name]
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    curve = losses(out)
    assert sum(curve[-2:]) < sum(curve[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_is_bit_equal(runs, tmp_path, dtype):
    whole, out = runs(dtype), tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "model.safetensors").unlink()
    assert cli.main(["finetune", "--resume", str(out / "checkpoint-4")]) == 0
    assert losses(out) == losses(whole)
    for name in ("model.safetensors", "checkpoint-6/optimizer.safetensors", "checkpoint-6/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_the_masters_hold_bits_that_the_model_does_not(runs):
    from safetensors.torch import load_file

    kept = load_file(runs("bfloat16") / "checkpoint-6" / "optimizer.safetensors")
    parameters = list(load(runs("bfloat16")).parameters())
    for index, parameter in enumerate(parameters):
        assert torch.equal(kept[f"{index}.master"].bfloat16(), parameter)
    assert any(not torch.equal(kept[f"{i}.master"], p.float()) for i, p in enumerate(parameters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_generate_and_merge_know_it(runs, tmp_path, capsys, dtype):
    out, answers = str(runs(dtype)), set()
    capsys.readouterr()
    for words in (["--adapter", out], ["--model", out], ["--model", f"{out}/checkpoint-6"]):
        assert cli.main(["generate", *words, "--device", "cpu", "--max-new-tokens", "5", "w1 w2"]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1
    assert cli.main(["merge", "--adapter", out, "--out", str(tmp_path / "merged")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{out} is a whole model already, without an adapter to merge" in said
    assert not (tmp_path / "merged").exists()


def test_two_ranks_are_one_process_with_twice_the_accumulation(model_dir, rows, tmp_path):
    """DDP averages the gradients, 16-bit ones too, before the masters receive them."""
    from ranks import one_after_another

    flags = ["--model", model_dir, "--data", rows, "--eval-fraction", "0", "--max-steps", "4", "--method", "full"]
    flags += ["--device", "cpu", "--max-seq-length", "64", "--per-device-train-batch-size", "2"]
    flags += ["--learning-rate", "2e-3"]
    named = {dtype: ["--dtype", dtype, "--parallel", "ddp"] for dtype in ("float32", "float16")}
    codes, printed = one_after_another(flags, tmp_path, named)
    assert codes == {0: ["0", "0"], 1: ["0", "0"]}, printed
    for dtype in named:
        out = tmp_path / f"alone-{dtype}"
        more = ["--dtype", dtype, "--gradient-accumulation-steps", "2", "--output-dir", str(out)]
        assert cli.main(["finetune", *flags, *more]) == 0
        for ours, theirs in zip(steps(tmp_path / dtype), steps(out), strict=True):
            for name in ("loss", "grad_norm"):  # as close as in test_distributed.py; in FP16 4 roundings
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5 if dtype == "float32" else 4 * 2**-10)


@pytest.mark.parametrize("words, message", [
    ([], "--adapter DIR is missing, or --model"),
    (["--adapter", "{full}", "--model", "{base}"], "holds a whole model"),
    (["--adapter", "nowhere"], "--adapter nowhere: no such directory"),
])  # fmt: skip
def test_what_generate_cannot_do_is_one_line(model_dir, runs, capsys, words, message):
    words = [word.format(full=runs("float32"), base=model_dir) for word in words]
    assert cli.main(["generate", *words, "w1"]) == 2
    assert message in capsys.readouterr().err


def test_a_quantized_base_is_refused(model_dir):
    from handtuned.training.models import add_adapters, load_base
    from handtuned.training.settings import FinetuneSettings

    model, _ = load_base(model_dir, "qlora")
    with pytest.raises(ValueError, match="weight of smollm2 is quantized"):
        add_adapters(model, FinetuneSettings(method="full"))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("optim, scheduler", [("adamw8bit", "linear"), ("adamw", "constant"), ("adamw8bit", "cosine")])
def test_each_optimizer_and_schedule_resumes_bit_equal(rows, tmp_path, method, optim, scheduler):
    from safetensors.torch import load_file
    from tiny import make_model

    wide = make_model(tmp_path / "model", hidden_size=128)  # layers of 4,096 elements and more have 8-bit moments
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = ["--method", method, "--optim", optim, "--lr-scheduler-type", scheduler, "--warmup-ratio", "0.3"]
    flags += ["--lora-r", "32"] if method == "lora" else ["--dtype", "bfloat16"]
    assert finetune(wide, rows, whole, *flags, "--max-steps", "4", "--save-steps", "2") == 0
    shutil.copytree(whole, out)
    assert cli.main(["finetune", "--resume", str(out / "checkpoint-2")]) == 0
    assert losses(out) == losses(whole)
    for name in ("model" if method == "full" else "adapter_model", "checkpoint-4/optimizer"):
        assert (out / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()
    moments = load_file(whole / "checkpoint-4" / "optimizer.safetensors").items()
    assert any("levels" in key and value.dtype == torch.uint8 for key, value in moments) == (optim == "adamw8bit")
    rates = [row["learning_rate"] / 1e-2 for row in steps(whole)]
    down = {"linear": [1, 0.5], "constant": [1, 1], "cosine": [1, 0.5]}[scheduler]
    assert rates == pytest.approx([0.25, 0.5, *down])


def test_files_that_do_not_give_the_model_back_are_no_success(model_dir, rows, tmp_path, capsys, monkeypatch):
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    write = LlamaForCausalLM.save_pretrained

    def damaged(self, place, **more):
        write(self, place, **more)
        tensors = load_file(f"{place}/model.safetensors")
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, f"{place}/model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damaged)
    assert finetune(model_dir, rows, tmp_path / "out", *FULL) == 2
    assert "the model cannot be saved: model.norm.weight was read back with other values" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("model.safetensors"))


def test_a_generation_config_that_transformers_would_not_save_is_mended(rows, tmp_path, capsys):
    from tiny import make_model

    place = make_model(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    assert finetune(place, rows, tmp_path / "out", "--method", "full", "--max-steps", "1") == 0
    assert "generation_config.json, which transformers would not save as it is" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_vision_tower_is_left_as_it_is(tmp_path):
    """No row reaches it, and weight decay alone would wear it away."""
    import tiny_architectures
    from safetensors.torch import load_file

    tiny_architectures.make("qwen3_vl", tmp_path / "model")
    rows = tiny_architectures.write_rows(tmp_path / "rows.jsonl")
    flags = ["--method", "full", "--max-steps", "2", "--weight-decay", "0.1"]
    with pytest.warns(UserWarning, match=r"--method full leaves out model.visual with 50.7% of the parameters"):
        assert finetune(str(tmp_path / "model"), rows, tmp_path / "out", *flags) == 0
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("model", "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "visual" not in name}
