"""Cross-entropy from hidden states through a frozen output head, forward and backward, beside torch and Liger.

    python benchmarks/bench_loss.py            the same as `handtuned bench loss`
"""

import torch
import torch.nn.functional as F
from handtuned.nn import linear_cross_entropy
from shared import error, low_precision

from handtuned.bench import script
from handtuned.harness import Case


def provider(loss_of):
    def make(inputs):
        hidden, weight, target = inputs

        def run():
            hidden.grad = None
            loss = loss_of(hidden, weight, target)
            loss.backward()
            return loss.detach(), hidden.grad

        return run

    return make


def by_torch(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")


def liger(inputs):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return provider(lambda hidden, weight, target: fused(weight, hidden, target))(inputs)


def check(inputs):
    hidden = inputs[0].detach().double().requires_grad_()
    expected = F.cross_entropy(hidden @ inputs[1].double().t(), inputs[2], reduction="sum")
    expected.backward()
    eps = torch.finfo(inputs[0].dtype).eps

    def close(name, result):
        loss, dh = result
        off = abs(loss.item() / expected.item() - 1)
        assert off < max(4 * eps, 1e-5), f"the loss is off by {off:.1e}"
        off = error(dh, hidden.grad)
        assert off < max(8 * eps, 1e-5), f"the gradient is off by {off:.1e}"

    return close


def case(tokens, D, V, dtype, device):
    def inputs():
        hidden = torch.randn(tokens, D, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
        return hidden, weight, torch.randint(V, (tokens,), device=device)

    return Case(
        name=f"cross-entropy, {tokens} tokens, D {D}, V {V}, {str(dtype)[6:]}",
        inputs=inputs,
        providers={"handtuned": provider(linear_cross_entropy), "torch": provider(by_torch), "liger": liger},
        check=check,
        bytes=(V * D + 2 * tokens * D) * dtype.itemsize,
        flops=4 * tokens * D * V,
        dtype=dtype,
        size={"M": tokens, "N": V, "K": D},
    )


def cases(device, quick):
    if device.type == "cuda":
        yield case(2048 if quick else 4096, 2048, 49152, low_precision(device), device)
    else:
        yield case(64 if quick else 168, 576, 49152, torch.float32, device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
