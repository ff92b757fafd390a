"""handtuned: train big models on small memory, with kernels written by hand.

Start with `handtuned.quant` (NF4), `handtuned.nn` (LoRA, checkpointing), `handtuned.amp`
(mixed precision), `handtuned.optim` (AdamW, schedule) and `handtuned.memory` (what fits where).
"""

import os

__version__ = "0.1.0"
__all__ = ["__version__", "analyze_lora_params", "analyze_memory_savings", "memory"]


def __getattr__(name: str):
    # The memory package is imported when it is asked for: `handtuned --version` needs no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    memory = import_module(f"{__name__}.memory")
    return memory if name == "memory" else getattr(memory, name)


if os.environ.get("HANDTUNED_BACKEND", "").startswith("sm_"):
    # A process that is to run its kernels in the emulator does so from the first import on.
    from .gpu import emulate_process

    emulate_process()
