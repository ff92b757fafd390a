"""What one decoder layer keeps for backward, in bytes per token, and a training step moment by moment.

Counted operation by operation for the layer as transformers' Llama and `nn.TransformerBlock` run it, with c bytes per
value (2 or 4), h the hidden size, H and K the sizes of all query and key/value heads, I the intermediate size, s the
sequence length:

    norm (two)      the input in fp32: 4h (at c = 4 it is the residual stream itself), 1/rms: 4,
                    normed: ch if the norm's weight is trained, output: ch if a next linear needs it
    attention       q: cH, k, v: cK each, output: cH, log-sum-exp: 4 per head
      eager         k, v repeated to cH each, probabilities: 4s per head, and again cs at c = 2
    MLP             gate, silu(gate), up: cI each, product: cI if `down` needs it
    adapter         x Aᵀ: cr for each linear with an adapter

A linear needs its input only where the weight or an adapter is trained: a frozen weight's backward
pass is dx = dy W alone. So LoRA on few projections also keeps fewer activations.
"""

from collections import Counter
from dataclasses import dataclass

from ..nn.checkpoint_plan import Segment
from ..nn.loss import CHUNK_BYTES
from .model_shapes import Shape

KINDS = ("checkpoints", "norms", "attention", "attention scores", "MLP", "adapters")
PREFIX = "activations: "


@dataclass(frozen=True)
class LayerSetup:
    """What decides a layer's bytes: its sizes, and how it is run and trained."""

    shape: Shape
    itemsize: int  # c, bytes of a value in the forward pass
    seq: int  # tokens in a row
    trained: bool  # the layer's own weights are trained
    targets: frozenset[str] = frozenset()  # projections with an adapter
    rank: int = 0  # of the adapters
    flash: bool = True  # attention by a fused kernel, which keeps no probabilities

    def needs_input(self, *names: str) -> bool:
        return self.trained or not self.targets.isdisjoint(names)


def kept_by_layer(setup: LayerSetup) -> dict[str, int]:
    """Kind → bytes per token that one layer keeps for backward, its input (the residual stream) included."""
    shape, c = setup.shape, setup.itemsize
    norm = 4 * shape.hidden + 4 + setup.trained * c * shape.hidden
    outputs = setup.needs_input("q_proj", "k_proj", "v_proj") + setup.needs_input("gate_proj", "up_proj")
    query, key_value = c * shape.q_size, c * shape.kv_size
    if setup.flash:
        attention = {"attention": 2 * query + 2 * key_value + 4 * shape.heads}
    else:
        repeated = query if shape.heads > shape.kv_heads else key_value
        attention = {
            "attention": query + 2 * repeated + setup.needs_input("o_proj") * query,
            "attention scores": shape.heads * setup.seq * (4 if c == 4 else 4 + c),
        }
    inner = c * shape.intermediate
    return {
        "norms": 2 * norm + outputs * c * shape.hidden,
        **attention,
        "MLP": 3 * inner + setup.needs_input("down_proj") * inner,
        "adapters": c * setup.rank * len(setup.targets),
    }


