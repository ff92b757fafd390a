"""A training step moment by moment: forward, loss, backward layer by layer."""

from collections import Counter
from dataclasses import dataclass

from ..nn.checkpoint_plan import Segment
from ..nn.loss import CHUNK_BYTES
from .activations import LayerSetup, backward_extra, kept_by_layer

PREFIX = "activations: "


@dataclass(frozen=True)
class Gradients:
    """Bytes of the gradients of one layer, of the embedding table (and so of an untied head) and of the last norm;
    `held`: they are there during forward already, from earlier passes of an accumulated batch.
    """

    layer: int
    table: int
    norm: int
    held: bool


def follow(
    setup: LayerSetup, tokens: int, segments: tuple[Segment, ...], labelled: int | None, gradients: Gradients
) -> dict[str, Counter]:
    """Moment → bytes of each component that comes and goes: gradients, activations by kind, logits, buffers.

    Args:
        tokens: of one forward pass.
        segments: of layers, each recomputed from a checkpoint or kept.
        labelled: tokens with a label, whose logits are made in chunks; None: transformers' own loss, all at once.
    """
    shape, c = setup.shape, setup.itemsize
    kept = [_kept_in_layer(setup, tokens, i) for i in range(shape.layers)]
    checkpoint = c * shape.hidden * tokens
    everything = shape.layers * gradients.layer + gradients.norm + gradients.table * (1 if shape.tied else 2)

    stored, before = Counter(), {}  # kept from forward, in total and before each segment
    for segment in segments:
        before[segment] = stored.copy()
        if segment.recompute:
            stored[PREFIX + "checkpoints"] += checkpoint
        else:
            stored.update(_sum(kept[segment.start : segment.stop]))
    stored[PREFIX + "norms"] += (4 * shape.hidden + 4 + 2 * setup.trained * c * shape.hidden) * tokens  # the last

    moments = {}

    def note(name, alive, made, **more):
        moments[name] = Counter(alive)
        moments[name]["gradients"] = everything if gradients.held else made
        moments[name].update({key: value for key, value in more.items() if value})

    if labelled is None:
        # log-softmax, its incoming and its outgoing gradient, all in fp32
        note("loss", stored, 0, logits=12 * shape.vocab * tokens)
        if setup.trained:
            note("backward of the head", stored, gradients.table, logits=c * shape.vocab * tokens, buffers=checkpoint)
    else:
        _note_chunked_loss(note, setup, checkpoint, labelled, stored)
    made = gradients.table * setup.trained + gradients.norm
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
        note("backward of the embedding", {}, everything, buffers=copies * gradients.table + checkpoint)
    return moments


def _kept_in_layer(setup: LayerSetup, tokens: int, index: int) -> Counter:
    kept = {kind: count * tokens for kind, count in kept_by_layer(setup).items()}
    if index == 0 and not setup.trained:  # a frozen embedding: nothing before the first adapter has a gradient
        kept["norms"] -= (4 * setup.shape.hidden + 4) * tokens
    return Counter({PREFIX + kind: count for kind, count in kept.items()})


def _note_chunked_loss(note, setup: LayerSetup, hidden: int, labelled: int, stored: Counter) -> None:
    """`nn.loss`; `hidden`: bytes of the last norm's output."""
    shape, c = setup.shape, setup.itemsize
    table = shape.table_parameters
    chunk = min(labelled, max(1, CHUNK_BYTES // (4 * shape.vocab)))
    following = min(chunk, labelled - chunk)
    # A chunk's logits and probabilities are still there when the next one's logits are made.
    logits = shape.vocab * ((8 * chunk + 4 * following) if c == 4 else (10 * chunk + 6 * following))
    rows = (c + 4) * shape.hidden * labelled  # the rows with a label, and their gradient in fp32
    buffers = rows + c * shape.hidden * chunk
    if not setup.trained:
        note("loss", stored, 0, logits=logits, buffers=buffers + hidden)  # the norm's output is still in use
        return
    buffers += 4 * table + (c if c == 4 else 4 + c) * table  # the head's gradient in fp32, a chunk's part of it
    note("loss", stored, 0, logits=logits, buffers=buffers)
    note("backward of the head", stored, 0, buffers=8 * table + (c * table if c == 2 else 0) + rows)


def _sum(counters) -> Counter:
    total = Counter()
    for counter in counters:
        total.update(counter)
    return total
