"""The blocks against transformers' Llama, and the documents' layer against its plain self."""

import copy

import pytest
import torch
from handtuned.nn.live_memory import LiveMemory
from handtuned.nn.transformer import (
    CheckpointedTransformerLayer,
    RMSNorm,
    Transformer,
    TransformerBlock,
    apply_rotary,
    rotary_angles,
)
from helpers import assert_same_function
from torch import nn

transformers = pytest.importorskip("transformers")


def llama(seed=0, **changes):
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=100, num_hidden_layers=4, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)  # fmt: skip
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # norms that are not all ones
    return theirs


def ours_of(theirs):
    config = theirs.config
    ours = Transformer(
        config.vocab_size, config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.intermediate_size, config.tie_word_embeddings, num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim, rope_theta=config.rope_parameters["rope_theta"], norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
    ],
    ids=["grouped", "tied", "all-heads", "one-kv-head", "wide-heads", "theta-100000"],
)
def test_logits_and_gradients_equal_transformers_llama(changes):
    theirs = llama(**changes)
    ours = ours_of(theirs)
    tokens = torch.randint(0, 97, (3, 37))
    expected, logits = theirs(tokens, use_cache=False).logits, ours(tokens)
    terms = 4 * 7 * 100 + 37  # the longest chain: every product of every layer; then the sum over the tokens
    assert_same_function(logits, expected, terms=terms)
    expected.logsumexp(-1).sum().backward()
    logits.logsumexp(-1).sum().backward()
    grads = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_same_function(grads[name].grad, parameter.grad, name, terms=terms)


@pytest.mark.model
def test_logits_equal_smollm2():
    sources = pytest.importorskip("handtuned.training.sources")
    directory = sources.cache_directory() / "SmolLM2-135M-Instruct"
    if not directory.is_dir():
        pytest.skip("SmolLM2 is not in the cache")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = torch.randint(0, 49152, (1, 24))
    with torch.no_grad():
        expected, logits = theirs(tokens, use_cache=False).logits, ours_of(theirs)(tokens)
    # Logits reach ±30: 1e-5 is relative to their size.
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("segments", ["sqrt", "auto", 4, 2])
def test_checkpointed_gradients_are_bit_equal_and_smaller(segments):
    model = ours_of(llama())
    tokens = torch.randint(0, 97, (2, 33))

    def run(how):
        model.zero_grad()
        with LiveMemory(scan=False) as memory:
            model(tokens, how).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters()], memory.peak_added

    model(tokens, segments)  # "auto" measures now
    plain, plain_peak = run(None)
    ours, peak = run(segments)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert peak < plain_peak


def test_bf16_normalizes_in_fp32():
    norm, theirs = RMSNorm(64).bfloat16(), transformers.models.llama.modeling_llama.LlamaRMSNorm(64).bfloat16()
    x = (1000 * torch.randn(5, 64)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), theirs(x))


def test_rotary_turns_pairs_and_keeps_distances():
    cos, sin = rotary_angles(torch.arange(20), 8)
    q, k = torch.randn(8).expand(1, 1, 20, 8), torch.randn(8).expand(1, 1, 20, 8)
    turned_q, turned_k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_a_block_alone_counts_positions_from_zero_and_looks_back_only():
    block = TransformerBlock(32, 4, 64, num_kv_heads=2).double()
    x = torch.randn(2, 9, 32).double()
    assert_same_function(block(x), block(x, rotary_angles(torch.arange(9), 8)))
    changed = x.clone()
    changed[:, 5:] = 0
    assert_same_function(block(x)[:, :5], block(changed)[:, :5])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((30, 4, 64), "d_model must be a multiple of num_heads = 4, got 30"),
        ((32, 4, 64, 3), "num_kv_heads must divide num_heads = 4, got 3"),
        ((12, 4, 64), "head_dim must be even"),
        ((32, 0, 64), "num_heads must be at least 1, got 0"),
        ((32, 4, 64, 0), "num_kv_heads must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        TransformerBlock(*sizes)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_of_the_documents_layer_that_do_not_fit(heads):
    with pytest.raises(ValueError, match=f"num_heads must be at least 1 and divide d_model = 32, got {heads}"):
        CheckpointedTransformerLayer(32, heads, 64)


class DocumentsLayer(CheckpointedTransformerLayer):
    """As the document writes it: attention asked for its weights."""

    def forward(self, x, use_checkpoint=True):
        x = x + self._attn_block(x)
        return x + self.ffn(self.norm2(x))

    def _attn_block(self, x):
        normed = self.norm1(x)
        return self.self_attn(normed, normed, normed)[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("use_checkpoint", [True, False], ids=["checkpoint", "plain"])
def test_the_documents_layer(training, use_checkpoint):
    layer = CheckpointedTransformerLayer(d_model=32, num_heads=4, d_ff=64).train(training).double()
    documents = DocumentsLayer(32, 4, 64).train(training).double()
    documents.load_state_dict(layer.state_dict())
    x = torch.randn(2, 10, 32, dtype=torch.float64, requires_grad=True)
    expected = documents(x)
    out = layer(x, use_checkpoint=use_checkpoint)
    assert_same_function(out, expected)
    ours = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [x, *documents.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert_same_function(a, b)


def test_the_documents_layer_saves_memory_and_changes_no_bit():
    layer = CheckpointedTransformerLayer(64, 4, 256)
    stack = nn.ModuleList(copy.deepcopy(layer) for _ in range(4))
    x = torch.randn(4, 64, 64, requires_grad=True)

    def run(use_checkpoint):
        stack.zero_grad()
        with LiveMemory(scan=False) as memory:
            out = x
            for each in stack:
                out = each(out, use_checkpoint)
            out.square().sum().backward()
        return [p.grad.clone() for p in stack.parameters()], memory.peak_added

    plain, plain_peak = run(False)
    ours, peak = run(True)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert peak < 0.5 * plain_peak


def test_the_documents_layer_can_be_causal():
    layer = CheckpointedTransformerLayer(32, 4, 64, causal=True).eval().double()
    x = torch.randn(2, 10, 32).double()
    changed = x.clone()
    changed[:, 6:] = 0
    assert_same_function(layer(x)[:, :6], layer(changed)[:, :6])
    assert not torch.allclose(CheckpointedTransformerLayer(32, 4, 64).eval().double()(x)[:, :6], layer(x)[:, :6])
