"""Which layers of a language model text trains: a few tokens go through it, forward and backward.

A vision tower stays idle without an image, layers that borrow another layer's keys leave their own unused, and what
only chooses (the index of sparse attention) has no gradient. An adapter there would never change.
"""

import re

import torch
from torch import nn

from .names import unwrapped

LENGTHS = 16, 256  # tokens of a first try, and of a second for what takes only long texts (compressed attention)


def idle_layers(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """The paths of those `layers` (path → module) whose output gets no gradient from the logits of a few tokens.

    Of experts that stand in one list, each counts as reached if one is. Empty if the model does not make logits of
    token ids, or is on the meta device.
    """
    model, reached, idle = unwrapped(model), set(), set()
    for length in LENGTHS if _makes_text(model) else ():
        reached |= _reached(model, set(layers.values()) - reached, _tokens(model.config, length))
        kinds = {_kind(path) for path, module in layers.items() if module in reached}
        idle = {path for path in layers if _kind(path) not in kinds}
        if not idle:
            break
    return idle


def _reached(model: nn.Module, layers: set[nn.Module], ids: torch.Tensor) -> set[nn.Module]:
    """Those of the layers whose output has a gradient."""
    marks: list[tuple[nn.Module, torch.Tensor]] = []

    def watch(module, inputs, output):
        tensors = output if isinstance(output, tuple) else (output,)  # a router's logits, weights and choices
        marks.append((module, torch.zeros((), device=tensors[0].device, requires_grad=True)))
        marked = tuple(t + marks[-1][1].to(t.dtype) if t.is_floating_point() else t for t in tensors)
        return marked if isinstance(output, tuple) else marked[0]

    hooks = [module.register_forward_hook(watch) for module in layers]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            ids = ids.to(next(model.parameters()).device)
            total = model.eval()(input_ids=ids, use_cache=False).logits.float().square().mean()
            tensors = [mark for _, mark in marks]
            gradients = torch.autograd.grad(total, tensors, allow_unused=True) if total.requires_grad and marks else ()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return {module for (module, _), gradient in zip(marks, gradients, strict=False) if gradient is not None}


def _kind(path: str) -> str:
    """The path, the number of an expert replaced: the last of several numbers."""
    return re.sub(r"^(.*\.\d+\.(?:.*\.)?)\d+(?=\.|$)", r"\1*", path)


def _makes_text(model: nn.Module) -> bool:
    config, head = getattr(model, "config", None), getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return False
    return not any(p.is_meta or hasattr(p, "full_tensor") for p in model.parameters())


def _tokens(config, length: int) -> torch.Tensor:
    """(1, length or half the context) ids from all over the vocabulary, none of an image or the end of a turn."""
    text = config.get_text_config()
    settings = [item for part in (config, text) for item in part.to_dict().items()]
    special = {value for name, value in settings if "token" in name and isinstance(value, int)}
    ids = [i for i in range(text.vocab_size) if i not in special]
    context = getattr(text, "max_position_embeddings", None) or 0
    length = min(length, context // 2) if context > 1 else length  # some models count positions from 2
    return torch.tensor([[ids[i * len(ids) // length] for i in range(length)]])
