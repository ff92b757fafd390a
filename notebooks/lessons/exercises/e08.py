"""Exercises of lesson 08: which layers a target names, merging and unmerging, an adapter for each row."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..exercise import Exercise, WrongAnswer, alike, expect, expect_close, unchanged

# 08.1

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.0.mlp.q_proj",
    "model.layers.0.self_attn.q_proj.original",
    "vision.audio_projector",
    "vision.no_proj",
    "o_proj",
    "o_proj_bias",
    "model.layers.0.self_attn_q_proj",
]


def select(paths, target):
    return [path for path in paths if f".{path}".endswith(f".{target}")]


def _substring(paths, target):
    return [path for path in paths if target in path]


def _ending(paths, target):
    return [path for path in paths if path.endswith(target)]


def _last_word(paths, target):
    return [path for path in paths if path.split(".")[-1] == target]


def check_select(candidate):
    for target in ("q_proj", "self_attn.q_proj", "o_proj", "proj", "model.layers.0.self_attn.o_proj"):
        paths, want = list(PATHS), select(PATHS, target)
        with unchanged(paths=paths):
            got = candidate(paths, target)
        listed = isinstance(got, (list, tuple)) and all(isinstance(path, str) for path in got)
        expect(listed, f"Return a list of paths, got {got!r}.")
        extra, missing = [p for p in got if p not in want], [p for p in want if p not in got]
        if extra:
            alike = "the path does not end in it"
            if extra[0].endswith(target):
                alike = "the last letters agree, but not whole components"
            raise WrongAnswer(f"target {target!r} must not select {extra[0]!r}: {alike}.")
        if missing:
            why = " A target may have several components." if "." in target else ""
            raise WrongAnswer(f"target {target!r} must select {missing[0]!r}.{why}")
        expect(list(got) == want, f"target {target!r}: keep the order of the paths and name each once; got {got}.")
    return "Names, several components, whole paths, and names that only look alike."


# 08.2


class Mergeable(nn.Module):
    def __init__(self, linear, A, B, scaling):
        super().__init__()
        self.linear, self.A, self.B, self.scaling = linear, A, B, scaling
        self.kept = None

    def forward(self, x):
        y = self.linear(x)
        return y if self.kept is not None else y + self.scaling * F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merge(self):
        if self.kept is None:
            self.kept = self.linear.weight.clone()
            self.linear.weight += (self.scaling * self.B @ self.A).to(self.kept.dtype)

    @torch.no_grad()
    def unmerge(self):
        if self.kept is not None:
            self.linear.weight.copy_(self.kept)
            self.kept = None


class _NoFlag(Mergeable):
    """The documents' layer: merging leaves no mark, so forward adds ΔW again."""

    @torch.no_grad()
    def merge(self):
        self.linear.weight += (self.scaling * self.B @ self.A).to(self.linear.weight.dtype)

    @torch.no_grad()
    def unmerge(self):
        self.linear.weight -= (self.scaling * self.B @ self.A).to(self.linear.weight.dtype)


class _Subtracts(Mergeable):
    @torch.no_grad()
    def unmerge(self):
        if self.kept is not None:
            self.linear.weight -= (self.scaling * self.B @ self.A).to(self.kept.dtype)
            self.kept = None


class _Unscaled(Mergeable):
    @torch.no_grad()
    def merge(self):
        if self.kept is None:
            self.kept = self.linear.weight.clone()
            self.linear.weight += (self.B @ self.A).to(self.kept.dtype)


def check_mergeable(candidate):
    torch.manual_seed(11)
    scaling = 2.0
    linear = nn.Linear(33, 17)
    A, B, x = torch.randn(3, 33) / 8, torch.randn(17, 3) / 8, torch.randn(5, 33)
    W, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    delta = B @ A
    layer = candidate(linear, A, B, scaling)
    lacks = [name for name in ("__call__", "merge", "unmerge") if not hasattr(layer, name)]
    expect(not lacks, f"What Mergeable(linear, A, B, scaling) makes has no {', '.join(lacks)}: check the class itself.")
    want = F.linear(x, W + scaling * delta, bias)
    close = {"rtol": 1e-4, "atol": 1e-4}
    expect_close(layer(x), want, "Before merging, the output", **close)
    layer.merge()
    got = layer(x)
    hint = ""
    if alike(got, want):
        if torch.allclose(got, F.linear(x, W + 2 * scaling * delta, bias), **close):
            hint = "ΔW is in it twice: once in the weight and once in forward. Remember that you merged."
        elif torch.allclose(got, F.linear(x, W + delta, bias), **close):
            hint = "Merge scaling · BA, not BA."
    expect_close(got, want, "After merge(), the output", hint=hint, **close)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    used, needed = counter.get_total_flops(), 2 * 5 * 33 * 17
    expect(
        used <= needed,
        f"After merge() the output is right, but a forward pass takes {used:,} FLOPs where the linear layer alone "
        f"takes {needed:,}: ΔW belongs into the weight.",
    )
    layer.merge()
    twice = "Merging twice must change nothing."
    expect_close(layer(x), want, "After merging a second time, the output", hint=twice, **close)
    layer.unmerge()
    layer.unmerge()
    expect_close(layer(x), want, "After unmerge(), the output", **close)

    half = nn.Linear(64, 64, bias=False).half()
    before = half.weight.detach().clone()
    layer = candidate(half, torch.randn(4, 64).half() / 8, torch.randn(64, 4).half() / 8, scaling)
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    moved = int((half.weight != before).sum())
    expect(
        moved == 0,
        f"After three rounds of merge and unmerge in fp16, {moved} of {before.numel()} weights differ from the "
        "original: adding and subtracting rounds twice. Keep the original and put it back.",
    )
    return "Merged once and twice, unmerged once and twice, fp16 weights restored bit for bit."


