"""The estimate beside the measurement on architectures of all kinds, and with the flags of `finetune`."""

from functools import partial

import pytest
import torch
from handtuned.nn.checkpoint_layers import repeated_layers
from handtuned.nn.live_memory import LiveMemory
from handtuned.quant import quantize_model
from test_checkpoint_layers import KINDS, model_of

from handtuned.memory import dry_run, estimate
from handtuned.memory.estimate import run_dry
from handtuned.memory.fit import arguments
from handtuned.memory.tracker import training_step
from handtuned.training.settings import FinetuneSettings

transformers = pytest.importorskip("transformers")
WITHIN = 0.05


def check(kind, dtype=torch.float32, paths=None, ranks=1, **flags):
    """The peak of a step of a model, as these flags of `finetune` would train it, beside the estimate."""
    settings = FinetuneSettings(**{"per_device_train_batch_size": 2, "max_seq_length": 48} | flags)
    wanted = arguments(settings, dtype, ranks) | {"checkpoint": paths or settings.gradient_checkpointing}
    memory = LiveMemory(scan=False)
    with memory:
        model = model_of(kind) if isinstance(kind, str) else kind()
    found = estimate(model, **wanted)
    with memory:  # which has seen all that the step finds there
        if settings.method == "qlora":
            quantize_model(model)
        names = ("method", "batch", "seq", "checkpoint", "accumulation_steps", "adapt")
        step = training_step(model, dtype=dtype, **{name: wanted[name] for name in names})
        memory.reset_peak()
        step()
    peak = memory.peak_added
    assert found.peak == pytest.approx(peak, rel=WITHIN), f"{found.peak / peak - 1:+.2%}\n{found}"
    return found


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mamba"])
def test_within_5_percent_on_every_family(kind, method):
    check(kind, method=method)


def test_mamba_whole():
    check("mamba", method="full")


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "mixtral"])
@pytest.mark.parametrize("count", [1, 2])
def test_within_5_percent_where_some_layers_are_recomputed(kind, count):
    """Also where they are not the first: each plan is put together from two runs."""
    check(kind, paths=list(repeated_layers(model_of(kind)))[-count:], method="lora")


def test_the_input_of_the_first_layer_is_kept_by_its_plan_alone():
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
                                      num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    build = partial(transformers.LlamaForCausalLM, config)
    check(build, paths=["model.layers.0"], method="lora", per_device_train_batch_size=4, max_seq_length=64)


@pytest.mark.parametrize(
    "flags",
    [
        {"rank_pattern": ("q_proj=48", "down_proj=96")},
        {"lora_r": 32, "exclude_modules": ("k_proj",), "layers_to_transform": (0,)},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_within_5_percent_with_the_flags_of_finetune(flags):
    check("qwen3", method="lora", **flags)


def test_a_rank_of_its_own_is_counted():
    plain, wide = (check("llama", method="lora", rank_pattern=p) for p in (None, ("q_proj=40",)))
    assert wide.trainable - plain.trainable == 3 * 32 * (32 + 32), "32 ranks more in three layers"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_what_it_says(stage):
    model = model_of("qwen3")
    base = {"method": "full", "batch": 2, "seq": 48, "dtype": "float32"}
    one, four = estimate(model, **base), estimate(model, **base, zero=stage, world_size=4)
    parts = ["optimizer state", "gradients", "weights"]
    assert [one[part] // four[part] for part in parts] == [4] * stage + [1] * (3 - stage)
    assert one.activations == four.activations


def test_what_a_layer_costs_does_not_depend_on_how_many_are_run(monkeypatch):
    """Of many equal layers three run and stand for all."""
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=7,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    found = []
    for shorten in (dry_run._shorten, lambda model: {}):
        monkeypatch.setattr(dry_run, "_shorten", shorten)
        run_dry.cache_clear()
        paths = ["model.layers.0", "model.layers.3", "model.layers.6"]
        some = estimate(config, "lora", batch=2, seq=32, checkpoint=paths)
        found.append((some.moments, some.lines, some.flops))
    assert found[0] == found[1]
