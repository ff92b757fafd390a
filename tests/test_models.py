"""The base model as it is loaded: frozen, quantized while it is read, known again by its fingerprint."""

import pytest
import torch
from tiny import make_model

from handtuned.training import models
from handtuned.training.sources import cache_directory

pytest.importorskip("transformers")


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
@pytest.mark.skipif(not (cache_directory() / "SmolLM2-135M-Instruct").is_dir(), reason="SmolLM2 is not fetched")
def test_smollm2_knows_the_capital_of_france_in_4_bits():
    from handtuned.training.evaluation import generate

    model, tokenizer = models.load_base("smollm2", "qlora")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in generate(model, tokenizer, [chat], max_new_tokens=8)[0]
