"""Lesson 11: shards."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..exercise import Exercise, WrongAnswer, expect, expect_close, number


def _bytes_per_rank(parameters, ranks, stage, offload):
    weights = 2 * parameters / (ranks if stage >= 3 else 1)
    gradients = 2 * parameters / (ranks if stage >= 2 else 1)
    states = 12 * parameters / (ranks if stage >= 1 else 1)
    return weights if offload else weights + gradients + states


def _stages_swapped(parameters, ranks, stage, offload):
    return _bytes_per_rank(parameters, ranks, {1: 2, 2: 1}.get(stage, stage), offload)


def _all_divided(parameters, ranks, stage, offload):
    whole = 2 * parameters if offload else 16 * parameters
    return whole / ranks if stage else whole


def _gradients_stay(parameters, ranks, stage, offload):
    share = parameters / ranks
    gradients = 2 * (share if stage >= 2 else parameters)
    return _bytes_per_rank(parameters, ranks, stage, offload) + (gradients if offload else 0)


def _check_bytes_per_rank(candidate):
    for offload in (False, True):
        for stage in (2, 3) if offload else (0, 1, 2, 3):  # under stage 1 offload leaves the whole gradient
            for parameters, ranks in ((7 * 10**9, 8), (24, 1), (66, 3)):
                case = parameters, ranks, stage, offload
                wanted, got = _bytes_per_rank(*case), number(candidate(*case), "The answer", "number of bytes")
                if not abs(got - wanted) <= 1e-6 * wanted:
                    what = f"stage {stage}" + (" with offload" if offload else "")
                    what += f", {parameters:,} parameters on {ranks} ranks"
                    cut = ["nothing", "the 12 of Adam", "those and the 2 of gradients", "all 16"][stage]
                    told = f"of 2 + 2 + 12 per parameter the ranks share {cut}"
                    told += "; with offload only weights are on the device" if offload else ""
                    raise WrongAnswer(f"{what}: {wanted:g} bytes, got {got}: {told}")
    return "stages 0 to 3, and 2 and 3 with offload, on 1, 3 and 8 ranks"


def _shards(elements, ranks):
    width = -(-elements // ranks)
    return [(min(r * width, elements), min((r + 1) * width, elements)) for r in range(ranks)]


def _tail_lost(elements, ranks):
    width = elements // ranks
    return [(r * width, (r + 1) * width) for r in range(ranks)]


def _remainder_to_the_last(elements, ranks):
    width = elements // ranks
    return [(r * width, (r + 1) * width if r < ranks - 1 else elements) for r in range(ranks)]


def _beyond_the_end(elements, ranks):
    width = -(-elements // ranks)
    return [(r * width, (r + 1) * width) for r in range(ranks)]


def _check_shards(candidate):
    for elements, ranks in ((8, 2), (10, 4), (7, 3), (2, 4), (1, 8), (0, 2), (65, 1)):
        wanted, got = _shards(elements, ranks), candidate(elements, ranks)
        what = f"{elements} elements on {ranks} ranks"
        listed = isinstance(got, (list, tuple)) and len(got) == ranks
        expect(listed, f"{what}: a list of one (start, stop) per rank is expected, got {got}")
        if not all(isinstance(piece, (tuple, list)) and len(piece) == 2 for piece in got):
            raise WrongAnswer(f"{what}: each piece is a pair (start, stop), got {got}")
        got = [tuple(piece) for piece in got]
        if any(stop > elements or start > stop for start, stop in got):
            raise WrongAnswer(f"{what}: a piece goes beyond the end or backwards: {got}")
        covered = sum(stop - start for start, stop in got)
        if covered != elements:
            raise WrongAnswer(f"{what}: the pieces cover {covered} elements: {got}")
        if got != wanted:
            raise WrongAnswer(f"{what}: all pieces except the last ones have the same width, {wanted}, got {got}")
    return "7 sizes, empty pieces among them"


def _zero_step(weights, gradients, momenta, lr, beta):
    ranks = len(gradients)
    width = weights.numel() // ranks
    mean = sum(gradients) / ranks
    new = []
    for rank in range(ranks):
        piece = slice(rank * width, (rank + 1) * width)
        momenta[rank].mul_(beta).add_(mean[piece])
        new.append(weights[piece] - lr * momenta[rank])
    return torch.cat(new)


def _sum_for_mean(weights, gradients, momenta, lr, beta):
    return _zero_step(weights, [g * len(gradients) for g in gradients], momenta, lr, beta)


def _own_gradient(weights, gradients, momenta, lr, beta):
    width = weights.numel() // len(gradients)
    new = []
    for rank, gradient in enumerate(gradients):
        piece = slice(rank * width, (rank + 1) * width)
        momenta[rank].mul_(beta).add_(gradient[piece])
        new.append(weights[piece] - lr * momenta[rank])
    return torch.cat(new)


def _momenta_gathered(weights, gradients, momenta, lr, beta):
    whole = beta * torch.cat(momenta) + sum(gradients) / len(gradients)
    for mine, piece in zip(momenta, whole.chunk(len(momenta)), strict=True):
        mine.copy_(piece)
    return weights - lr * whole


def _momentum_not_kept(weights, gradients, momenta, lr, beta):
    return _zero_step(weights, gradients, [m.clone() for m in momenta], lr, beta)


class _NoWhole(TorchDispatchMode):
    """Raises where an operation makes one tensor of all ranks' momenta, old or new, whatever their factor."""

    def __init__(self, *wholes, what):
        super().__init__()
        self.wholes, self.what = wholes, what

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.numel() == self.wholes[0].numel():
            flat = made.flatten().to(self.wholes[0].dtype)
            for whole in self.wholes:
                if abs(flat @ whole) > (1 - 1e-9) * flat.norm() * whole.norm():
                    raise WrongAnswer(
                        f"{self.what}: the momenta of all ranks were gathered into one tensor of {whole.numel()}. "
                        "Then a rank needs the memory that ZeRO saves: only new weights are gathered."
                    )
        return made


