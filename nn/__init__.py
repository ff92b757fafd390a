"""LoRA and its variants, adapters on disk, gradient checkpointing, transformer blocks."""

from .adapters import load_adapter, save_adapter
from .checkpoint import checkpoint, manual_checkpoint_forward
from .checkpoint_plan import checkpoint_sequential
from .inject import add_adapter, apply_lora_to_model, disable_lora, mark_only_lora_as_trainable
from .lora import LoRALayer, LoRALinear
from .loss import linear_cross_entropy
from .merge import merge_lora, unmerge_lora
from .multi import delete_adapter, lora_parameters, set_adapter
from .transformer import CheckpointedTransformerLayer, TransformerBlock

__all__ = ["CheckpointedTransformerLayer", "LoRALayer", "LoRALinear", "TransformerBlock", "add_adapter",
           "apply_lora_to_model", "checkpoint", "checkpoint_sequential", "delete_adapter", "disable_lora",
           "linear_cross_entropy", "load_adapter", "lora_parameters", "manual_checkpoint_forward",
           "mark_only_lora_as_trainable", "merge_lora", "save_adapter", "set_adapter", "unmerge_lora"]  # fmt: skip
