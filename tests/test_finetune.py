"""`handtuned finetune`, run as a user runs it, on a tiny model: what it trains, and what it leaves behind."""

import json

import finetuned
import pytest
import torch
from finetuned import finetune, losses

from handtuned import cli, doctor

pytest.importorskip("transformers")

model_dir, rows, finished = finetuned.model_dir, finetuned.rows, finetuned.finished


def test_run_leaves_everything_that_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "handtuned.json", "metrics.jsonl",
                     "loss.png", "run.json", "results.json", "checkpoint-8", "checkpoint-12"}  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]
    assert "checkpoint-4" not in names, "--save-total-limit keeps 2"
    run = json.loads((finished / "run.json").read_text())
    assert run["command"] and run["versions"]["torch"] == torch.__version__
    first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(first)
    assert (finished / "loss.png").read_bytes()[:4] == b"\x89PNG"
    curve = losses(finished)
    assert len(curve) == 12 and sum(curve[-3:]) < sum(curve[:3])


def test_pain_7_accumulation_equals_the_big_batch(model_dir, rows, tmp_path):
    """1 × 8 rows and 8 × 1 rows, of different lengths, give the same first steps."""
    curves = []
    for micro, accumulate in (("8", "1"), ("1", "8")):
        out = tmp_path / micro
        assert finetune(model_dir, rows, out, "--per-device-train-batch-size", micro,
                        "--gradient-accumulation-steps", accumulate, "--max-steps", "4") == 0  # fmt: skip
        curves.append(losses(out))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(model_dir, rows, tmp_path):
    curves = []
    for name, flags in (("plain", []), ("checkpointed", ["--gradient-checkpointing"])):
        assert finetune(model_dir, rows, tmp_path / name, "--max-steps", "4", *flags) == 0
        curves.append(losses(tmp_path / name))
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-6, atol=1e-6)


def test_pain_19_the_end_of_turn_is_learnt_and_shown(model_dir, rows, tmp_path, capsys):
    """pad = end token here, as in SmolLM2; the shown sample marks the end token as learnt."""
    assert finetune(model_dir, rows, tmp_path / "out", "--max-steps", "1") == 0
    shown = capsys.readouterr().out
    assert "<|end|><<" in shown and ">>" in shown
    long = tmp_path / "long.jsonl"
    chat = [{"role": "user", "content": "w1 " * 80}, {"role": "assistant", "content": "w2"}]
    long.write_text(json.dumps({"messages": chat}) + "\n")
    assert finetune(model_dir, str(long), tmp_path / "nothing", "--eval-fraction", "0") == 2
    assert "nothing to learn" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pain_5_and_8_low_precision_trains_with_fp32_adapters(model_dir, rows, tmp_path, dtype):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    assert finetune(model_dir, rows, out, "--dtype", dtype, "--max-steps", "8") == 0
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {torch.float32}
    curve = losses(out)
    assert all(value == value for value in curve) and sum(curve[-3:]) < sum(curve[:3])


def test_pain_14_quantizing_does_not_upcast(model_dir):
    from handtuned.training.models import load_base

    model, _ = load_base(model_dir, "qlora", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}


def test_pain_18_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    from handtuned.training.models import choose_dtype

    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert choose_dtype("auto", torch.device("cuda")) is expected
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32


def test_pain_17_doctor_says_what_runs_where(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "a CPU tensor" in text and "finetune" in text


def test_doctor_in_an_emulated_process(monkeypatch):
    monkeypatch.setattr(doctor, "backend", lambda tensor: "sm_90")
    assert "a CPU tensor   the compiled Triton kernel, in the emulator of sm_90\n" in doctor.report()


def test_both_spellings_and_the_ecosystems_names_work(model_dir, rows, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["finetune", "--model_name_or_path", model_dir, "--dataset", rows, "--output_dir", str(out),
                     "--max_steps=1", "--lora_r", "2", "--per_device_train_batch_size", "2", "--device", "cpu",
                     "--max_seq_length", "64"]) == 0  # fmt: skip
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2


def test_softcapped_model_gets_its_full_logits(tmp_path):
    """A head that does more than one product is noticed, and the loss is still the model's own."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from handtuned.training.evaluation import CausalLM

    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=2.0)  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    ids = torch.randint(50, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    answers = CausalLM(model, ids[:1])
    assert answers.head is None
    want = model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(answers.loss({"input_ids": ids, "labels": labels}), want)


def test_each_step_is_that_of_peft_and_transformers(model_dir, rows, tmp_path):
    """A loop written with their parts, from our first adapter and in our order of rows, has our losses and weights.

    The learning rates are theirs too, but for the first step, which they take at 0 and lose.
    """
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    from handtuned.training import data

    steps, out = 12, tmp_path / "out"
    flags = ["--method", "lora", "--max-steps", str(steps), "--eval-fraction", "0", "--weight-decay", "0.1"]
    assert finetune(model_dir, rows, out, *flags, "--warmup-ratio", "0.25", "--gradient-accumulation-steps", "2") == 0

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = data.encode_rows(data.load_rows(rows).rows, tokenizer, 64).examples
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(42)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 4, steps)
    first = first_adapter(model_dir, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(first[name.replace(".default", "")])
    curve, rates = [], [json.loads(line)["learning_rate"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step in range(steps):
        if step == 0:
            optimizer.param_groups[0]["lr"] = rates[0]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[step])
        picked = [examples[i] for i in data.batch_indices(step, len(examples), 8, 42)]
        tokens, total = sum(example.answer_tokens for example in picked), 0.0
        for half in (picked[:4], picked[4:]):
            batch = data.collate(half, tokenizer.pad_token_id)
            loss = model(**batch, num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(total)
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(curve), rtol=1e-5, atol=1e-5)
    ours = load_file(out / "adapter_model.safetensors")
    for name, value in peft.get_peft_model_state_dict(model).items():
        assert (ours[name] - value).norm() <= 1e-3 * value.norm(), name


def first_adapter(model_dir, config):
    """The adapter that `finetune` begins with, by the names of peft's parameters."""
    from handtuned.nn import apply_lora_to_model

    from handtuned.training.models import load_base

    model, _ = load_base(model_dir)
    torch.manual_seed(42)
    apply_lora_to_model(model, config.r, config.lora_alpha, "all-linear")
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    return {
        f"base_model.model.{path}.{names[own]}": parameter
        for path, own, parameter in ((*name.rsplit(".", 1), p) for name, p in model.named_parameters())
        if own in names
    }
