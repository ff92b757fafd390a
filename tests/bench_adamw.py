"""AdamW: a step over all parameters, ours against torch's and bitsandbytes'.

    python tests/bench_adamw.py [--device cpu|cuda] [--rounds 9]

Two sets of tensors: a rank-8 adapter on q and v of 30 layers (240 small tensors, 0.9 M parameters) and the
shapes of SmolLM2-135M (212 tensors, 128 M parameters). On a GPU the bytes that a step must move,
28 a parameter, give the share of bandwidth; a CPU row is torch's fused loop called by us.
"""

import argparse

import torch
from handtuned.amp import GradScaler
from handtuned.optim import AdamW, AdamW8bit

from handtuned.bench import compare, table

SHAPES = {
    "adapter": [shape for _ in range(60) for shape in ((8, 576), (576, 8), (8, 576), (192, 8))],
    "smollm2-135m": [(1536, 576)] * 90 + [(576, 576)] * 60 + [(576,)] * 61 + [(49152, 576)],
}


def contestant(make, shapes, device):
    """(a step, its parameters): all contestants begin alike."""
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.randn(shape, device=device, generator=generator).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, device=device, generator=generator)
    return make(params), params


def unscale_clip_step(optimizer):
    """What precedes a step in mixed precision, by torch's own tools."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=1.0)
    scaler.scale(torch.ones((), device=params[0].device))

    def step():
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def fused_unscale_clip_step(optimizer):
    """The same by ours: the step unscales, clips and skips by itself."""
    scaler = GradScaler(init_scale=1.0)
    scaler.scale(torch.ones((), device=optimizer.param_groups[0]["params"][0].device))

    def step():
        scaler.step(optimizer, max_norm=1.0)
        scaler.update()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for name, shapes in SHAPES.items():
        optimizers = {
            "handtuned": lambda p: AdamW(p),
            "torch foreach": lambda p: torch.optim.AdamW(p, foreach=True),
            "torch fused": lambda p: torch.optim.AdamW(p, fused=True),
            "handtuned 8-bit": lambda p: AdamW8bit(p),
        }
        built = {key: contestant(make, shapes, args.device) for key, make in optimizers.items()}
        exact = built["torch foreach"][1]

        def check(key, _, exact=exact, built=built):
            for p, q in zip(built[key][1], exact, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

        # The reference of the check steps first; after the first step all contestants agree to rounding.
        steps = {key: optimizer.step for key, (optimizer, _) in built.items()}
        order = ["torch foreach", *(key for key in steps if key != "torch foreach")]
        times = compare({key: steps[key] for key in order}, check, args.rounds, args.device)
        elements = sum(p.numel() for p in exact)
        print(f"{name}: {len(shapes)} tensors, {elements / 1e6:.1f} M parameters, {args.device}, step")
        print(table(times, "handtuned"))
        print(f"handtuned: {28 * elements / times['handtuned']['median'] / 1e9:.1f} GB/s of the 28 bytes a parameter")

        whole = {
            "handtuned": fused_unscale_clip_step(contestant(lambda p: AdamW(p, fused=True), shapes, args.device)[0]),
            "torch foreach": unscale_clip_step(contestant(optimizers["torch foreach"], shapes, args.device)[0]),
            "torch fused": unscale_clip_step(contestant(optimizers["torch fused"], shapes, args.device)[0]),
        }
        print("unscale, clip and step")
        print(table(compare(whole, None, args.rounds, args.device), "handtuned"), end="\n\n")


if __name__ == "__main__":
    main()
