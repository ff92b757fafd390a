"""NF4Linear: products and gradients, dtypes, state dicts both ways with bitsandbytes, and what must not be cast."""

import copy
import io
import subprocess
import sys
import threading

import pytest
import torch
from handtuned.kernels import runtime
from handtuned.quant import NF4Linear, NF4Tensor, quantize_nf4
from helpers import assert_computes, assert_same_function
from torch import nn

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _layer(K=128, N=96, bias=True, **options):
    return NF4Linear.from_linear(nn.Linear(K, N, bias=bias), **options)


def _state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


def _same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3), (20,), (0,), ()], ids=str)
@pytest.mark.parametrize("K, N", [(128, 96), (100, 7), (1, 1), (0, 4), (4, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_forward_and_gradients_are_those_of_the_dense_layer(K, N, shape, bias, each_backend, device):
    layer = _layer(K, N, bias).to(device)
    W, x = layer.dequantize().weight, torch.randn(*shape, K, device=device).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    inputs = (x, W, layer.bias) if bias else (x, W)
    assert_computes(y.detach(), nn.functional.linear, inputs, K + 1, "y")
    assert_computes(x.grad, torch.matmul, (dy, W), N, "dx")
    assert layer.weight.grad is None
    if bias:
        rows = dy.view(-1, N) if N else dy.new_zeros(1, 0)
        assert_computes(layer.bias.grad, lambda dy: dy.sum(0), (rows,), len(rows), "db")


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW.keys())
def test_low_precision_is_within_the_error_budget(dtype):
    """More rows of W than one tile of the CPU path."""
    layer = _layer(192, 1100).to(dtype)
    weight, bias = layer.quantized.dequantize(dtype), layer.bias.detach()
    x = torch.randn(33, 192, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_computes(y.detach(), nn.functional.linear, (x, weight, bias), 192 + 1, "y")
    assert_computes(x.grad, torch.matmul, (dy, weight), 1100, "dx")


def test_gradients_of_gradients():
    layer = _layer(12, 9)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW.values()], ids=str)
def test_inference_mode_first_and_training_afterwards(dtype, each_backend, device):
    """What a call in inference mode leaves behind, training must be able to write to."""
    layer, x = _layer().to(device), torch.randn(33, 128, device=device).to(dtype)
    runtime._local.__dict__.clear()
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad.isfinite().all()


def test_no_dense_weight_is_saved_for_backward():
    saved = []
    layer = _layer(256, 256)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(8, 256, requires_grad=True))
    assert max(t.numel() * t.element_size() for t in saved) <= 256 * 256 / 2


@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_follow_bitsandbytes(dtype, compute_dtype):
    bnb = pytest.importorskip("bitsandbytes")
    layer = _layer(128, 64, compute_dtype=compute_dtype)
    theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=compute_dtype, quant_type="nf4")
    theirs.weight = _params4bit(layer.state_dict(), theirs)
    theirs.bias = copy.deepcopy(layer.bias)
    x = torch.randn(4, 128, dtype=dtype)
    ours = layer(x).detach()
    assert ours.dtype == theirs(x).dtype == dtype
    # Values are those of the decoded weight: what bitsandbytes computes in depends on the CPU.
    inputs = x, _decoded(theirs), layer.bias
    assert_computes(ours, nn.functional.linear, inputs, 128 + 1, "y", compute_dtype)


