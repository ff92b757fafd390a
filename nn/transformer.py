"""A decoder of the Llama family, small enough to read, and the documents' checkpointed layer.

    block(x) = h + down( silu(gate n₂(h)) · up n₂(h) )        h = x + o( attention( q n₁(x), k n₁(x), v n₁(x) ) )

    RMSNorm      n(x) = g · x / √(mean(x²) + ε): LayerNorm without mean and shift, in fp32 whatever x is
    rotary       q and k of position p are turned by the angles p·θ^(−2i/d), pair i of d/2, so that
                 qᵀk depends on the distance of two positions only
    grouped      H query heads share K ≤ H key/value heads, H/K to one: the key/value cache is K/H as large
    SwiGLU       one of the two inner projections passes through silu(z) = z·σ(z) and gates the other

Modules and parameters bear transformers' names (`model.layers.0.self_attn.q_proj.weight`, …), so that
LoRA and NF4 find their targets here too, and the weights of any plain Llama load unchanged.

Sources: Zhang & Sennrich 2019 (RMSNorm); Su et al. 2021, section 3.4 (rotary, in the two-halves order of
the published weights); Ainslie et al. 2023 (grouped queries); Shazeer 2020 (SwiGLU); Touvron et al. 2023.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import checkpoint
from .checkpoint_plan import Plan, checkpoint_sequential


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension; normalized in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, (..., head_dim) each in fp32, for integer positions (...); both halves are equal."""
    rates = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None].float() * rates
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pair (i, i + d/2) of x (B, heads, T, d) by its position's angles; cos, sin are (T, d) or (B, 1, T, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped heads; no biases."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, d_model, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (project(x).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_kv_heads < self.num_heads)
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))


class SwiGLU(nn.Module):
    """down( silu(gate x) · up x ), no biases."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """One layer of a Llama: attention and SwiGLU, each after an RMSNorm and with a residual around it.

    Args:
        d_model, num_heads, d_ff: width of the residual stream, query heads, width inside the SwiGLU.
        num_kv_heads: key/value heads, a divisor of num_heads (default: num_heads).
        head_dim: width of a head, even (default: d_model / num_heads).
        rope_theta: base of the rotary angles.
        norm_eps: ε of the norms.

    ValueError: sizes that do not divide, or no heads.
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, num_kv_heads: int | None = None,
                 head_dim: int | None = None, rope_theta: float = 10_000.0, norm_eps: float = 1e-6):  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if heads < 1:
                raise ValueError(f"{name} must be at least 1, got {heads}")
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads = {num_heads}, got {d_model}")
        head_dim = d_model // num_heads if head_dim is None else head_dim
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim must be even, as rotary positions turn pairs, got {head_dim}")
        self.rotary_sizes = head_dim, rope_theta
        self.input_layernorm = RMSNorm(d_model, norm_eps)
        self.self_attn = Attention(d_model, num_heads, num_kv_heads, head_dim)
        self.post_attention_layernorm = RMSNorm(d_model, norm_eps)
        self.mlp = SwiGLU(d_model, d_ff)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """x: (B, T, d_model) → the same shape; `rotary_angles` by default those of positions 0 … T − 1."""
        if rotary is None:
            positions = torch.arange(x.shape[1], device=x.device)
            rotary = rotary_angles(positions, *self.rotary_sizes)
        h = x + self.self_attn(self.input_layernorm(x), *rotary)
        return h + self.mlp(self.post_attention_layernorm(h))


class Transformer(nn.Module):
    """A whole causal language model: tokens in, logits out. `options` are those of `TransformerBlock`; with
    `tie_embeddings` the output head is the embedding table."""

    def __init__(self, vocab_size: int, num_layers: int, d_model: int, num_heads: int, d_ff: int,
                 tie_embeddings: bool = False, **options):  # fmt: skip
        super().__init__()
        blocks = [TransformerBlock(d_model, num_heads, d_ff, **options) for _ in range(num_layers)]
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(vocab_size, d_model), "layers": nn.ModuleList(blocks),
                                    "norm": RMSNorm(d_model, blocks[0].input_layernorm.eps)})  # fmt: skip
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, segments: str | int | Plan | None = None) -> torch.Tensor:
        """tokens: (B, T) int64 → logits (B, T, vocab_size); `segments` as for `checkpoint_sequential`, None: no
        checkpoints."""
        x = self.model.embed_tokens(tokens)
        if segments is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            rotary = rotary_angles(positions, *self.model.layers[0].rotary_sizes)
            for layer in self.model.layers:
                x = layer(x, rotary)
        else:
            x = checkpoint_sequential(self.model.layers, x, segments)
        return self.lm_head(self.model.norm(x))


class CheckpointedTransformerLayer(nn.Module):
    """The documents' layer: attention and feed-forward after LayerNorms, each a checkpoint of its own in training.

    With n such layers 2n boundaries stay: memory O(n) with a small factor, not O(√n). Unlike the documents' version
    it does not have attention return its (B, T, T) weights, which nobody reads and which keep it from the fused
    kernels. `d_ff` is the width of the feed-forward part; with `causal` no position looks at later ones.

    ValueError: `num_heads` does not divide `d_model`.
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, causal: bool = False):
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must be at least 1 and divide d_model = {d_model}, got {num_heads}")
        self.self_attn = nn.MultiheadAttention(d_model, num_heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.causal = causal

    def forward(self, x: torch.Tensor, use_checkpoint: bool = True) -> torch.Tensor:
        """x: (B, T, d_model) → the same shape. Checkpoints in training only, and only if `use_checkpoint`."""
        for block in (self._attn_block, self._ffn_block):
            x = x + (checkpoint(block, x) if use_checkpoint and self.training else block(x))
        return x

    def _attn_block(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.self_attn(normed, normed, normed, attn_mask=mask, is_causal=self.causal, need_weights=False)[0]

    def _ffn_block(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(self.norm2(x))
