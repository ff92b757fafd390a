"""The hand-written autocast: the output dtypes of torch's, for every operation on its lists."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from autocast_ops import CPU_TOO, OPS, labels
from handtuned.amp import autocast
from handtuned.amp.autocast import HIGH, LOW, WIDEST, autocast_reference
from helpers import TORCH
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def matrices(first, second, device="cpu"):
    return torch.ones(4, 4, dtype=first, device=device), torch.ones(4, 4, dtype=second, device=device)


def result_dtype(op, context, device, first, second):
    """The dtype of a result, or the class of the error."""
    x, y = matrices(first, second, device)
    try:
        with context:
            return OPS[op](x, y).dtype
    except RuntimeError as error:
        return type(error)


class cuda_autocast:
    """torch's CUDA autocast without a GPU: `torch.autocast("cuda")` would switch itself off."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_autocast_dtype("cuda", self.dtype)
        torch.set_autocast_enabled("cuda", True)

    def __exit__(self, *error):
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS)
@DTYPES
def test_dtypes_are_those_of_torchs_autocast_on_cuda(op, dtype):
    """Asked of torch with tensors that have a CUDA device and no memory; inputs 16-bit, 32-bit and mixed."""
    if op == "rms_norm" and TORCH < (2, 13):
        pytest.skip("not on the list of torch 2.11, ours is that of 2.13")
    for first, second in [(torch.float32, torch.float32), (dtype, dtype), (dtype, torch.float32)]:
        with FakeTensorMode():
            theirs = result_dtype(op, cuda_autocast(dtype), "cuda", first, second)
        if theirs is RuntimeError:  # mixed inputs that the bare operation cannot take either
            continue
        assert result_dtype(op, autocast(dtype), "cpu", first, second) == theirs, (op, first, second)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", CPU_TOO)
@DTYPES
def test_dtypes_are_those_of_torchs_autocast_on_a_cpu(op, dtype):
    for first, second in [(torch.float32, torch.float32), (dtype, dtype)]:
        theirs = result_dtype(op, torch.autocast("cpu", dtype), "cpu", first, second)
        assert result_dtype(op, autocast(dtype), "cpu", first, second) == theirs, (op, first)


def test_every_listed_operation_is_tested():
    untested = {
        "__rmatmul__", "multi_head_attention_forward", "lora_linear",  # in tests of their own
        "__rtruediv__",  # torch's other name of __rdiv__
        "binary_cross_entropy",  # an error in torch on CUDA
        "gaussian_nll_loss", "multilabel_margin_loss", "index_put",  # composed, or with inputs of special shape
        "lstm", "gru", "rnn_tanh", "rnn_relu",  # without a GPU torch does not take them apart as cuDNN does; below
        "interpolate", "grid_sample",  # torch cannot tell their dtypes without a GPU; by its lists, below
    }  # fmt: skip
    assert (LOW | HIGH | WIDEST) - OPS.keys() == untested


@DTYPES
def test_same_results_as_torch(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    x, y = torch.randn(5, 8), torch.randint(4, (5,))
    results = []
    for context in (autocast(dtype), torch.autocast("cpu", dtype)):
        model.zero_grad()
        with context:
            out = model(x)
            loss = F.cross_entropy(out, y)
        loss.backward()
        results.append((out, loss.detach(), [p.grad for p in model.parameters()]))
    (ours, our_loss, our_grads), (theirs, their_loss, their_grads) = results
    assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)
    assert our_loss.dtype == torch.float32
    # torch on a CPU takes the log-softmax of the 16-bit logits in 16 bits; ours is a float32 one, as on CUDA.
    torch.testing.assert_close(our_loss, their_loss.float(), rtol=torch.finfo(dtype).eps * 4, atol=0)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps * b.abs().max().item())


@pytest.mark.parametrize("function", [torch.matmul, torch.dist, torch.atan2, torch.add], ids=lambda f: f.__name__)
@DTYPES
def test_equals_the_reference(function, dtype):
    for first, second in [(torch.float32, torch.float32), (dtype, torch.float32), (dtype, dtype)]:
        x, y = (torch.randn(4, 4).to(each) for each in (first, second))
        with autocast(dtype):
            ours = function(x, y)
        reference = autocast_reference(function, x, y, dtype=dtype)
        assert ours.dtype == reference.dtype and torch.equal(ours, reference)


def test_float64_and_integers_are_left_alone():
    x, y = matrices(torch.float64, torch.float64)
    with autocast():
        assert (x @ y).dtype == torch.float64
        assert (labels(x)[None] @ labels(x)[:, None]).dtype == torch.int64


def test_blocks_nest_and_the_innermost_decides():
    x, y = matrices(torch.float32, torch.float32)
    with autocast(torch.float16):
        assert (x @ y).dtype == torch.float16
        with autocast(enabled=False):
            assert (x @ y).dtype == torch.float32
            with autocast(torch.bfloat16):
                assert (x @ y).dtype == torch.bfloat16
            assert (x @ y).dtype == torch.float32
        with autocast(torch.bfloat16):
            assert (x @ y).dtype == torch.bfloat16
        assert (x @ y).dtype == torch.float16
    assert (x @ y).dtype == torch.float32