def test_autocast_is_that_of_linear():
    layer = _layer()
    dense = layer.dequantize()
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), dense(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_computes(y.detach(), nn.functional.linear, (x, dense.weight, layer.bias), 128 + 1, "y")
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64, "autocast leaves float64 alone"


def test_bytes_per_weight():
    layer = _layer(4096, 1024, bias=False)
    held = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    assert layer.quantized.nbytes / 2**22 <= 0.516
    assert held - layer.quantized.nbytes == 1024  # the 8-bit map


def _params4bit(state, module=None):
    bnb = pytest.importorskip("bitsandbytes")
    rest = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    return bnb.nn.Params4bit.from_prequantized(state["weight"], rest, device="cpu", module=module)


def _decoded(layer):
    """The weight of a Linear4bit: its product is bf16 on some CPUs, the values of its codes are the same on all."""
    dequantize = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
    return dequantize(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_loads_what_bitsandbytes_saves_and_the_other_way(double_quant, storage):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=double_quant, quant_storage=storage)
    state = theirs.to("cpu").state_dict()
    for assign in (False, True):
        ours = NF4Linear(128, 64, double_quant=not double_quant)
        ours.load_state_dict(state, assign=assign)
        assert torch.equal(ours.dequantize().weight, _decoded(theirs)) and torch.equal(ours.bias, theirs.bias)
    back = bnb.nn.Linear4bit(128, 64, quant_type="nf4")
    back.weight = _params4bit(ours.state_dict(), back)
    back.bias = ours.bias
    assert torch.equal(_decoded(back).to(torch.float32), ours.dequantize().weight)
    assert back(torch.randn(3, 128)).isfinite().all()


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_state_dict_round_trips(double_quant):
    layer = _layer(double_quant=double_quant, block_size=128)
    model = nn.Sequential(layer, nn.ReLU(), _layer(96, 5))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = nn.Sequential(NF4Linear(128, 96), nn.ReLU(), NF4Linear(96, 5))
    fresh.load_state_dict(state)
    x = torch.randn(2, 128)
    assert torch.equal(fresh(x), model(x)) and fresh[0].block_size == 128
    state["0.weight"].fill_(0)
    assert torch.equal(fresh(x), model(x)), "the loaded layer shares memory with the state dict"
    with torch.device("meta"):
        meta = nn.Sequential(NF4Linear(128, 96), nn.ReLU(), NF4Linear(96, 5))
        assert meta(torch.randn(2, 128)).shape == (2, 5)
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(meta(x), model(x))


def test_bad_state_dicts_name_the_fault():
    layer = _layer()
    before = layer.dequantize().weight
    with pytest.raises(RuntimeError, match="must be 96 × 128"):
        layer.load_state_dict(_layer(128, 64).state_dict())
    with pytest.raises(RuntimeError, match="not a complete NF4 weight"):
        layer.load_state_dict(nn.Linear(128, 96).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight"):
        layer.load_state_dict({"bias": layer.bias})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(layer.state_dict() | {"other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.SCB"):
        layer.load_state_dict(layer.state_dict() | {"weight.SCB": torch.zeros(1)})
    orphans = {key: value for key, value in layer.state_dict().items() if key.startswith("weight.")}
    assert set(layer.load_state_dict(orphans, strict=False).unexpected_keys) == set(orphans)
    with pytest.warns(UserWarning, match="for weight: copying from a non-meta parameter"):
        NF4Linear(128, 96, device="meta").load_state_dict(layer.state_dict())
    assert torch.equal(layer.dequantize().weight, before)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("meta").to_empty(device="cpu") and None,
    ],
    ids=["half", "bf16-float", "to-fp16", "to-cpu-bf16", "double", "type", "to-empty"],
)
def test_casting_the_module_spares_codes_and_scales(cast, double_quant):
    model = nn.Sequential(_layer(double_quant=double_quant))
    before = _state(model)
    x = torch.randn(2, 128)
    expected = model[0].quantized.dequantize() @ x[0]
    result = cast(model)
    if result is None:  # memory of its own again, ready to be loaded
        model.load_state_dict(before)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before if k != "0.bias")
    assert torch.equal(model[0].quantized.dequantize() @ x[0], expected)
    dtype = model[0].bias.dtype
    assert model(x.to(dtype)).dtype == dtype


def test_deepcopy_is_independent():
    layer, x = _layer(), torch.randn(2, 128)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    layer.weight.data.zero_()
    layer.nested_absmax.zero_()
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_compiles_as_one_graph(compute_dtype):
    torch._dynamo.reset()  # it never again tries a forward that it once gave up, and Sequential has one for all
    model = nn.Sequential(_layer(compute_dtype=compute_dtype), nn.GELU(), _layer(96, 32, bias=False)).double()
    x = torch.randn(4, 128, dtype=torch.float64, requires_grad=True)
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y_compiled = compiled(x)
    assert_same_function(y_compiled, y)
    assert_same_function(torch.autograd.grad(y_compiled.square().sum(), x)[0], dx)


