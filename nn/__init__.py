"""LoRA layers, and how they enter a model."""

from .inject import (
    apply_lora_to_model,
    disable_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    unmerge_lora,
)
from .lora import LoRALayer, LoRALinear

__all__ = [
    "LoRALayer",
    "LoRALinear",
    "apply_lora_to_model",
    "disable_lora",
    "lora_parameters",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "unmerge_lora",
]