def test_one_object_twice_and_as_a_decorator():
    x, y = matrices(torch.float32, torch.float32)
    low = autocast(torch.bfloat16)
    with low, low:
        assert (x @ y).dtype == torch.bfloat16
    assert low(lambda: x @ y)().dtype == torch.bfloat16
    assert (x @ y).dtype == torch.float32


def test_an_error_leaves_the_block():
    x, y = matrices(torch.float32, torch.float32)
    with pytest.raises(RuntimeError), autocast():
        x @ y[:3]
    assert (x @ y).dtype == torch.float32


def test_other_threads_are_not_affected():
    x, y = matrices(torch.float32, torch.float32)
    seen = []
    with autocast():
        thread = threading.Thread(target=lambda: seen.append((x @ y).dtype))
        thread.start()
        thread.join()
    assert seen == [torch.float32]


def casts_of(weight, block):
    """How often a weight was cast, counted on the tensor subclass of its results."""
    count = 0
    original = torch.Tensor.to

    def counting(self, *args, **kwargs):
        nonlocal count
        count += self is weight
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", counting)
        block()
    return count


def test_a_weight_is_cast_once_a_step():
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4)

    def step():
        with autocast():
            y = F.linear(F.linear(x, weight), weight)
            with autocast():
                y = F.linear(y, weight)
        y.sum().backward()

    assert casts_of(weight, step) == 1
    assert casts_of(weight, lambda: (step(), step())) == 2
    assert weight.grad.dtype == torch.float32


def test_a_weight_seen_without_gradients_first_still_gets_one():
    """torch's cache keeps the cast made under no_grad, and the weight then gets no gradient."""
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(2, 4)
    with autocast():
        with torch.no_grad():
            F.linear(x, weight)
        F.linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_a_weight_changed_in_the_block_is_cast_anew():
    weight, x = torch.ones(4, 4, requires_grad=True), torch.ones(1, 4)
    with autocast():
        assert F.linear(x, weight)[0, 0].item() == 4
        with torch.no_grad():
            weight.mul_(2)
        assert F.linear(x, weight)[0, 0].item() == 8


def test_attention_module():
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with autocast(torch.bfloat16):
        assert attention(x, x, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN, torch.nn.LSTMCell, torch.nn.GRUCell,
                                   torch.nn.RNNCell])  # fmt: skip
@DTYPES
def test_recurrent_layers(layer, dtype):
    torch.manual_seed(0)
    first, second, x = torch.nn.Linear(4, 4), layer(4, 4), torch.randn(2, 4)
    with autocast(dtype):
        h = first(x) if "Cell" in layer.__name__ else x  # torch's LSTM & Co. ask for their weights' dtype themselves
        y = second(h)
        y = y[0] if isinstance(y, tuple) else y
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in second.parameters())


@pytest.mark.parametrize("packed", [False, True], ids=["tensor", "packed"])
@pytest.mark.parametrize("layer", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers_with_16_bit_input(layer, packed):
    torch.manual_seed(0)
    second, x = layer(4, 4), torch.randn(3, 2, 4).bfloat16().requires_grad_()
    given = torch.nn.utils.rnn.pack_padded_sequence(x, [3, 2]) if packed else x
    with autocast(torch.bfloat16):
        y = second(given)[0]
        with autocast(enabled=False), pytest.raises((ValueError, RuntimeError), match="dtype"):
            second(given)
    with pytest.raises((ValueError, RuntimeError), match="dtype"):
        second(given)
    expected = copy.deepcopy(second).bfloat16()(given)[0]
    y, expected = (y.data, expected.data) if packed else (y, expected)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in second.parameters())


def test_reflected_product():
    x, y = matrices(torch.float32, torch.float32)
    with autocast():
        assert torch.Tensor.__rmatmul__(x, y).dtype == torch.float16


@DTYPES
def test_resampling(dtype):
    """torch's lists have every upsample_… among the float32 ones, and grid_sampler among those of the widest dtype."""
    x, y = matrices(dtype, torch.float32)
    with autocast(dtype):
        assert F.interpolate(x[None, None], scale_factor=2, mode="bilinear").dtype == torch.float32
        for grid in (x, y):
            sampled = F.grid_sample(x[None, None], torch.stack([grid, grid], -1)[None], align_corners=False)
            assert sampled.dtype == grid.dtype


def test_overflow_that_high_avoids():
    """fp16 exp(11.1) is infinite (65504 = exp(11.09)); a naive fp16 variance at σ = 300 is too."""
    x = torch.full((4,), 11.1, dtype=torch.float16)
    assert x.exp().isinf().all()
    with autocast():
        assert torch.isfinite(x.exp()).all()


def test_only_16_bit_dtypes():
    with pytest.raises(ValueError, match="float32"):
        autocast(torch.float32)
