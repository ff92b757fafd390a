"""A training step under CUDA-graph capture, walked without a GPU.

`meta` tensors stand for the device's, launches do nothing, and a recorder refuses what a capture refuses: reading a
value on the host, waiting, a copy between the host's pageable memory and the device, memory that is pinned anew.
"""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from handtuned.amp import GradScaler, scaled_matmul
from handtuned.kernels import adamw, dropout, lora_gemms, matmul, runtime, unscale
from handtuned.kernels.lora import lora_linear
from handtuned.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "is_nonzero", "equal", "item", "_pin_memory"}


class Refused(AssertionError):
    pass


class Capture(TorchDispatchMode):
    """Raises what a capture would; `log` has the names of what ran."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.log.append(name)
        if name in WAITS or (kwargs or {}).get("pin_memory"):
            raise Refused(f"{name} under capture")
        out = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != out.device.type and not getattr(source, "pinned", False):
                raise Refused(f"{name} from {source.device} to {out.device}, which is not pinned")
        return out


@pytest.fixture
def gpu(monkeypatch):
    """`gpu.capturing` says whether a graph is captured, `gpu.launched` what ran."""
    capturing, launched = [False], []
    monkeypatch.setattr(runtime.Launch, "__call__", lambda self, *tensors: launched.append(self.kernel.__name__))
    monkeypatch.setattr(runtime, "backend", lambda tensor: "cuda")
    for module in (adamw, dropout, unscale):
        monkeypatch.setattr(module, "backend", lambda tensor: "cuda")
    monkeypatch.setattr("handtuned.optim.adamw.backend", lambda tensor: "cuda")
    monkeypatch.setattr(runtime, "runs_product", lambda x: True)
    for module in (lora_gemms, matmul):
        monkeypatch.setattr(module, "runs_product", lambda x: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(runtime, "_card", lambda x: None)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 16 * id(self))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned(self.clone()))
    monkeypatch.setattr(unscale, "_spare", {})
    monkeypatch.setattr(unscale, "_captured", [])
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, pin_memory=False, **k: (
        pinned(empty_like(t, **k)) if pin_memory else empty_like(t, **k)))  # fmt: skip

    def pinned(tensor):
        if capturing[0]:
            raise Refused("pinned memory is allocated under capture")
        tensor.pinned = True
        return tensor

    unscale._uploaded.cache_clear()
    unscale._chunk_table.cache_clear()
    yield SimpleNamespace(capturing=capturing, launched=launched)
    unscale._uploaded.cache_clear()
    unscale._chunk_table.cache_clear()


def training_step(fused):
    """A function that runs one step of a LoRA layer in fp16 with loss scaling, dropout, clipping and AdamW."""
    M, N, K, r = 32, 48, 64, 8
    make = lambda *size, dtype=torch.float16: torch.randn(size, dtype=dtype, device="meta")  # noqa: E731
    x, W, b = make(M, K), make(N, K), make(N)
    A, B = (torch.nn.Parameter(make(*size, dtype=torch.float32)) for size in ((r, K), (N, r)))
    optimizer, scaler = AdamW([A, B], fused=True), GradScaler()

    def step():
        optimizer.zero_grad(set_to_none=True)
        y = lora_linear(x, W, b, A, B, 0.5, 0.05)
        c, _ = scaled_matmul(y, W, scaler._scale if scaler._scale is not None else 1.0)
        scaler.scale(c.float().square().mean()).backward()
        if fused:
            scaler.step(optimizer, max_norm=1.0)
        else:
            scaler.unscale_(optimizer)
            optimizer.step(max_norm=1.0)
        scaler.update()

    return step


@pytest.mark.parametrize("fused", [True, False], ids=["unscales-in-the-step", "unscales-before"])
def test_a_step_can_be_captured_after_a_warm_up(gpu, fused):
    step = training_step(fused)
    step()
    warm = list(gpu.launched)
    gpu.capturing[0] = True
    gpu.launched.clear()
    with Capture() as capture:
        step()
    assert gpu.launched == warm and "_to_copy" in capture.log
    assert {"_down_kernel", "_matmul_kernel", "_up_grads_kernel", "_unscale_kernel",
            "_prepare_kernel", "_adamw_kernel"} <= set(warm)  # fmt: skip


def test_what_a_graph_reads_outlives_the_cache(gpu):
    """Steps over ever other sets of gradients come after the capture."""
    grads = [torch.empty(3, device="meta")]
    unscale.unscale_(grads, None, torch.empty((), device="meta"))
    gpu.capturing[0] = True
    unscale.unscale_(grads, None, torch.empty((), device="meta"))
    gpu.capturing[0] = False
    table = weakref.ref(unscale.chunk_table((3,), unscale.BLOCK, grads[0].device))
    for n in range(200):
        unscale.chunk_table((n, 7), unscale.BLOCK, grads[0].device)
    assert table() is not None


def test_each_graph_has_pinned_memory_of_its_own(gpu):
    """What a graph copies from is read whenever it runs: it is never written again."""
    step = training_step(True)
    for graphs in (1, 2):
        gpu.capturing[0] = False
        step()
        gpu.capturing[0] = True
        with Capture():
            step()
        # addresses for unscale, the norm and AdamW, and AdamW's rates
        assert len({id(memory) for memory in unscale._captured}) == len(unscale._captured) == 4 * graphs


def test_tables_made_under_capture_are_the_graphs_alone(gpu, monkeypatch):
    """They are empty until it runs: an ordinary step in between would follow whatever addresses stood there."""
    p, tables = torch.nn.Parameter(torch.empty(3, device="meta")), []
    p.grad = torch.empty(3, device="meta")
    monkeypatch.setattr(adamw, "launch", lambda kernel, grid, table, *a, **k: tables.append(table))
    optimizer = AdamW([p], fused=True)
    for gpu.capturing[0] in (False, True, False):
        optimizer.step()
    first, captured, last = tables[::2]  # two launches a step
    assert last is first and captured is not first


def test_without_a_warm_up_the_error_says_so(gpu):
    step = training_step(True)
    gpu.capturing[0] = True
    with pytest.raises(RuntimeError, match="warm-up"):
        step()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: torch.ones(3, device="cpu").to("meta"),
        lambda x: x.nonzero(),
        lambda x: torch.ones(3, device="cpu").pin_memory(),
    ],
    ids=["item", "to-the-device", "nonzero", "pin"],
)
def test_the_recorder_refuses_what_a_capture_refuses(gpu, call):
    x = torch.ones(3, device="meta")
    gpu.capturing[0] = True
    with pytest.raises(Refused), Capture(), contextlib.suppress(RuntimeError):
        call(x)
