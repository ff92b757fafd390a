"""The hand-written autocast: the output dtypes of torch's, for every operation on its lists."""

import threading

import pytest
import torch
import torch.nn.functional as F
from handtuned.amp import autocast
from handtuned.amp.autocast import HIGH, LOW, WIDEST
from torch._subclasses.fake_tensor import FakeTensorMode

# name → call on a (4, 4) matrix `x` and a second one `y`
OPS = {
    "matmul": lambda x, y: torch.matmul(x, y),
    "__matmul__": lambda x, y: x @ y,
    "mm": lambda x, y: torch.mm(x, y),
    "bmm": lambda x, y: torch.bmm(x[None], y[None]),
    "mv": lambda x, y: torch.mv(x, y[0]),
    "linear": lambda x, y: F.linear(x, y, y[0]),
    "addmm": lambda x, y: torch.addmm(x, y, y),
    "addmv": lambda x, y: torch.addmv(x[0], x, y[0]),
    "addbmm": lambda x, y: torch.addbmm(x, x[None], y[None]),
    "baddbmm": lambda x, y: torch.baddbmm(x[None], x[None], y[None]),
    "addr": lambda x, y: torch.addr(x, x[0], y[0]),
    "einsum": lambda x, y: torch.einsum("ij,jk->ik", x, y),
    "chain_matmul": lambda x, y: torch.chain_matmul(x, y, x),
    "linalg_matmul": lambda x, y: torch.linalg.matmul(x, y),
    "linalg_multi_dot": lambda x, y: torch.linalg.multi_dot([x, y, x]),
    "conv1d": lambda x, y: F.conv1d(x[None], y[:, :, None]),
    "conv2d": lambda x, y: F.conv2d(x[None, :, :, None], y[:, :, None, None]),
    "conv3d": lambda x, y: F.conv3d(x[None, :, :, None, None], y[:, :, None, None, None]),
    "conv_transpose1d": lambda x, y: F.conv_transpose1d(x[None], y[:, :, None]),
    "conv_transpose2d": lambda x, y: F.conv_transpose2d(x[None, :, :, None], y[:, :, None, None]),
    "conv_transpose3d": lambda x, y: F.conv_transpose3d(x[None, :, :, None, None], y[:, :, None, None, None]),
    "prelu": lambda x, y: F.prelu(x, y[0]),
    "scaled_dot_product_attention": lambda x, y: F.scaled_dot_product_attention(x[None], y[None], x[None]),
    "exp": lambda x, y: x.exp(),
    "expm1": lambda x, y: torch.expm1(x),
    "log": lambda x, y: torch.log(x),
    "log2": lambda x, y: x.log2(),
    "log10": lambda x, y: x.log10(),
    "log1p": lambda x, y: x.log1p(),
    "pow": lambda x, y: torch.pow(x, 2),
    "__pow__": lambda x, y: x**2,
    "__rpow__": lambda x, y: 2**x,
    "reciprocal": lambda x, y: x.reciprocal(),
    "__rdiv__": lambda x, y: 1 / x,
    "rsqrt": lambda x, y: x.rsqrt(),
    "acos": lambda x, y: x.acos(),
    "asin": lambda x, y: x.asin(),
    "cosh": lambda x, y: x.cosh(),
    "sinh": lambda x, y: x.sinh(),
    "tan": lambda x, y: x.tan(),
    "erfinv": lambda x, y: x.erfinv(),
    "softplus": lambda x, y: F.softplus(x),
    "sum": lambda x, y: x.sum(0),
    "prod": lambda x, y: x.prod(),
    "cumsum": lambda x, y: x.cumsum(0),
    "cumprod": lambda x, y: x.cumprod(0),
    "norm": lambda x, y: x.norm(),
    "linalg_norm": lambda x, y: torch.linalg.norm(x),
    "linalg_vector_norm": lambda x, y: torch.linalg.vector_norm(x),
    "linalg_matrix_norm": lambda x, y: torch.linalg.matrix_norm(x),
    "dist": lambda x, y: torch.dist(x, y),
    "cdist": lambda x, y: torch.cdist(x, y),
    "pdist": lambda x, y: F.pdist(x),
    "renorm": lambda x, y: torch.renorm(x, 2, 0, 1),
    "logsumexp": lambda x, y: x.logsumexp(0),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y),
    "normalize": lambda x, y: F.normalize(x),
    "softmax": lambda x, y: F.softmax(x, -1),
    "softmin": lambda x, y: F.softmin(x, -1),
    "log_softmax": lambda x, y: x.log_softmax(-1),
    "layer_norm": lambda x, y: F.layer_norm(x, (4,), y[0], y[1]),
    "group_norm": lambda x, y: F.group_norm(x, 2, y[0], y[1]),
    "rms_norm": lambda x, y: F.rms_norm(x, (4,), y[0]),
    "cross_entropy": lambda x, y: F.cross_entropy(x, labels(x)),
    "nll_loss": lambda x, y: F.nll_loss(x, labels(x)),
    "binary_cross_entropy_with_logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y),
    "kl_div": lambda x, y: F.kl_div(x, y, reduction="sum"),
    "mse_loss": lambda x, y: F.mse_loss(x, y),
    "l1_loss": lambda x, y: F.l1_loss(x, y),
    "smooth_l1_loss": lambda x, y: F.smooth_l1_loss(x, y),
    "huber_loss": lambda x, y: F.huber_loss(x, y),
    "poisson_nll_loss": lambda x, y: F.poisson_nll_loss(x, y),
    "hinge_embedding_loss": lambda x, y: F.hinge_embedding_loss(x, y),
    "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, labels(x)),
    "margin_ranking_loss": lambda x, y: F.margin_ranking_loss(x, y, y),
    "soft_margin_loss": lambda x, y: F.soft_margin_loss(x, y),
    "multi_margin_loss": lambda x, y: F.multi_margin_loss(x, labels(x)),
    "triplet_margin_loss": lambda x, y: F.triplet_margin_loss(x, y, x),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, x),
    "addcmul": lambda x, y: torch.addcmul(x, y, x),
    "atan2": lambda x, y: torch.atan2(x, y),
    "bilinear": lambda x, y: F.bilinear(x, y, torch.stack([y, y])),
    "cat": lambda x, y: torch.cat([x, y]),
    "cross": lambda x, y: torch.cross(x[:, :3], y[:, :3], dim=1),
    "dot": lambda x, y: torch.dot(x[0], y[0]),
    "stack": lambda x, y: torch.stack([x, y]),
    "tensordot": lambda x, y: torch.tensordot(x, y, 1),
    "vdot": lambda x, y: torch.vdot(x[0], y[0]),
    "scatter_add": lambda x, y: x.scatter_add(0, labels(x)[None], y),
    # on no list
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "relu": lambda x, y: F.relu(x),
    "gelu": lambda x, y: F.gelu(x),
    "silu": lambda x, y: F.silu(x),
    "tanh": lambda x, y: x.tanh(),
    "sqrt": lambda x, y: x.sqrt(),
    "mean": lambda x, y: x.mean(),
    "max": lambda x, y: x.amax(0),
    "reshape": lambda x, y: x.reshape(2, 8),
    "dropout": lambda x, y: F.dropout(x, 0.5),
    "embedding": lambda x, y: F.embedding(labels(x), x),
    "exp_": lambda x, y: x.clone().exp_(),
    "sum with a dtype": lambda x, y: x.sum(dtype=torch.float64),
}
# What torch's autocast on a CPU casts in the same way; its HIGH list is shorter than the one for CUDA.
CPU_TOO = [
    "matmul", "__matmul__", "mm", "bmm", "linear", "addmm", "addbmm", "baddbmm", "einsum", "linalg_multi_dot",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "scaled_dot_product_attention", "cosine_embedding_loss", "mse_loss", "smooth_l1_loss", "huber_loss",
    "poisson_nll_loss", "margin_ranking_loss", "cat", "stack", "add", "mul", "relu", "gelu", "silu", "tanh", "sqrt",
    "mean", "max", "reshape", "dropout", "embedding", "exp_",
]  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def labels(x):
    return torch.ones(4, dtype=torch.int64, device=x.device)


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
        "__rmatmul__", "multi_head_attention_forward",  # in tests of their own
        "__rtruediv__",  # torch's other name of __rdiv__
        "binary_cross_entropy",  # an error in torch on CUDA
        "gaussian_nll_loss", "multilabel_margin_loss", "index_put",  # composed, or with inputs of special shape
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


def test_reflected_product():
    x, y = matrices(torch.float32, torch.float32)
    with autocast():
        assert torch.Tensor.__rmatmul__(x, y).dtype == torch.float16


def test_overflow_that_high_avoids():
    """fp16 exp(11.1) is infinite (65504 = exp(11.09)); a naive fp16 variance at σ = 300 is too."""
    x = torch.full((4,), 11.1, dtype=torch.float16)
    assert x.exp().isinf().all()
    with autocast():
        assert torch.isfinite(x.exp()).all()


def test_only_16_bit_dtypes():
    with pytest.raises(ValueError, match="float32"):
        autocast(torch.float32)
