"""Short rows share one sequence: the tokens of a micro-batch without most of its padding.

    padded        a a a . . . . .      packed    a a a b b b b c        position_ids   0 1 2 0 1 2 3 0
                  b b b b . . . .                d d d d d d d d                       0 1 2 3 4 5 6 7
                  c . . . . . . .
                  d d d d d d d d

Positions begin anew with each row. From that transformers makes the attention mask by itself: causal within a row,
nothing across (`masking_utils.find_packed_sequence_indices`). Everything else in a decoder looks at one token at a
time. A micro-batch holds the same rows as without packing, and the first token of a row is never learnt, so the loss
and its gradients are those of the padded batch, but for rounding. Not here: what transformers does not keep apart
(state that runs through a sequence, positions that a model counts itself); `check_apart` finds it out by trying.
"""

from collections.abc import Callable, Sequence

import torch

from .data import Example, collate
from .evaluation import evaluating


def pack(lengths: Sequence[int], limit: int, hidden: int) -> list[list[int]]:
    """Which rows share a sequence: the cheapest way to deal them out to 1, 2, … sequences of at most `limit` tokens.

    Longest rows first, each goes to the sequence that is shortest so far. In a sequence of w tokens a decoder layer's
    products take about 24 · hidden² FLOPs per token (hidden: the model's width), and attention 4 · hidden · w, for it
    computes what it then masks. `lengths`: tokens of each row, none above `limit`.
    """
    longest_first, best, cheapest = sorted(range(len(lengths)), key=lambda row: -lengths[row]), [], float("inf")
    for count in range(-(-sum(lengths) // limit), len(lengths) + 1):
        width = lengths[longest_first[0]]
        if count * width * (6 * hidden + width) > cheapest:
            break  # nor would more of them be cheaper
        bins, filled = [[] for _ in range(count)], [0] * count
        for row in longest_first:
            at = filled.index(min(filled))
            bins[at].append(row)
            filled[at] += lengths[row]
        width = max(filled)
        if width <= limit and (cost := count * width * (6 * hidden + width)) <= cheapest:
            best, cheapest = bins, cost
    return best


def packer(model: torch.nn.Module, limit: int) -> Callable[[Sequence[Example]], list[list[int]]]:
    """What lays out the rows of a micro-batch for this model: `pack`, or all in one sequence for flash attention, which
    knows rows by their positions only there.

    ValueError: the model, with the attention it has, lets rows in one sequence see each other.
    """
    in_one, hidden = "flash" in str(model.config._attn_implementation), model.get_input_embeddings().embedding_dim

    def layout(rows: Sequence[Example]) -> list[list[int]]:
        lengths = [len(row.input_ids) for row in rows]
        return [list(range(len(rows)))] if in_one else pack(lengths, limit, hidden)

    check_apart(model, [[0, 1]] if in_one else [[0, 1], [1, 0]])
    return layout


def check_apart(model: torch.nn.Module, bins: list[list[int]]) -> None:
    """Raise ValueError unless rows that share a sequence are computed as if each were alone.

    The same row stands twice in a sequence. No gradient may lead from the second to the embeddings of the first: that
    is exactly zero where attention is masked. And both must come out alike, which they do not where positions go on.
    """
    ids = torch.arange(1, 9).numpy()
    batch = collate([Example(ids, ids)] * 2, 0, next(model.parameters()).device, bins)
    embedded = []
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1].requires_grad_()))
    try:
        with evaluating(model), torch.enable_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        first, second = logits.float().chunk(2, dim=1)
        weights = torch.linspace(-1, 1, second.numel(), device=second.device).view_as(second)
        (reached,) = torch.autograd.grad((second * weights).sum(), embedded)
        apart = not reached[:, : len(ids)].any() and reached.any()
        # Between a rounding and a difference of order one.
        alike = (first - second).norm() <= torch.finfo(logits.dtype).eps ** 0.5 * second.norm()
    except TypeError:  # it takes no position_ids
        apart = alike = False
    finally:
        hook.remove()
    if not (apart and alike):
        kind = f"{type(model).__name__} with {model.config._attn_implementation} attention"
        raise ValueError(f"--packing: {kind} does not keep rows in one sequence apart")
