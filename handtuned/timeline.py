"""A training step moment by moment: forward, loss, backward layer by layer, optimizer."""

from collections import Counter
from dataclasses import dataclass

from .activations import LayerSetup, backward_extra, boundary, kept_by_layer
from .nn.checkpoint_plan import Segment
from .nn.loss import CHUNK_BYTES

PREFIX = "activations: "


@dataclass(frozen=True)
class Gradients:
    """Bytes of gradients, by the part of the model that they belong to.

    Attributes:
        layer: of one layer. table: of the embedding table (and so of an untied head).
        norm: of the last norm.
        held: they are there during forward already, from earlier passes of an accumulated batch.
    """

    layer: int
    table: int
    norm: int
    held: bool


@dataclass(frozen=True)
class Loss:
    """How logits are treated: `full` by transformers' own loss, else in chunks on `answer_tokens` tokens."""

    full: bool
    answer_tokens: int


def follow(
    setup: LayerSetup,
    tokens: int,
    segments: tuple[Segment, ...],
    loss: Loss,
    gradients: Gradients,
) -> dict[str, Counter]:
    """Moment → bytes of each component that comes and goes: gradients, activations by kind, logits, buffers."""
    shape, c = setup.shape, setup.itemsize
    layers = range(shape.layers)
    kept = [_kept_in_layer(setup, tokens, i) for i in layers]
    checkpoint = boundary(setup) * tokens
    tables = gradients.table * (1 if shape.tied else 2)
    everything = shape.layers * gradients.layer + gradients.norm + tables

    stored, before = Counter(), {}  # kept from forward, in total and before each segment
    for segment in segments:
        before[segment] = stored.copy()
        if segment.recompute:
            stored[PREFIX + "checkpoints"] += checkpoint
        else:
            stored.update(_sum(kept[segment.start : segment.stop]))
    stored.update(_prefixed(_last_norm(setup, tokens)))

    moments = {}

    def note(name, alive, made, **more):
        moments[name] = Counter(alive)
        moments[name]["gradients"] = everything if gradients.held else made
        moments[name].update({key: value for key, value in more.items() if value})

    _note_loss(note, setup, tokens, loss, gradients, stored)
    made = gradients.table * (setup.trained and True) + gradients.norm
    for segment in reversed(segments):
        for i in reversed(range(segment.start, segment.stop)):
            alive = before[segment] + _sum(kept[segment.start : i + 1])
            if segment.recompute:
                alive[PREFIX + "checkpoints"] += checkpoint
                if c == 4:  # the first norm's input is the checkpoint itself
                    alive[PREFIX + "norms"] -= checkpoint if segment.start or setup.trained else 0
            note(f"backward of layer {i}", alive, made, buffers=backward_extra(setup, tokens))
            made += gradients.layer
    if setup.trained:
        # The table's gradient from the embedding is dense, as large as the table; a tied one is summed with the
        # head's into a third tensor.
        copies = (2 if shape.tied else 0) + gradients.held
        buffers = copies * gradients.table + checkpoint
        note("backward of the embedding", Counter(), everything, buffers=buffers)
    return moments


def _kept_in_layer(setup: LayerSetup, tokens: int, index: int) -> Counter:
    kept = {kind: count * tokens for kind, count in kept_by_layer(setup).items()}
    if index == 0 and not setup.trained:  # a frozen embedding: nothing before the first adapter has a gradient
        kept["norms"] -= (4 * setup.shape.hidden + 4) * tokens
    return _prefixed(kept)


def _last_norm(setup: LayerSetup, tokens: int) -> dict[str, int]:
    shape, c = setup.shape, setup.itemsize
    return {"norms": (4 * shape.hidden + 4 + 2 * setup.trained * c * shape.hidden) * tokens}


def _note_loss(note, setup, tokens, loss, gradients, stored) -> None:
    shape, c = setup.shape, setup.itemsize
    hidden, table = c * shape.hidden, shape.table_parameters
    if loss.full:
        # log-softmax, its incoming and its outgoing gradient, all in fp32
        note("loss", stored, 0, logits=12 * shape.vocab * tokens)
        if setup.trained:
            note(
                "backward of the head",
                stored,
                gradients.table,
                logits=c * shape.vocab * tokens,
                buffers=hidden * tokens,
            )
        return
    chunk = min(loss.answer_tokens, max(1, CHUNK_BYTES // (4 * shape.vocab)))
    following = min(chunk, loss.answer_tokens - chunk)
    # A chunk's logits and probabilities are still there when the next one's logits are made.
    logits = shape.vocab * ((8 * chunk + 4 * following) if c == 4 else (10 * chunk + 6 * following))
    rows = (hidden + 4 * shape.hidden) * loss.answer_tokens  # the rows with a label, and their gradient in fp32
    output = 0 if setup.trained else hidden * tokens  # of the last norm, still in use
    buffers = rows + output + hidden * chunk
    if setup.trained:
        buffers += 4 * table + (c if c == 4 else 4 + c) * table  # the head's gradient in fp32, a chunk's part of it
    note("loss", stored, 0, logits=logits, buffers=buffers)
    if setup.trained:
        note("backward of the head", stored, 0, buffers=8 * table + (c * table if c == 2 else 0) + rows)


def _prefixed(kinds: dict[str, int]) -> Counter:
    return Counter({PREFIX + kind: count for kind, count in kinds.items()})


def _sum(counters) -> Counter:
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total