def _check_zero_step(candidate):
    generator = torch.Generator().manual_seed(0)
    for ranks, width in ((2, 2), (3, 5)):
        size = ranks * width
        start = torch.randn(size, generator=generator, dtype=torch.double)
        weights = {name: start.clone() for name in ("ours", "theirs")}
        momenta = {name: [torch.zeros(width, dtype=torch.double) for _ in range(ranks)] for name in weights}
        same = torch.randn(size, generator=generator, dtype=torch.double)
        for step in range(4):
            gradients = [torch.randn(size, generator=generator, dtype=torch.double) for _ in range(ranks)]
            if step == 0:
                gradients = [same.clone() for _ in range(ranks)]
            what = f"{ranks} ranks, step {step + 1}" + (" (all ranks have the same gradient)" if step == 0 else "")
            given = [g.clone() for g in gradients]
            old = torch.cat(momenta["theirs"])
            weights["theirs"] = _zero_step(weights["theirs"], gradients, momenta["theirs"], 0.1, 0.9)
            wholes = (old, torch.cat(momenta["theirs"]))
            with _NoWhole(*wholes, what=what) if step else nullcontext():  # in step 1 momentum and gradient are one
                weights["ours"] = candidate(weights["ours"], given, momenta["ours"], 0.1, 0.9)
            kept = f"{what}: the momentum of rank 0"
            hint = "A rank's momentum takes the mean of all ranks' gradients in its own piece."
            expect_close(weights["ours"], weights["theirs"], f"{what}: the weights", rtol=1e-9, atol=1e-12, hint=hint)
            hint = "It is kept from step to step: change momenta[rank] in place."
            expect_close(momenta["ours"][0], momenta["theirs"][0], kept, rtol=1e-9, atol=1e-12, hint=hint)
    return "tried 2 and 3 ranks, 4 steps each; no rank's momentum met another's"


EXERCISES = {
    "11.1": Exercise(
        title="Bytes per rank",
        specification="bytes_per_rank(parameters, ranks, stage, offload) → bytes of model states on one device",
        checker=_check_bytes_per_rank,
        solution=_bytes_per_rank,
        wrong={
            "stages swapped": (_stages_swapped, "stage 1, 7,000,000,000"),
            "everything divided": (_all_divided, "stage 1, 7,000,000,000"),
            "gradients stay on the device": (_gradients_stay, "with offload"),
        },
        hints=(
            "Three sums, each divided by the ranks or not: stage 1 cuts the 12, stage 2 the gradients' 2 too, "
            "stage 3 the weights' 2 too.",
            "With offload only the weights are left.",
        ),
    ),
    "11.2": Exercise(
        title="Who owns what",
        specification="shards(elements, ranks) → [(start, stop), …], ceil(elements / ranks) wide, none beyond the end",
        checker=_check_shards,
        solution=_shards,
        wrong={
            "tail lost": (_tail_lost, "cover"),
            "the rest to the last rank": (_remainder_to_the_last, "the same width"),
            "beyond the end": (_beyond_the_end, "beyond the end"),
        },
        hints=("-(-a // b) is a / b rounded up.", "min(…, elements) for start and for stop."),
    ),
    "11.3": Exercise(
        title="A step of ZeRO-1",
        specification="zero_step(weights, gradients, momenta, lr, beta) → new weights; each rank updates its own piece",
        checker=_check_zero_step,
        solution=_zero_step,
        wrong={
            "sum for mean": (_sum_for_mean, "all ranks have the same gradient"),
            "own gradient only": (_own_gradient, "step 2: the weights"),
            "momentum not kept": (_momentum_not_kept, "the momentum of rank 0"),
            "momenta in one tensor": (_momenta_gathered, "gathered into one tensor"),
        },
        hints=(
            "The mean of the ranks' gradients, cut into pieces, is what a reduce-scatter leaves on them.",
            "momenta[rank].mul_(beta).add_(piece) changes the rank's own momentum in place.",
        ),
    ),
}
