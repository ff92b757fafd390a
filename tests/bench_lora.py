"""Time one LoRA layer, forward and backward, against PEFT on the same layer and on bitsandbytes NF4.

    python tests/bench_lora.py            on a CPU: M = 512, 1024 × 1024, r = 8
    python tests/bench_lora.py --work     counts bytes and FLOPs instead, without running anything

On a CUDA GPU the sizes are 4096 × 4096, r = 16, bf16, and the base product alone is timed too.
Results are compared before anything is timed. Turns alternate, so a slow spell falls on all alike.
"""

import argparse
import copy
import platform
import warnings

import torch
from handtuned.kernels.lora_work import report
from handtuned.nn import LoRALinear
from handtuned.quant import NF4Linear
from torch import nn

from handtuned.bench import compare, table


class OneLayer(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.q_proj = linear


def with_peft(linear, ours):
    """PEFT's layer around `linear`, with our adapter's values and dropout."""
    import peft

    config = peft.LoraConfig(
        r=ours.rank, lora_alpha=ours.lora_alpha, lora_dropout=ours.lora_dropout, target_modules=["q_proj"]
    )
    layer = peft.get_peft_model(OneLayer(linear), config).base_model.model.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = ours.lora_A.data.clone(), ours.lora_B.data.clone()
    return layer, A, B


def with_bitsandbytes(linear, compute_dtype):
    import bitsandbytes as bnb

    packed = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None,
        quant_type="nf4", compress_statistics=True, compute_dtype=compute_dtype,
    )  # fmt: skip
    packed.load_state_dict(linear.state_dict())
    return packed.to(linear.weight.device)


def same_nf4(packed, linear, compute_dtype):
    """Our layer with the bytes of bitsandbytes' one."""
    layer = NF4Linear.from_linear(linear, compute_dtype=compute_dtype)
    layer.load_state_dict(packed.state_dict())
    return layer


def step(layer, A, B, x, dy):
    """Forward and backward, as a training step runs them; returns y and the gradients of x, A and B."""

    def run():
        x.grad = A.grad = B.grad = None
        y = layer(x)
        y.backward(dy)
        return y.detach(), x.grad, A.grad, B.grad

    return run


def same_as(reference, tolerance):
    """A check that each result lies within `tolerance` of the reference, relative to its largest value."""
    expected = [t.double() for t in reference]

    def check(name, results):
        for got, want in zip(results, expected, strict=False):
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error < tolerance, f"{name} is off by {error:.1e}"

    return check


def contest(M, N, K, rank, dtype, device, dropout, rounds):
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(M, N, device=device, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for title in ("Linear", "NF4"):
        rival = linear if title == "Linear" else with_bitsandbytes(linear, dtype)
        base = copy.deepcopy(linear) if title == "Linear" else same_nf4(rival, linear, dtype)
        ours = LoRALinear(base, rank, 2.0 * rank, dropout)
        nn.init.normal_(ours.lora_B, std=0.02)
        theirs = with_peft(copy.deepcopy(rival), ours)
        contestants = {
            "handtuned": step(ours, ours.lora_A, ours.lora_B, x, dy),
            "peft" if title == "Linear" else "peft + bitsandbytes": step(*theirs, x, dy),
        }
        check = None if dropout else same_as(contestants["handtuned"](), tolerance)
        if title == "Linear":
            contestants["base layer alone"] = lambda: (linear(x).backward(dy), x.grad)[1:]
            check = None if dropout else lambda name, r, check=check: name == "base layer alone" or check(name, r)
        print(f"\n{title}, M {M}, {N} × {K}, r {rank}, {str(dtype)[6:]}, dropout {dropout}: forward and backward")
        print(table(compare(contestants, check, rounds, str(device)), "handtuned"))


def decode(N, K, rank, dtype, device, rounds):
    """Forward alone for a few rows, where a 4-bit weight pays."""
    linear = nn.Linear(K, N, bias=False, device=device, dtype=dtype).requires_grad_(False)
    rival = with_bitsandbytes(linear, dtype)
    ours = LoRALinear(same_nf4(rival, linear, dtype), rank).eval()
    nn.init.normal_(ours.lora_B, std=0.02)
    theirs, _, _ = with_peft(rival, ours)
    for M in (1, 4, 16):
        x = torch.randn(M, K, device=device, dtype=dtype)
        with torch.no_grad():
            contestants = {"handtuned": lambda x=x: (ours(x),), "peft + bitsandbytes": lambda x=x: (theirs(x),)}
            print(f"\nNF4, M {M}, {N} × {K}, r {rank}, {str(dtype)[6:]}: forward")
            check = same_as(contestants["handtuned"](), 0.03)
            print(table(compare(contestants, check, rounds, str(device)), "handtuned"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help="count bytes and FLOPs at 4096³, r = 16")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    if args.work:
        print(report(4096, 4096, 4096, 16))
        return
    warnings.simplefilter("ignore")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name())
        for M in (512, 4096, 8192):
            contest(M, 4096, 4096, 16, torch.bfloat16, "cuda", args.dropout, args.rounds)
        decode(4096, 4096, 16, torch.bfloat16, "cuda", args.rounds)
    else:
        print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
        contest(512, 1024, 1024, 8, torch.float32, "cpu", args.dropout, args.rounds)


if __name__ == "__main__":
    main()
