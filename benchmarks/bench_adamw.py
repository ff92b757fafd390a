"""AdamW over all tensors of an adapter or a model, beside torch's and bitsandbytes'.

    python benchmarks/bench_adamw.py           the same as `handtuned bench adamw`

Two kinds of work: the step alone, and what mixed precision does around it (unscale, look for overflow, clip, step).
The least to move is 28 bytes per parameter (read p, g, m, v; write p, m, v).
"""

import torch
from handtuned.amp import GradScaler
from handtuned.optim import AdamW, AdamW8bit

from handtuned.bench import script
from handtuned.harness import Case

LAYERS = 30  # of SmolLM2-135M
ADAPTER = [shape for _ in range(2 * LAYERS) for shape in ((8, 576), (576, 8), (8, 576), (192, 8))]
MODEL = [(1536, 576)] * 3 * LAYERS + [(576, 576)] * 2 * LAYERS + [(576,)] * (2 * LAYERS + 1) + [(49152, 576)]
RATE = 1e-3


def parameters(pairs):
    copies = []
    for value, gradient in pairs:
        copies.append(value.clone().requires_grad_())
        copies[-1].grad = gradient.clone()
    return copies


def alone(params, optimizer):
    return optimizer.step


def by_torch(params, optimizer):
    """Unscale, clip and step by torch's own tools."""
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=params[0].device))

    def step():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def by_ours(params, optimizer):
    """The same: the step unscales, clips and skips by itself."""
    scaler = GradScaler(init_scale=1.0, growth_interval=2**30)
    scaler.scale(torch.ones((), device=params[0].device))

    def step():
        scaler.step(optimizer, max_norm=1.0)
        scaler.update()

    return step


def provider(make, way=alone):
    """One step of an optimizer, in one of these ways; gives the parameters."""

    def prepare(pairs):
        params = parameters(pairs)
        step = way(params, make(params))

        def run():
            step()
            return params

        return run

    return prepare


def eight_bit(params):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=RATE)


def check(clip):
    """The first step, by torch's plainest loop. An 8-bit state is not rounded before the first step uses it."""

    def reference(pairs):
        params = parameters(pairs)
        if clip:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        torch.optim.AdamW(params, lr=RATE, foreach=False, fused=False).step()

        def close(name, result):
            for got, want in zip(result, params, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=RATE * (0.02 if "8-bit" in name else 0.005))

        return close

    return reference


def case(title, shapes, device, whole):
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    ours, theirs = (by_ours, by_torch) if whole else (alone, alone)
    providers = {
        "handtuned": provider(lambda p: AdamW(p, lr=RATE), ours),
        "torch foreach": provider(lambda p: torch.optim.AdamW(p, lr=RATE, foreach=True), theirs),
        "torch fused": provider(lambda p: torch.optim.AdamW(p, lr=RATE, fused=True), theirs),
    }
    if not whole:
        providers["handtuned 8-bit"] = provider(lambda p: AdamW8bit(p, lr=RATE))
        if device.type == "cuda":
            providers["bitsandbytes 8-bit"] = provider(eight_bit)
    return Case(
        name=f"{'unscale, clip and AdamW' if whole else 'AdamW'}, {title}: {len(shapes)} tensors, "
        f"{elements / 1e6:.1f} M parameters",
        inputs=lambda: [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for shape in shapes],
        providers=providers,
        check=check(whole),
        bytes=28 * elements,
        footprint=16 * elements,
        size={"parameters": elements},
        kernel="" if whole else "adamw[fp32]",
    )


def cases(device, quick):
    yield case("adapter", ADAPTER, device, False)
    yield case("adapter", ADAPTER, device, True)
    if device.type == "cuda" and not quick:
        yield case("SmolLM2-135M", MODEL, device, False)
        yield case("SmolLM2-135M", MODEL, device, True)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
