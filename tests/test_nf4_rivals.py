"""NF4 beside bitsandbytes: the same codes, scales, values, state dicts and layers, bit for bit."""

import copy
import io

import pytest
import torch
from handtuned.quant import (
    NF4_CODE,
    NF4Linear,
    NF4Tensor,
    dequantize_affine,
    dequantize_nf4,
    normal_quantile_levels,
    quantize_affine,
    quantize_nf4,
)

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

KINDS = {
    "normal": lambda *s: torch.randn(*s),
    "heavy": lambda *s: torch.randn(*s) / torch.rand(*s).clamp_min(1e-3),
    "constant": lambda *s: torch.full(s, 0.37),
    "tiny": lambda *s: torch.randn(*s) * 1e-38,
    "huge": lambda *s: torch.randn(*s) * 1e37,
}


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_values_are_bitsandbytes(kind, block):
    x = KINDS[kind](33, 257)
    ours = quantize_nf4(x, block, double_quant=False)
    packed, state = F.quantize_4bit(x, blocksize=block, quant_type="nf4")
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dequantize(), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (65,), (1000,), (3, 5, 7), (64, 64)], ids=str)
def test_any_shape_and_dtype(shape, dtype):
    x = torch.randn(shape).to(dtype)
    ours = quantize_nf4(x, 64, double_quant=False)
    packed, state = F.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    back = dequantize_nf4(ours)
    assert back.dtype == dtype and back.shape == x.shape
    assert torch.equal(back, F.dequantize_4bit(packed, state).view(shape))


def test_empty_zero_and_non_contiguous():
    assert quantize_nf4(torch.empty(0, 8)).dequantize().shape == (0, 8)
    zeros = quantize_nf4(torch.zeros(3, 64))
    assert zeros.dequantize().abs().sum() == 0 and (zeros.packed == 0x77).all()
    x = torch.randn(64, 96)
    assert torch.equal(quantize_nf4(x.t()).dequantize(), quantize_nf4(x.t().contiguous()).dequantize())


@pytest.mark.parametrize("bad, word", [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_values_that_are_not_finite_are_refused_and_counted(bad, word):
    x = torch.randn(128)
    x[[3, 70]] = bad
    with pytest.raises(ValueError, match=rf"2 {word}"):
        quantize_nf4(x)


def test_double_quantization_decodes_as_bitsandbytes_does():
    x = torch.randn(700, 256)
    packed, state = F.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    layer = bnb.nn.Linear4bit(256, 700, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(x.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    q = NF4Tensor.from_state_dict(layer.state_dict(), "")
    assert torch.equal(q.dequantize(), F.dequantize_4bit(layer.weight, layer.weight.quant_state))
    ours = quantize_nf4(x)
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    same = (ours.absmax == state.absmax).float().mean()
    assert same > 0.99, "bitsandbytes' CPU rule differs from its CUDA rule on about 0.15 % of the scale codes"
    assert ours.nbytes / x.numel() <= 0.516


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_state_dicts_go_both_ways(bias, double_quant):
    linear = torch.nn.Linear(256, 512, bias=bias)
    ours = NF4Linear.from_linear(linear, double_quant=double_quant)
    x = torch.randn(5, 256)

    theirs = bnb.nn.Linear4bit(256, 512, bias=bias, quant_type="nf4", compute_dtype=torch.float32)
    state = ours.state_dict()
    rest = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], rest, device="cpu")
    if bias:
        theirs.bias.data = state["bias"].clone()
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)

    again = NF4Linear.from_linear(torch.nn.Linear(256, 512, bias=bias), double_quant=double_quant)
    again.load_state_dict(theirs.state_dict())
    assert torch.equal(again(x), ours(x))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), ours(x))


def test_layer_gives_a_gradient_to_x_and_none_to_the_weight():
    linear = torch.nn.Linear(96, 80)
    layer = NF4Linear.from_linear(linear)
    dense = layer.dequantize()
    x = torch.randn(2, 7, 96, requires_grad=True)
    layer(x).square().sum().backward()
    want = torch.autograd.grad(dense(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-5)
    assert not layer.weight.requires_grad and layer.weight.grad is None


def test_moving_casting_copying_and_saving_keep_the_bits():
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 64))
    x = torch.randn(3, 128)
    want = layer(x)
    packed = layer.weight.clone()
    assert torch.equal(copy.deepcopy(layer)(x), want)
    half = copy.deepcopy(layer).half()
    assert torch.equal(half.weight, packed) and half.bias.dtype == torch.float16
    assert torch.equal(half.float().dequantize(torch.float32).weight, layer.dequantize(torch.float32).weight)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = NF4Linear.from_linear(torch.nn.Linear(128, 64))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), want)


def test_compiles_as_one_graph():
    layer = NF4Linear.from_linear(torch.nn.Linear(64, 64))
    x = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shape", [(1,), (65,), (40, 33)], ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_kernels_are_bit_equal_with_the_reference(shape, double_quant, monkeypatch, device):
    x = torch.randn(shape, device=device)
    reference = quantize_nf4(x, 64, double_quant)
    value = reference.dequantize()
    monkeypatch.delenv("HANDTUNED_BACKEND")
    kernel = quantize_nf4(x, 64, double_quant)
    assert torch.equal(kernel.packed, reference.packed)
    assert torch.equal(kernel.absmax, reference.absmax)
    assert torch.equal(kernel.dequantize(), value)


def test_levels_are_the_quantiles_of_the_normal_distribution():
    assert torch.equal(torch.as_tensor(normal_quantile_levels(), dtype=torch.float32), NF4_CODE)


def test_affine_scheme_is_right_where_the_study_documents_are_not():
    """W = [0.123, −0.456, 0.789, −0.234] at 4 bits: scale 0.083, codes [7, 0, 15, 3], not [7, 2, 15, 4]."""
    q = quantize_affine(torch.tensor([0.123, -0.456, 0.789, -0.234]), bits=4, group_size=4)
    assert q.scale.item() == pytest.approx((0.789 + 0.456) / 15)
    back = dequantize_affine(q)
    codes = ((back + 0.456) / q.scale.item()).round().int().tolist()
    assert codes == [7, 0, 15, 3]


def test_errors_of_the_schemes_on_gaussian_and_uniform_weights():
    """Relative errors: Gaussian NF4 0.092, affine 0.090; uniform NF4 0.091, affine 0.064."""

    def error(back, x):
        return ((back - x).norm() / x.norm()).item()

    for x, nf4, affine in ((torch.randn(1 << 20), 0.092, 0.090), (torch.rand(1 << 20) * 2 - 1, 0.091, 0.064)):
        assert error(quantize_nf4(x, 64).dequantize(), x) == pytest.approx(nf4, abs=1.5e-3)
        assert error(dequantize_affine(quantize_affine(x, 4, 64)), x) == pytest.approx(affine, abs=1.5e-3)
