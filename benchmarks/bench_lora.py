"""One LoRA layer, forward and backward, beside peft's on the same weights, and beside the base layer alone.

    python benchmarks/bench_lora.py            the same as `handtuned bench lora`

Every result is compared with one computed in fp64.
"""

from dataclasses import dataclass

import torch
from handtuned.nn import LoRALinear
from shared import close, lora_bytes, low_precision
from torch import nn

from handtuned.bench import script
from handtuned.harness import Case

NAMES = ("y", "dx", "dA", "dB")


@dataclass
class Layer:
    """A frozen linear layer, an adapter's values, a batch and the gradient of its result."""

    linear: nn.Module
    x: torch.Tensor
    dy: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    scaling: float = 2.0

    @classmethod
    def random(cls, M, N, K, rank, dtype, device):
        return cls(
            nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False),
            torch.randn(M, K, device=device, dtype=dtype).requires_grad_(),
            torch.randn(M, N, device=device, dtype=dtype),
            torch.randn(rank, K, device=device) / K**0.5,
            torch.randn(N, rank, device=device) * 0.02,
        )


def with_ours(linear, layer, dropout=0.0):
    rank = layer.A.shape[0]
    wrapped = LoRALinear(linear, rank, layer.scaling * rank, dropout)
    wrapped.lora_A.data, wrapped.lora_B.data = layer.A.clone(), layer.B.clone()
    return wrapped, wrapped.lora_A, wrapped.lora_B


def with_peft(linear, layer, dropout=0.0):
    import peft

    rank = layer.A.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=layer.scaling * rank, lora_dropout=dropout, target_modules=["q_proj"])
    model = nn.ModuleDict({"q_proj": linear})
    wrapped = peft.get_peft_model(model, config).base_model.model.q_proj
    A, B = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    A.data, B.data = layer.A.clone(), layer.B.clone()
    return wrapped.train(), A, B


def under_autocast(wrapped):
    """The same layer as trainers run it in 16 bits: peft keeps A and B in fp32 and casts x to that otherwise."""
    module, A, B = wrapped

    def autocast(x):
        with torch.autocast(x.device.type, dtype=x.dtype):
            return module(x)

    return autocast, A, B


def with_unsloth(weight, state, layer):
    """unsloth's fused function for one projection; it takes (batch, tokens, features)."""
    from unsloth.kernels.fast_lora import LoRA_W

    A, B = (t.clone().requires_grad_() for t in (layer.A, layer.B))
    return lambda x: LoRA_W.apply(x[None], weight, state, A, B, layer.scaling)[0], A, B


def step(wrapped, layer):
    """Forward and backward, as a training step runs them; gives y and the gradients of x and what is trained."""
    module, *adapter = wrapped
    inputs = layer.x, *adapter

    def run():
        for tensor in inputs:
            tensor.grad = None
        y = module(layer.x)
        y.backward(layer.dy)
        return y.detach(), *(tensor.grad for tensor in inputs)

    return run


def exact(layer, weight):
    """y, dx, dA and dB in fp64, of the base layer alone and with the adapter."""
    x, dy, W, A, B = (t.detach().double() for t in (layer.x, layer.dy, weight, layer.A, layer.B))
    S, dS, base = x @ A.t(), layer.scaling * dy @ B, (x @ W.t(), dy @ W)
    adapted = (base[0] + layer.scaling * S @ B.t(), base[1] + dS @ A, dS.t() @ x, layer.scaling * dy.t() @ S)
    return base, adapted


def check_step(layer):
    base, adapted = exact(layer, layer.linear.weight)
    return lambda name, result: close(result, base if "alone" in name else adapted, layer.x.dtype, NAMES)


def check_dropout(dropout):
    """Masks differ from one to the next, so what is compared is the size of the adapter's term: E‖s x̂AᵀBᵀ‖²."""

    def check(layer):
        base, adapted = exact(layer, layer.linear.weight)
        expected = (adapted[0] - base[0]).square().sum() / (1 - dropout)

        def same_size(name, result):
            if "alone" in name:
                return
            size = (result[0].double() - base[0]).square().sum()
            assert abs(size / expected - 1) < 0.1, f"the adapter's term is {size / expected:.2f} of its expected size"

        return same_size

    return check


def case(M, N, K, rank, dtype, device, dropout=0.0):
    low = dtype.itemsize
    providers = {
        "handtuned": lambda layer: step(with_ours(layer.linear, layer, dropout), layer),
        "peft": lambda layer: step(with_peft(layer.linear, layer, dropout), layer),
        "base layer alone": lambda layer: step([layer.linear], layer),
    }
    if low == 2:
        autocast = lambda layer: under_autocast(with_peft(layer.linear, layer, dropout))  # noqa: E731
        providers["peft autocast"] = lambda layer: step(autocast(layer), layer)
    if device.type == "cuda" and not dropout:
        providers["unsloth"] = lambda layer: step(with_unsloth(layer.linear.weight, None, layer), layer)
    return Case(
        name=f"LoRA layer, forward and backward, M {M}, {N} × {K}, r {rank}, {str(dtype)[6:]}"
        + (f", dropout {dropout}" if dropout else ""),
        inputs=lambda: Layer.random(M, N, K, rank, dtype, device),
        providers=providers,
        check=check_dropout(dropout) if dropout else check_step,
        bytes=sum(lora_bytes(M, N, K, rank, low)),
        flops=4 * M * N * K + 6 * M * rank * (N + K),
        footprint=low * (2 * M * K + 2 * M * N + N * K),
        dtype=dtype,
        size={"M": M, "N": N, "K": K, "rank": rank},
    )


def cases(device, quick):
    if device.type == "cuda":
        dtype = low_precision(device)
        for M in (4096,) if quick else (4096, 512, 8192):
            yield case(M, 4096, 4096, 16, dtype, device)
        if not quick:
            yield case(4096, 4096, 4096, 16, dtype, device, dropout=0.05)
    else:
        yield case(128 if quick else 512, 1024, 1024, 8, torch.float32, device)
        if not quick:
            yield case(512, 1536, 576, 8, torch.float32, device)  # an up projection of SmolLM2-135M
            yield case(512, 1024, 1024, 8, torch.float32, device, dropout=0.05)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
