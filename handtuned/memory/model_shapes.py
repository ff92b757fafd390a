"""The sizes of a decoder, from a config, a model, a well-known name, or a bare number of parameters."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

LLAMA_FAMILY = ("llama", "mistral", "qwen2")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: RMSNorm, rotary, grouped heads, SwiGLU."""

    name: str
    layers: int = 0  # 0: nothing is known but the number of parameters
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate: int = 0
    vocab: int = 0
    tied: bool = False  # the output head is the embedding table
    qkv_bias: bool = False  # q, k and v have biases (Qwen2)
    rounded: int | None = None  # count this many parameters instead of the true number ("7B" as in 7 · 10⁹)

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Projection → (outputs, inputs), of one layer."""
        h, q, kv, inner = self.hidden, self.q_size, self.kv_size, self.intermediate
        sizes = ((q, h), (kv, h), (kv, h), (h, q), (inner, h), (inner, h), (h, inner))
        return dict(zip(PROJECTIONS, sizes, strict=True)) if self.layers else {}

    @property
    def layer_parameters(self) -> int:
        biases = (self.q_size + 2 * self.kv_size) * self.qkv_bias
        return sum(out * into for out, into in self.linears.values()) + biases + 2 * self.hidden

    @property
    def table_parameters(self) -> int:
        """The embedding table, which is also the size of an untied head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        if self.rounded is not None:
            return self.rounded
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.table_parameters + self.hidden


_KNOWN = (
    Shape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied=True),
    Shape("smollm2-360m", 32, 960, 15, 5, 64, 2560, 49152, tied=True),
    Shape("smollm2-1.7b", 24, 2048, 32, 32, 64, 8192, 49152, tied=True),
    Shape("tinyllama-1.1b", 22, 2048, 32, 4, 64, 5632, 32000),
    Shape("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, tied=True, qkv_bias=True),
    Shape("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, tied=True, qkv_bias=True),
    Shape("qwen2.5-3b", 36, 2048, 16, 2, 128, 11008, 151936, tied=True, qkv_bias=True),
    Shape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True),
    Shape("qwen1.5-7b", 32, 4096, 32, 32, 128, 11008, 151936, qkv_bias=True),
    Shape("qwen2.5-14b", 48, 5120, 40, 8, 128, 13824, 152064, qkv_bias=True),
    Shape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27648, 152064, qkv_bias=True),
    Shape("qwen2.5-72b", 80, 8192, 64, 8, 128, 29568, 152064, qkv_bias=True),
    Shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    Shape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, tied=True),
    Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
    Shape("llama-7b", 32, 4096, 32, 32, 128, 11008, 32000),
    Shape("llama-13b", 40, 5120, 40, 40, 128, 13824, 32000),
    Shape("llama-33b", 60, 6656, 52, 52, 128, 17920, 32000),
    Shape("llama-65b", 80, 8192, 64, 64, 128, 22016, 32000),
    Shape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
    Shape("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000),
)  # fmt: skip

PRESETS = {shape.name: shape for shape in _KNOWN}
PRESETS["smollm2"] = PRESETS["smollm2-135m"]
# Round numbers, as people (and the study documents) say them, with the layers of the nearest Llama.
for _name, _like in (("7b", "llama-7b"), ("13b", "llama-13b"), ("65b", "llama-65b"), ("70b", "llama-2-70b")):
    PRESETS[_name] = replace(PRESETS[_like], name=_name, rounded=int(_name[:-1]) * 10**9)


def shape_of(model) -> Shape:
    """The sizes of a `Shape`, a preset's name, a directory with a config.json, a transformers config (as an object or
    a dict), a module with such a `config`, or a number of parameters.

    Raises:
        ValueError: an unknown name, or an architecture other than the Llama family's.
        TypeError: anything else.
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (int, float)) and not isinstance(model, bool):
        if not 0 < model < float("inf"):
            raise ValueError(f"model as a number of parameters must be positive and finite, got {model}")
        return Shape(f"{model / 1e9:g}B parameters", rounded=int(model))
    if isinstance(model, str):
        if model.lower() in PRESETS:
            return PRESETS[model.lower()]
        file = Path(model).expanduser() / "config.json"
        if file.is_file():
            return replace(shape_of(json.loads(file.read_text(encoding="utf-8"))), name=model)
        if match := re.fullmatch(r"([\d.]+)\s*([mb])", model.lower()):
            return shape_of(float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]])
        raise ValueError(f"no model directory and no preset is called {model!r}; presets: {', '.join(PRESETS)}")
    config = SimpleNamespace(**model) if isinstance(model, Mapping) else getattr(model, "config", model)
    kind = getattr(config, "model_type", None)
    if kind is None and not hasattr(config, "num_hidden_layers") and not isinstance(model, Mapping):
        raise TypeError(
            f"model must be a model, a config, a name or a number of parameters, got {type(model).__name__}"
        )
    if kind not in LLAMA_FAMILY:
        raise ValueError(f"memory can be estimated for decoders of the Llama family ({', '.join(LLAMA_FAMILY)}), got "
                         f"a config of type {kind!r}; memory.measure works for any model")  # fmt: skip
    heads = config.num_attention_heads
    return Shape(
        name=getattr(config, "_name_or_path", "") or kind,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(getattr(config, "attention_bias", False)),
    )