# 08.3


def forward_rows(x, W, adapters, names):
    y = F.linear(x, W)
    for name in set(names) - {None}:
        rows = [i for i, each in enumerate(names) if each == name]
        A, B, scaling = adapters[name]
        y[rows] += scaling * F.linear(F.linear(x[rows], A), B)
    return y


def _first_for_all(x, W, adapters, names):
    A, B, scaling = adapters[next(name for name in names if name)]
    return F.linear(x, W) + scaling * F.linear(F.linear(x, A), B)


def _unscaled_rows(x, W, adapters, names):
    return forward_rows(x, W, {name: (A, B, 1.0) for name, (A, B, _) in adapters.items()}, names)


def _merge_for_each(x, W, adapters, names):
    out = []
    for row, name in zip(x, names, strict=True):
        A, B, scaling = adapters.get(name, (torch.zeros_like(W[:1]), torch.zeros_like(W[:, :1]), 0.0))
        out.append(F.linear(row, W + scaling * B @ A))
    return torch.stack(out)


def check_forward_rows(candidate):
    generator = torch.Generator().manual_seed(13)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    adapters = {"a": (draw(2, 9), draw(7, 2), 2.0), "b": (draw(5, 9), draw(7, 5), 0.5)}
    W = draw(7, 9)
    for names in (["a", "b", None, "a", "b"], ["b"], ["a", "a"], [None, "b", None]):
        x = draw(len(names), 3, 9)
        want = _merge_for_each(x, W, adapters, names)
        with unchanged(x=x, W=W, adapters=adapters, names=names):
            got = candidate(x, W, adapters, names)
        hint = ""
        if alike(got, want):
            wrong = [name for name, mine, theirs in zip(names, got, want, strict=True)
                     if not torch.allclose(mine, theirs, atol=1e-4)]  # fmt: skip
            if wrong == [None] * len(wrong) and wrong:
                hint = "Rows named None get the base layer alone."
            elif torch.allclose(got, _unscaled_rows(x, W, adapters, names), atol=1e-4):
                hint = "Each adapter has a scaling of its own."
            elif wrong:
                hint = f"The rows of {sorted({str(name) for name in wrong})} are wrong: each row has its own adapter."
        expect_close(got, want, f"The output for rows {names}", rtol=1e-4, atol=1e-4, hint=hint)
    x, W = torch.randn(8, 16, 128), torch.randn(256, 128)
    adapters = {name: (torch.randn(2, 128), torch.randn(256, 2), 1.0) for name in "ab"}
    with FlopCounterMode(display=False) as counter:
        candidate(x, W, adapters, list("abababab"))
    used, needed = counter.get_total_flops(), 2 * 8 * 16 * (128 * 256 + 2 * (128 + 256))
    expect(
        used <= needed,
        f"The values are right, but 128 tokens took {used:,} FLOPs where {needed:,} do: the base product once for all "
        "rows, and for each adapter two thin products on its rows alone.",
    )
    return "Mixed rows, rows without adapter, two ranks and scalings, and the base product only once."


EXERCISES = {
    "08.1": Exercise(
        title="which layers a target names",
        specification="select(paths, target) → the paths that end in target, by whole components, in order.",
        checker=check_select,
        solution=select,
        wrong={
            "substring": (_substring, "does not end in it"),
            "endswith": (_ending, "not whole components"),
            "last component only": (_last_word, "several components"),
        },
        hints=(
            "'vision.no_proj' ends in the letters 'o_proj', but its last component is 'no_proj'.",
            "A dot in front of both makes the beginning of a path look like any other component.",
            "Compare f'.{path}'.endswith(f'.{target}').",
        ),
    ),
    "08.2": Exercise(
        title="merge, and take it back",
        specification=(
            "class Mergeable(linear, A, B, scaling) with forward, merge and unmerge; merging twice is harmless, "
            "unmerging exact."
        ),
        checker=check_mergeable,
        solution=Mergeable,
        wrong={
            "no flag": (_NoFlag, "in it twice"),
            "subtracts": (_Subtracts, "rounds twice"),
            "scaling forgotten": (_Unscaled, "scaling · BA"),
        },
        hints=(
            "forward must know whether the weight already holds ΔW.",
            "W + ΔW − ΔW is not W in floating point. What else can you keep?",
            "merge: keep a clone of the weight, then add; unmerge: copy the clone back and forget it.",
        ),
    ),
    "08.3": Exercise(
        title="an adapter for each row",
        specification=(
            "forward_rows(x, W, adapters, names) → x Wᵀ with row i's own adapter added; None: none. "
            "adapters[name] = (A, B, scaling)."
        ),
        checker=check_forward_rows,
        solution=forward_rows,
        wrong={
            "first adapter for all": (_first_for_all, "each row has its own adapter"),
            "scalings ignored": (_unscaled_rows, "scaling of its own"),
            "a weight for each row": (_merge_for_each, "base product once"),
        },
        hints=(
            "Compute y = x Wᵀ for the whole batch first.",
            "For each name collect the row numbers that carry it, and index x and y with that list.",
            "y[rows] += scaling * F.linear(F.linear(x[rows], A), B)",
        ),
    ),
}