def backward_extra(setup: LayerSetup, tokens: int) -> int:
    """Bytes at a layer's worst moment in backward beyond those it keeps.

    In the MLP: the incoming gradient, those of silu(gate) and up while that of their product is still there
    (its own saved tensor has just gone), and the weight gradient of `down`. Without a fused attention
    kernel, if that is more: the gradients of probabilities and scores, when the MLP's tensors have gone.
    """
    shape, c = setup.shape, setup.itemsize
    residual, inner = c * shape.hidden, c * shape.intermediate
    freed_product = setup.needs_input("down_proj") * inner
    mlp = (residual + 3 * inner - freed_product) * tokens
    mlp += setup.trained * residual * shape.intermediate
    if setup.flash:
        return mlp
    kept, scores = kept_by_layer(setup), shape.heads * setup.seq
    copy = 0 if c == 4 else c * scores
    attention = (residual + c * shape.q_size + 8 * scores - copy - kept["MLP"] - kept["norms"] // 2) * tokens
    attention += setup.trained * residual * (3 * shape.intermediate + shape.q_size)
    return max(mlp, attention)


def follow(
    setup: LayerSetup, tokens: int, segments: tuple[Segment, ...], labelled: int | None, gradients: dict[str, int],
    held: bool,
) -> dict[str, Counter]:  # fmt: skip
    """Moment → bytes of each component that comes and goes: gradients, activations by kind, logits, buffers.

    Args:
        tokens: of one forward pass.
        segments: of layers, each recomputed from a checkpoint or kept.
        labelled: tokens with a label, whose logits are made in chunks; None: transformers' own loss, all at once.
        gradients: bytes of those of one "layer", the embedding "table" (and so of an untied head), the last "norm".
        held: gradients are there during forward already, from earlier passes of an accumulated batch.
    """
    shape, c = setup.shape, setup.itemsize
    kept = [_kept_in_layer(setup, tokens, i) for i in range(shape.layers)]
    checkpoint = c * shape.hidden * tokens
    table = gradients["table"]
    everything = shape.layers * gradients["layer"] + gradients["norm"] + table * (1 if shape.tied else 2)

    stored, before = Counter(), {}  # kept from forward, in total and before each segment
    for segment in segments:
        before[segment] = stored.copy()
        if segment.recompute:
            stored[PREFIX + "checkpoints"] += checkpoint
        else:
            stored += sum(kept[segment.start : segment.stop], Counter())
    stored[PREFIX + "norms"] += (4 * shape.hidden + 4 + 2 * setup.trained * c * shape.hidden) * tokens  # the last

    moments = {}

    def note(name, alive, made, **more):
        moments[name] = Counter(alive)
        moments[name].update(more, gradients=everything if held else made)

    if labelled is not None:
        for name, more in _chunked_loss(setup, checkpoint, labelled).items():
            note(name, stored, 0, **more)
    else:
        # log-softmax, its incoming and its outgoing gradient, all in fp32
        note("loss", stored, 0, logits=12 * shape.vocab * tokens)
        if setup.trained:
            note("backward of the head", stored, table, logits=c * shape.vocab * tokens, buffers=checkpoint)
    made = table * setup.trained + gradients["norm"]
    for segment in reversed(segments):
        for i in reversed(range(segment.start, segment.stop)):
            alive = sum(kept[segment.start : i + 1], before[segment])
            if segment.recompute:
                alive[PREFIX + "checkpoints"] += checkpoint
                if c == 4:  # the first norm's input is the checkpoint itself
                    alive[PREFIX + "norms"] -= checkpoint if segment.start or setup.trained else 0
            note(f"backward of layer {i}", alive, made, buffers=backward_extra(setup, tokens))
            made += gradients["layer"]
    if setup.trained:
        # The table's gradient from the embedding is dense, as large as the table; a tied one is summed with the
        # head's into a third tensor.
        copies = (2 if shape.tied else 0) + held
        note("backward of the embedding", {}, everything, buffers=copies * table + checkpoint)
    return moments


def _kept_in_layer(setup: LayerSetup, tokens: int, index: int) -> Counter:
    kept = Counter({PREFIX + kind: count * tokens for kind, count in kept_by_layer(setup).items()})
    if index == 0 and not setup.trained:  # a frozen embedding: nothing before the first adapter has a gradient
        kept[PREFIX + "norms"] -= (4 * setup.shape.hidden + 4) * tokens
    return kept


def _chunked_loss(setup: LayerSetup, hidden: int, labelled: int) -> dict[str, dict[str, int]]:
    """Moment → logits and buffers of `nn.loss`; `hidden`: bytes of the last norm's output."""
    shape, c = setup.shape, setup.itemsize
    table = shape.table_parameters
    chunk = min(labelled, max(1, CHUNK_BYTES // (4 * shape.vocab)))
    following = min(chunk, labelled - chunk)
    # A chunk's logits and probabilities are still there when the next one's logits are made.
    logits = shape.vocab * ((8 * chunk + 4 * following) if c == 4 else (10 * chunk + 6 * following))
    rows = (c + 4) * shape.hidden * labelled  # the rows with a label, and their gradient in fp32
    buffers = rows + c * shape.hidden * chunk
    if not setup.trained:
        return {"loss": {"logits": logits, "buffers": buffers + hidden}}  # the norm's output is still in use
    buffers += 4 * table + (c if c == 4 else 4 + c) * table  # the head's gradient in fp32, a chunk's part of it
    head = 8 * table + (c * table if c == 2 else 0) + rows
    return {"loss": {"logits": logits, "buffers": buffers}, "backward of the head": {"buffers": head}}
