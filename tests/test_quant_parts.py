"""NF4Linear notes where it found its parts whole: it follows whatever happens to them, and keeps none alive."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from handtuned.kernels import runtime
from handtuned.quant import NF4Linear, quantize_nf4
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx


@pytest.fixture(params=["torch", "kernel", "C"])
def way(request, monkeypatch):
    """How the products run: "C" as in a process of a user who has no GPU."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_backend")
    elif request.param == "C":
        monkeypatch.delenv("HANDTUNED_BACKEND")
        monkeypatch.setattr(runtime, "INTERPRETED", False)


def nf4_layer(bias=True):
    return NF4Linear.from_linear(nn.Linear(128, 96, bias=bias))


def _moved(layer):
    buffers = layer._buffers
    buffers["absmax"], layer.weight.data = buffers["absmax"].clone(), layer.weight.data.clone()


def _other_codes(layer):
    layer.weight.data = layer.weight.data.flip(0)


def _other_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.flip(0), requires_grad=False)


def _other_scales(layer):
    layer.nested_absmax = layer.nested_absmax * 2


def _other_scales_in_the_same_tensor(layer):
    layer.absmax.data = layer.absmax.flip(0)


def _without_double_quantization(layer):
    layer.quantized = quantize_nf4(torch.randn(96, 128), double_quant=False)


def _what_was_given_out(layer):
    layer.quantized.absmax = torch.zeros_like(layer.absmax)
    layer.quantized.packed.zero_()  # this one is the layer's memory


def _shared(layer):
    layer.share_memory()
    layer.weight.zero_()


CHANGES = [_moved, _other_codes, _other_parameter, _other_scales, _other_scales_in_the_same_tensor,
           _without_double_quantization, _what_was_given_out, _shared]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_layer_follows_its_parts(change, way, device):
    layer, x = nf4_layer(bias=False).to(device), torch.randn(3, 128, device=device)
    for turn in (None, change):
        if turn:
            turn(layer)
        twin = NF4Linear(128, 96, bias=False, double_quant=layer.nested_absmax is not None, device=device)
        twin.load_state_dict(layer.state_dict())
        with torch.no_grad():
            first, second = layer(x), layer(x)
        assert torch.equal(first, twin(x)) and torch.equal(second, first)


def test_saved_and_read_whole():
    layer, x, file = nf4_layer(), torch.randn(2, 128), io.BytesIO()
    expected = layer(x)
    torch.save(layer, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert file.getbuffer().nbytes < 1.5 * 96 * 128 and torch.equal(twin(x), expected)
    twin.weight.data.zero_()
    assert not torch.equal(twin(x), expected) and torch.equal(layer(x), expected)


def test_a_forward_pass_leaves_nothing_behind(way):
    layer = nf4_layer()
    sizes = len(pickle.dumps(layer)), len(pickle.dumps(copy.deepcopy(layer)))
    before = weakref.ref(layer.weight.untyped_storage())
    layer(torch.randn(2, 128))
    after = len(pickle.dumps(layer)), len(pickle.dumps(copy.deepcopy(layer)))
    assert all(now < then + 1000 for now, then in zip(after, sizes, strict=True))
    address = layer.weight.data_ptr()
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False))
    assert layer.weight.data_ptr() != address
    owner = weakref.ref(layer.absmax)
    layer.to("meta")
    gc.collect()
    assert owner() is None and before() is None


def test_fake_tensors_leave_nothing_behind(way):
    layer, x = nf4_layer(), torch.randn(3, 128)
    with torch.no_grad():
        make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        first, twin = layer(x), NF4Linear(128, 96)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(first, twin(x))


@pytest.mark.parametrize("length", [1, 5, 97])
def test_a_bias_of_another_length_is_refused_and_not_read(way, length):
    layer = nf4_layer()
    layer.bias = nn.Parameter(torch.randn(length))
    with pytest.raises(ValueError, match=r"bias must be \(96,\)"):
        layer(torch.randn(2, 128))
