"""Memory as it is really taken: `measure` for any function, and a training step for it to run.

On a CPU every live tensor storage is counted (`nn.live_memory`); on a GPU the caching allocator counts.
"""

import gc
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..amp import MasterWeights
from ..nn import apply_lora_to_model
from ..nn.checkpoint_layers import checkpoint_layers
from ..nn.live_memory import LiveMemory
from ..training.evaluation import CausalLM
from ..training.loop import OPTIMIZERS
from ..training.models import train_whole
from .breakdown import both, size


@dataclass(frozen=True)
class Measurement:
    """What a function took, in bytes on one kind of device."""

    before: int  # alive when it began
    peak: int  # most alive at any moment
    after: int  # alive when it returned, its result included
    result: Any = None  # what it returned
    history: tuple[int, ...] | None = None  # bytes alive after every change, if asked for

    @property
    def added(self) -> int:
        """Most bytes above those that were there before."""
        return self.peak - self.before

    def __str__(self):
        return f"peak {both(self.peak)}, {size(self.added)} above the {size(self.before)} that were there before"


def measure(function: Callable, *args, device: str | None = None, keep_history: bool = False, **kwargs) -> Measurement:
    """Run `function(*args, **kwargs)` and find the most memory that was in use by tensors.

    On a CPU every live tensor storage counts once however many views it has, from those that were there before to the
    last temporary; that slows the run down by some microseconds per operation. `device` is "cpu" or "cuda", by default
    the GPU if CUDA is in use in this process; `keep_history`: also keep the course of it (CPU only), for a picture.

    ValueError: another device, or a history of a GPU.
    """
    device = device or ("cuda" if torch.cuda.is_initialized() else "cpu")
    if device == "cpu":
        with LiveMemory("cpu", keep_history=keep_history) as memory:
            result = function(*args, **kwargs)
        before = memory.before
        history = tuple(before + added for added in memory.history) if keep_history else None
        return Measurement(before, before + memory.peak_added, before + memory.added, result, history)
    if device != "cuda" or keep_history:
        raise ValueError(f'device must be "cpu" or "cuda" (and history is for a CPU only), got {device!r}')
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*args, **kwargs)
    torch.cuda.synchronize()
    return Measurement(before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), result)


def loss_of(lm: CausalLM, batch: dict[str, torch.Tensor], dtype: torch.dtype, logits: str = "chunked") -> torch.Tensor:
    """The loss of a batch per token, as `finetune` computes it; or, with "full" logits, as transformers does."""
    with torch.autocast(lm.device.type, dtype=dtype, enabled=dtype != torch.float32):
        if logits == "full":
            return lm.model(**batch, use_cache=False).loss
        return lm.loss(batch) / batch["labels"].numel()


def training_step(model, method: str, batch: int, seq: int, checkpoint: bool | Collection[str] = False,
                  logits: str = "chunked", lora_r: int = 8, target_modules="all-linear", accumulation_steps: int = 1,
                  dtype: torch.dtype = torch.float32, adapt: Callable | None = None,
                  optimizer: str = "adamw") -> Callable[[], None]:  # fmt: skip
    """A function that does one step on random tokens: forward, loss, backward, optimizer; in 16 bits with FP32 masters.

    It has run once when it is returned, so that the optimizer's state is there. `model` is a transformers causal LM,
    its linears in NF4 if the method is "qlora", and is changed; `dtype` is that of the computation, by autocast; the
    rest is as for `estimate`.
    """
    model.requires_grad_(False)
    if method == "full":
        train_whole(model)
    else:
        (adapt or partial(apply_lora_to_model, rank=lora_r, target_modules=target_modules))(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if checkpoint:
        checkpoint_layers(model, None if checkpoint is True else checkpoint)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (batch, seq), device=parameters[0].device)
    lm, stepped = CausalLM(model, tokens[:1, :8]), OPTIMIZERS[optimizer](parameters, lr=1e-5)
    masters = MasterWeights(model, stepped)
    model.train()

    def step() -> None:
        for _ in range(accumulation_steps):
            loss_of(lm, {"input_ids": tokens, "labels": tokens}, dtype, logits).backward()
            masters.collect_gradients()
        stepped.step()
        masters.write_back()
        stepped.zero_grad(set_to_none=True)

    step()
    return step
