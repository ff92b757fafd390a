"""Checkpoints around the layers of transformers' models: the same gradients to the bit, in less memory."""

import copy
import pickle

import pytest
import torch
from handtuned.nn.checkpoint_layers import checkpoint_layers, repeated_layers
from handtuned.nn.live_memory import LiveMemory
from torch import nn

transformers = pytest.importorskip("transformers")
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=0,
             bos_token_id=1)  # fmt: skip
KINDS = {
    "llama": dict(attention_dropout=0.1),
    "qwen3": dict(attention_dropout=0.1),
    "gemma2": dict(attention_dropout=0.1, sliding_window=8),
    "phi3": dict(resid_pdrop=0.1),
    "smollm3": {},
    "granite": dict(attention_dropout=0.1),
    "olmo2": {},
    "gpt2": dict(n_positions=64, resid_pdrop=0.1),
    "mixtral": dict(num_local_experts=4),
    "gpt_oss": dict(num_local_experts=4, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4),
    "gemma3_text": dict(sliding_window=8, layer_types=["sliding_attention", "full_attention", "full_attention"]),
    "mamba": dict(hidden_size=32, state_size=4, num_hidden_layers=2, use_mambapy=False),
}  # fmt: skip


def model_of(kind):
    known = transformers.CONFIG_MAPPING[kind]
    own = {k: v for k, v in (SIZES | KINDS[kind]).items() if k not in ("head_dim",) or kind not in ("gpt2", "mamba")}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(known(**own)).train()


def gradients(model, **options):
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    tokens = torch.arange(40).view(2, 20) % 96
    model(input_ids=tokens, labels=tokens, **options).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal_to_the_bit(kind):
    """With dropout, where the architecture has it. A cache that the caller leaves on is not written twice."""
    model = model_of(kind)
    plain = gradients(model, use_cache=False)
    checkpoint_layers(model)
    recomputed = gradients(model, use_cache=False)
    assert recomputed.keys() == plain.keys()
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    torch.testing.assert_close(gradients(model, use_cache=True), plain)


def test_a_copy_computes_with_its_own_weights():
    model = model_of("llama")
    checkpoint_layers(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(torch.arange(8)[None]).logits.any()
    gradients(twin)
    assert all(parameter.grad is None for parameter in model.parameters())
    checkpoint_layers(twin, ())
    pickle.dumps(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_of_the_decoder_are_found(kind):
    model = model_of(kind)
    layers = repeated_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert len({type(layer) for layer in layers.values()}) == 1


def test_less_is_kept_and_again_all_of_it_without():
    model, tokens = model_of("llama"), torch.arange(40).view(2, 20)

    def kept():
        with LiveMemory(scan=False) as memory:
            out = model(input_ids=tokens, use_cache=False).logits
            return memory.added - out.nbytes

    whole, paths = kept(), list(repeated_layers(model))
    checkpoint_layers(model)
    every = kept()
    checkpoint_layers(model, paths[:1])
    one = kept()
    checkpoint_layers(model, ())
    assert every < one < whole == kept()


def test_eval_and_no_grad_run_plainly_with_a_cache():
    model, tokens = model_of("llama"), torch.arange(20).view(1, 20)
    checkpoint_layers(model)
    model.eval()
    written = model.generate(tokens, max_new_tokens=4, do_sample=False)
    checkpoint_layers(model, ())
    assert torch.equal(written, model.generate(tokens, max_new_tokens=4, do_sample=False))


def test_a_vision_tower_beside_the_decoder():
    """The layers of both are found; text alone runs through the decoder."""
    text = dict(SIZES, model_type="llama", num_hidden_layers=2)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                  patch_size=8, model_type="clip_vision_model", projection_dim=32)  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).train()
    assert len([path for path in repeated_layers(model) if "language_model" in path]) == 2
    assert len([path for path in repeated_layers(model) if "vision" in path]) == 2
    plain = gradients(model, use_cache=False)
    checkpoint_layers(model)
    recomputed = gradients(model, use_cache=False)
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


def test_what_has_no_layers_is_refused():
    with pytest.raises(ValueError, match="Linear must have repeated layers"):
        checkpoint_layers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"repeated layers \['model.layers.7'\]"):
        checkpoint_layers(model_of("llama"), ["model.layers.7"])


def test_experts_and_projections_are_no_layers():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()]), "heads": nn.ModuleList([nn.Linear(2, 2)])})
    assert list(repeated_layers(model)) == ["layers.0", "layers.1"]
