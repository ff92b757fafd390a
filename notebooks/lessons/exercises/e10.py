"""Exercises of lesson 10: a product that keeps no dense weight, QLoRA's bytes, what merging into NF4 loses."""

import gc

import torch
import torch.nn.functional as F

from ...nn.live_memory import LiveMemory
from ...quant import quantize_nf4
from ..exercise import Exercise, WrongAnswer, expect, expect_close, number, unchanged
from . import e10_layer

# 10.1


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return x @ q.dequantize().t()

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.q.dequantize(), None


def nf4_product(x, q):
    return _Product.apply(x, q)


def _dense_kept(x, q):
    return F.linear(x, q.dequantize())


class _TransposedProduct(_Product):
    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.q.dequantize().t(), None


def _transposed_backward(x, q):
    return _TransposedProduct.apply(x, q)


def _cut_off(x, q):
    with torch.no_grad():
        return F.linear(x, q.dequantize())


def check_nf4_product(candidate):
    generator = torch.Generator().manual_seed(3)
    for rows, inputs, outputs in ((3, 64, 96), (1, 96, 64), (65, 33, 17)):
        q = quantize_nf4(torch.randn(outputs, inputs, generator=generator))
        x = torch.randn(rows, inputs, generator=generator, requires_grad=True)
        dy = torch.randn(rows, outputs, generator=generator)
        what = f"x {rows} × {inputs}, W {outputs} × {inputs}"
        y = candidate(x, q)
        dense = q.dequantize()
        expect_close(y, x @ dense.t(), f"y ({what})", rtol=1e-4, atol=1e-4)
        expect(y.requires_grad, f"No gradient flows through your y ({what}): dx = dy W is needed by the layers below.")
        try:
            y.backward(dy)
        except RuntimeError as error:
            raise WrongAnswer(f"backward ({what}): {error}. dx = dy W, with W as it is, not transposed.") from None
        expect_close(x.grad, dy @ dense, f"dx ({what})", rtol=1e-4, atol=1e-4, hint="dx = dy W, with W not transposed.")
    warm, q = (quantize_nf4(torch.randn(512, 512, generator=generator)) for _ in range(2))
    x = torch.randn(4, 512, generator=generator, requires_grad=True)
    candidate(x, warm)  # what is made once for all weights is not counted; what is kept of each weight is
    gc.collect()  # nor is what an earlier answer left, and goes meanwhile
    with LiveMemory("cpu") as memory:
        y = candidate(x, q)
        gc.collect()  # a dense weight in a reference cycle is not kept
        held = max(0, memory.added)
    dense = 4 * 512 * 512
    expect(
        held < dense / 2,
        f"Values and gradients are right, but between forward and backward {held:,} bytes are kept for a 512 × 512 "
        f"weight; the dense one is {dense:,}. Keep q, and dequantize a second time in backward.",
    )
    del y
    return f"Three shapes, forward and gradient; {held:,} bytes more are kept, where the dense weight has {dense:,}."


# 10.2


