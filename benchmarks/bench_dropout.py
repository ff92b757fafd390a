"""Drawing a dropout mask from a seed, so that backward draws it again, beside torch's bernoulli.

    python benchmarks/bench_dropout.py        the same as `handtuned bench dropout`

This is the mask of the torch path; the kernels draw theirs in registers, which costs nothing that could be timed alone
(`bench_lora.py` times a layer with dropout).
"""

import torch
from handtuned.kernels.dropout import dropout_mask, new_seed, threshold_of

from handtuned.bench import script
from handtuned.harness import Case

P = 0.05


def ours(seed, M, K):
    return lambda: dropout_mask(seed, M, K, threshold_of(P))


def bernoulli(seed, M, K):
    return lambda: torch.empty(M, K, dtype=torch.bool, device=seed.device).bernoulli_(1 - P)


def case(M, K, device):
    def check(seed):
        deviation = (P * (1 - P) / (M * K)) ** 0.5

        def right(name, result):
            kept = result.double().mean().item()
            assert abs(kept - (1 - P)) < 6 * deviation + 2**-17, f"{kept:.4%} of the elements are kept"
            if name == "handtuned":
                assert torch.equal(result, ours(seed, M, K)()), "the same seed gives another mask"

        return right

    return Case(
        name=f"dropout mask, {M} × {K}, p {P}",
        inputs=lambda: new_seed(device),
        providers={
            "handtuned": lambda seed: ours(seed, M, K),
            "torch": lambda seed: bernoulli(seed, M, K),
        },
        check=check,
        bytes=M * K,
        size={"M": M, "K": K},
    )


def cases(device, quick):
    yield case(*((4096, 4096) if device.type == "cuda" else (128 if quick else 512, 1024)), device)


if __name__ == "__main__":
    raise SystemExit(script(__file__))
