"""The estimate beside the measurement: within 5 %, for every method, on transformers' Llama."""

import pytest
import torch
from handtuned.nn.live_memory import LiveMemory
from handtuned.quant import quantize_model, quantize_nf4

from handtuned.memory import measure
from handtuned.memory.estimate import estimate
from handtuned.memory.tracker import training_step
from handtuned.training.sources import cache_directory

transformers = pytest.importorskip("transformers")
SIZES = {
    "tied": dict(vocab_size=1000, hidden_size=96, intermediate_size=256, num_attention_heads=6, num_key_value_heads=2,
                 tie_word_embeddings=True),
    "untied": dict(vocab_size=500, hidden_size=128, intermediate_size=300, num_attention_heads=4,
                   num_key_value_heads=4, tie_word_embeddings=False),
}  # fmt: skip


def check(build, method, batch, seq, dtype=torch.float32, flash=True, within=0.05, **how):
    with LiveMemory(scan=False) as memory:  # which has seen all that the step finds there
        model = build()
        if method == "qlora":
            quantize_model(model)
        step = training_step(model, method, batch, seq, dtype=dtype, **how)
        memory.reset_peak()
        step()
    peak = memory.peak_added
    breakdown = estimate(model, method, dtype, batch=batch, seq=seq, flash=flash, **how)
    assert breakdown.peak == pytest.approx(peak, rel=within), f"{breakdown.peak / peak - 1:+.2%}\n{breakdown}"
    return peak, step


def llama(kind="tied", dtype=torch.float32, flash=True):
    config = transformers.LlamaConfig(num_hidden_layers=4, **SIZES[kind])
    config._attn_implementation = "sdpa" if flash else "eager"
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("logits", ["chunked", "full"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", SIZES)
def test_within_5_percent(kind, method, logits, checkpoint):
    batch, seq = (2, 40) if kind == "tied" else (4, 128)
    check(lambda: llama(kind), method, batch, seq, logits=logits, checkpoint=checkpoint)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_within_5_percent_in_bf16(method, checkpoint):
    check(lambda: llama(dtype=torch.bfloat16), method, 2, 64, torch.bfloat16, checkpoint=checkpoint)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_within_5_percent_with_eager_attention(method, checkpoint):
    check(lambda: llama(flash=False), method, 2, 64, flash=False, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ("q_proj", "v_proj")},
        {"target_modules": ("o_proj", "down_proj")},
        {"lora_r": 64},
        {"accumulation_steps": 2},
    ],
    ids=lambda how: str(how),
)
def test_within_5_percent_for_other_adapters(how):
    check(llama, "lora", 2, 64, **how)


def test_accumulated_gradients_of_a_whole_model():
    check(llama, "full", 2, 64, accumulation_steps=2)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_measure_comes_to_the_same_peak(method):
    """Among all the tensors of the process, which it looks for first."""
    quantize_nf4(torch.randn(64, 64)).dequantize()  # makes the tables that the whole process shares
    with LiveMemory() as others:
        pass
    peak, step = check(llama, method, 2, 64)
    found = measure(step).peak - others.before - others.added  # of what is not the step's, what has not died since
    assert found == pytest.approx(peak, rel=1e-3)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_within_5_percent_on_smollm2(method, checkpoint):
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not directory.is_dir():
        pytest.skip("SmolLM2 is not in the cache")
    config = transformers.AutoConfig.from_pretrained(directory, dtype=torch.float32)
    check(
        lambda: transformers.AutoModelForCausalLM.from_config(config),
        method, 2, 128, logits="chunked", checkpoint=checkpoint,
    )  # fmt: skip