def test_quantized_may_be_assigned():
    layer = _layer()
    other = quantize_nf4(torch.randn(96, 128), 256, double_quant=False)
    layer.quantized = other
    assert torch.equal(layer.dequantize().weight, other.dequantize())
    assert _same_state(layer.quantized.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="must be 96 × 128"):
        layer.quantized = quantize_nf4(torch.randn(128, 96))
    other.absmax = other.absmax[1:]
    with pytest.raises(ValueError, match=r"quantized of shape .* needs 48 .* as its absmax, got 47"):
        layer.quantized = other


def test_from_linear_and_back():
    linear = nn.Linear(64, 32).half().eval()
    kept = linear.weight.clone()
    layer = NF4Linear.from_linear(linear, compute_dtype=torch.float32)
    assert torch.equal(linear.weight, kept) and layer.bias is linear.bias and not layer.training
    dense = layer.dequantize()
    assert type(dense) is nn.Linear and dense.weight.dtype == torch.float16 and not dense.weight.requires_grad
    assert torch.equal(dense.weight, quantize_nf4(kept).dequantize())
    assert dense.bias is not layer.bias and torch.equal(dense.bias, layer.bias)
    assert layer.dequantize(torch.float32).weight.dtype == torch.float32
    assert torch.all(NF4Linear(64, 32).dequantize().weight == 0)
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got ReLU"):
        NF4Linear.from_linear(nn.ReLU())
    linear.weight.data[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"linear\.weight must be finite, got 0 NaN and 1 infinite"):
        NF4Linear.from_linear(linear)
    with pytest.raises(TypeError, match=r"linear\.weight must be float32, float16 or bfloat16, got torch\.float64"):
        NF4Linear.from_linear(nn.Linear(4, 4).double())
    for wrong in (torch.randn(2, 63), torch.tensor(1.0), torch.ones(2, 64).int()):
        with pytest.raises(ValueError, match=r"x must be floating point \(…, 64\)"):
            layer(wrong)
    with pytest.raises(ValueError, match="block_size"):
        NF4Linear(64, 32, block_size=100)


def test_torchs_default_dtype_changes_nothing():
    layer, x = _layer(), torch.randn(3, 128)
    low, state = layer(x.bfloat16()), layer.state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        fresh = NF4Linear(128, 96)
        assert {key: value.dtype for key, value in fresh.state_dict().items()} == {k: v.dtype for k, v in state.items()}
        assert torch.equal(layer(x.bfloat16()), low)
    finally:
        torch.set_default_dtype(torch.float32)


def test_results_do_not_live_in_the_scratch():
    a, b = _layer(256, 256), _layer(256, 256)
    x = torch.eye(256)
    first = a(x)
    kept = first.clone()
    b(x)
    b(torch.randn(2, 256).half())
    assert torch.equal(first, kept)


def test_threads_do_not_disturb_each_other():
    layers = [_layer(256, 256) for _ in range(4)]
    x = torch.randn(16, 256)
    expected = [layer(x) for layer in layers]
    wrong = []

    def work(layer, y):
        wrong.extend(i for i in range(30) if not torch.equal(layer(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PEAK = """
import re, torch
from handtuned.quant import NF4Linear, quantize_nf4
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
layers = torch.nn.Sequential(*(NF4Linear(2048, 2048, bias=False) for _ in range(12)))
x = torch.randn(4, 2048, requires_grad=True)
layers[0](x).sum().backward()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
layers(x).sum().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_twelve_layers_need_no_more_than_one_dense_weight():
    """The scratch of 16 MB is there already; twelve dense weights would be 201 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16


def test_state_of_a_layer_reads_as_a_tensor():
    layer = _layer()
    q = NF4Tensor.from_state_dict(nn.ModuleDict({"a": layer}).state_dict(), "a.")
    assert torch.equal(q.dequantize(), layer.quantized.dequantize())
