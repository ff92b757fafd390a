"""Quantize every linear layer of a model."""

from torch import nn

from .linear import NF4Linear


def quantize_model(model, skip=("lm_head",), block_size=64, double_quant=True, compute_dtype=None):
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or id(module.weight) in tied or name.split(".")[-1] in skip:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear.from_linear(module, block_size, double_quant, compute_dtype))
    return model
