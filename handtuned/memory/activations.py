"""What one decoder layer keeps for backward, in bytes per token, and what its backward pass needs on top.

Counted operation by operation for the layer as transformers' Llama and `nn.TransformerBlock` run it.
With c bytes per value (2 or 4), h the hidden size, H and K the sizes of all query and key/value heads,
I the intermediate size, s the sequence length:

    norm (two)      the input in fp32: 4h (at c = 4 it is the residual stream itself), 1/rms: 4,
                    normed: ch if the norm's weight is trained, output: ch if a next linear needs it
    attention       q: cH, k, v: cK each, output: cH, log-sum-exp: 4 per head
      eager         k, v repeated to cH each, probabilities: 4s per head, and again cs at c = 2
    MLP             gate, silu(gate), up: cI each, product: cI if `down` needs it
    adapter         x Aᵀ: cr for each linear with an adapter

A linear needs its input only where the weight or an adapter is trained: a frozen weight's backward
pass is dx = dy W alone. So LoRA on few projections also keeps fewer activations.
"""

from dataclasses import dataclass

from .model_shapes import Shape

KINDS = ("checkpoints", "norms", "attention", "attention scores", "MLP", "adapters")


def korthikanti(batch: int, seq: int, hidden: int, heads: int, layers: int, flash: bool = False) -> int:
    """Bytes of activations of a GPT in 16 bits with dropout: s·b·h·(34 + 5·a·s/h) per layer, without the logits.

    With `flash` attention, which keeps no scores, s·b·h·34. For batch 1, sequence 2048 and the sizes of a
    7B model (4096, 32 heads, 32 layers) 28.5 GiB: the study documents' "28.5 G"; 8.5 GiB with flash.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2.
    """
    return layers * (34 * seq * batch * hidden + (0 if flash else 5 * heads * seq * seq * batch))


@dataclass(frozen=True)
class LayerSetup:
    """What decides a layer's bytes.

    Attributes:
        shape: its sizes.
        itemsize: c, bytes of a value in the forward pass.
        seq: tokens in a row.
        trained: the layer's own weights are trained.
        targets: projections with an adapter.
        rank: of the adapters.
        flash: attention by a fused kernel, which keeps no probabilities.
    """

    shape: Shape
    itemsize: int
    seq: int
    trained: bool
    targets: frozenset[str] = frozenset()
    rank: int = 0
    flash: bool = True

    def needs_input(self, *names: str) -> bool:
        return self.trained or any(name in self.targets for name in names)


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
