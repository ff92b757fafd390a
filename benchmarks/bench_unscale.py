"""Unscaling all gradients of a model and looking for overflow, beside the operation behind torch's GradScaler.

    python benchmarks/bench_unscale.py         the same as `handtuned bench unscale`

The factor is −1, so that gradients keep their size however often they are unscaled.
"""

import torch
from bench_adamw import ADAPTER
from handtuned.kernels.unscale import unscale_
from shared import short

from handtuned.bench import script
from handtuned.harness import Case


def provider(unscale):
    def make(gradients):
        own = [gradient.clone() for gradient in gradients]
        factor = torch.full((), -1.0, device=own[0].device)
        found = torch.zeros((), device=own[0].device)

        def run():
            unscale(own, factor, found)
            return own, found

        return run

    return make


def by_torch(gradients, factor, found):
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, factor)


def check(gradients):
    def same(name, result):
        own, found = result
        assert not found, "an overflow was reported"
        assert all(torch.equal(a, -b) for a, b in zip(own, gradients, strict=True)), "wrong values"

    return same


def case(title, shapes, dtype, device):
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return Case(
        name=f"unscale, {title}: {len(shapes)} tensors, {elements / 1e6:.1f} M gradients, {str(dtype)[6:]}",
        inputs=lambda: [torch.randn(shape, device=device).to(dtype) for shape in shapes],
        providers={"handtuned": provider(unscale_), "torch": provider(by_torch)},
        check=check,
        bytes=2 * elements * dtype.itemsize,
        footprint=elements * dtype.itemsize,
        dtype=dtype,
        size={"parameters": elements},
        kernel=f"unscale[{short(dtype)}]",
    )


def cases(device, quick):
    yield case("adapter", ADAPTER, torch.float32, device)
    if device.type == "cuda":
        large = [(4096, 4096)] * 8
        yield case("eight weights", large, torch.float32, device)
        if not quick:
            yield case("eight weights", large, torch.float16, device)
    elif not quick:
        yield case("a weight", [(4096, 2048)], torch.float32, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