def qlora_bytes(linear, other, adapter):
    blocks = -(-linear // 64)
    return -(-linear // 2) + blocks + 4 * -(-blocks // 256) + 4 + 2 * other + (4 + 4 + 8) * adapter


def _without_scales(linear, other, adapter):
    return -(-linear // 2) + 2 * other + 16 * adapter


def _embeddings_forgotten(linear, other, adapter):
    return qlora_bytes(linear, 0, adapter)


def _adapter_in_16_bits(linear, other, adapter):
    return qlora_bytes(linear, other, 0) + (2 + 8) * adapter


def check_qlora_bytes(candidate):
    cases = (
        (64 * 256 * 100, 0, 0, "the scales: a byte for 64 weights, 4 for 256 scales, 4 for their mean"),
        (64 * 300 + 1, 0, 0, "short ends: an odd last weight has a byte, a short block a scale, 44 scales a constant"),
        (64 * 256, 1000, 0, "the other parameters (embeddings, norms) stay in 16 bits"),
        (64 * 256, 0, 1000, "each adapter number: 4 bytes of weight, 4 of gradient, 8 of Adam's moments"),
        (1_310_195_712, 233_528_832, 9_232_384, "a whole model"),
    )
    for linear, other, adapter, what in cases:
        got = number(candidate(linear, other, adapter), "What qlora_bytes returns", "number of bytes")
        want = qlora_bytes(linear, other, adapter)
        if got != want:
            raise WrongAnswer(
                f"qlora_bytes(linear={linear:,}, other={other:,}, adapter={adapter:,}) gives {got:,}, expected "
                f"{want:,}. Look at {what}."
            )
    return "Codes, both levels of scales, short blocks, other parameters, adapters with gradients and moments."


# 10.3


def merge_error(q, delta):
    target = q.dequantize() + delta
    return ((quantize_nf4(target).dequantize() - target).norm() / delta.norm()).item()


def _relative_to_weight(q, delta):
    target = q.dequantize() + delta
    return ((quantize_nf4(target).dequantize() - target).norm() / target.norm()).item()


def _against_old_weight(q, delta):
    old = q.dequantize()
    return ((quantize_nf4(old + delta).dequantize() - old).norm() / delta.norm()).item()


def _rounded_to_16_bits(q, delta):
    target = q.dequantize() + delta
    return ((target.bfloat16().float() - target).norm() / delta.norm()).item()


def check_merge_error(candidate):
    generator = torch.Generator().manual_seed(4)
    for rows, columns, size in ((64, 128, 0.02), (96, 64, 0.2), (33, 65, 0.005)):
        q = quantize_nf4(torch.randn(rows, columns, generator=generator))
        delta = torch.randn(rows, columns, generator=generator) * size
        want, hint = merge_error(q, delta), ""
        with unchanged(delta=delta, packed=q.packed, absmax=q.absmax):
            got = number(candidate(q, delta), "The error")
        if abs(got - _relative_to_weight(q, delta)) < 1e-6:
            hint = "Divide by ‖ΔW‖: beside ‖W‖ every error looks small."
        elif abs(got - _against_old_weight(q, delta)) < 1e-6:
            hint = "Compare with W + ΔW, what the merge should have been, not with W."
        elif abs(got - _rounded_to_16_bits(q, delta)) < 1e-6:
            hint = "The merged weight must be quantized to NF4 again."
        elif abs(got - want) < 0.01 * want:
            hint = "Nearly. Quantize as q is: blocks of 64 and double quantization, quantize_nf4's defaults."
        expect_close(got, want, f"The error for ‖ΔW‖ / ‖W‖ ≈ {size}", rtol=1e-4, hint=hint)
    return "Three sizes of ΔW, from a fifth of the weights to a 200th."


EXERCISES = {
    "10.1": Exercise(
        title="a product that keeps no dense weight",
        specification="nf4_product(x, q) → x Wᵀ for an NF4Tensor q, with gradient dx, and no dense W kept in between.",
        checker=check_nf4_product,
        solution=nf4_product,
        wrong={
            "dense weight kept": (_dense_kept, "dequantize a second time"),
            "transposed in backward": (_transposed_backward, "not transposed"),
            "no gradient": (_cut_off, "No gradient flows"),
        },
        hints=(
            "F.linear keeps the weight that it was given until backward. You need a torch.autograd.Function.",
            "forward(ctx, x, q): store q on ctx (it is 4 bits per weight), return x @ q.dequantize().t().",
            "backward(ctx, dy): return dy @ ctx.q.dequantize(), None.",
        ),
    ),
    "10.2": Exercise(
        title="QLoRA's bytes",
        specification=(
            "qlora_bytes(linear, other, adapter): bytes of model states, given how many weights lie in NF4 (block 64, "
            "double quantization), how many others stay in 16 bits, and how many belong to adapters (fp32, Adam)."
        ),
        checker=check_qlora_bytes,
        solution=qlora_bytes,
        wrong={
            "scales forgotten": (_without_scales, "the scales"),
            "embeddings forgotten": (_embeddings_forgotten, "embeddings"),
            "adapter in 16 bits, no gradient": (_adapter_in_16_bits, "4 of gradient"),
        },
        hints=(
            "-(-n // 64) divides and rounds up.",
            "Scales: one byte per block of 64; 4 bytes for each 256 of them; 4 bytes for their mean.",
            "An adapter parameter costs 4 (itself) + 4 (gradient) + 8 (Adam's moments).",
        ),
    ),
    "10.3": Exercise(
        title="what merging into NF4 loses",
        specification="merge_error(q, delta): ‖result − (W + ΔW)‖ / ‖ΔW‖ when W + ΔW goes back into NF4. A float.",
        checker=check_merge_error,
        solution=merge_error,
        wrong={
            "relative to the weight": (_relative_to_weight, "Divide by ‖ΔW‖"),
            "against the old weight": (_against_old_weight, "Compare with W + ΔW"),
            "not quantized again": (_rounded_to_16_bits, "quantized to NF4 again"),
        },
        hints=(
            "W is q.dequantize(): the weight that the adapter was trained on.",
            "quantize_nf4(W + delta).dequantize() is what is left after merging.",
            "The adapter is ΔW, so the error is measured in units of ‖ΔW‖: 1 is as bad as leaving it out.",
        ),
    ),
    **e10_layer.EXERCISES,
}
