"""What of a model is not for 4 bits: layers whose weight its code reads in place of calling them, and new heads.

Mamba hands `self.out_proj.weight` to a fused kernel on a GPU and multiplies by `self.dt_proj.weight` itself, Gemma 3n
clamps a weight in place, RWKV divides some by powers of two. Which layers these are stands in the source of the classes
around them, also for what runs on another device than this one.
"""

import ast
import contextlib
import functools
import inspect
import re
import types
from collections.abc import Collection, Iterator

from torch import nn

OF_ANY_TENSOR = ("device", "is_cuda", "is_meta")  # packed codes know these as well as the weight does


def weights_read(model: nn.Module, layers: Collection[str]) -> set[str]:
    """Those of the `layers` (paths) whose weight the code of some module around them reads, its set-up apart."""
    found, layers = set(), set(layers)
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for root, name in _reads_of(type(module)):
            if root == "self":
                found |= layers & {prefix + name}
            else:  # of some module below, perhaps in a loop over blocks
                found |= {at for at in layers if at.startswith(prefix) and f".{at[len(prefix):]}".endswith(f".{name}")}
    return found


@functools.cache
def _reads_of(kind: type) -> set[tuple[str, str]]:
    """`_reads` in a class's methods that say ".weight" and have nothing to do with initialization."""
    methods = (inspect.unwrap(inspect.getattr_static(kind, name)) for name in dir(kind) if "init" not in name)
    reads = set()
    for method in methods:
        # torch's own modules stay as they are (nn.MultiheadAttention) or are asked when they run (base_layer.py)
        theirs = inspect.isfunction(method) and not method.__module__.startswith("torch.")
        if theirs and _says_weight(method.__code__):
            with contextlib.suppress(OSError, SyntaxError):  # no source: made at run time, or edited since
                source = inspect.getsource(method)
                reads |= {*_reads(ast.parse(f"if True:\n{source}" if source[0].isspace() else source))}
    return reads


def _says_weight(code: types.CodeType) -> bool:
    return "weight" in code.co_names or any(isinstance(c, types.CodeType) and _says_weight(c) for c in code.co_consts)


def _reads(node: ast.AST) -> Iterator[tuple[str, str]]:
    """("self", "a.b") for each `self.a.b.weight` in this tree, ("x", "a.b") for each `x.a.b.weight`."""
    parts = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "slow_but_exact" in ast.unparse(node.test):  # BLOOM's, true of no checkpoint
        parts = node.orelse
    elif isinstance(node, ast.Attribute) and node.attr in OF_ANY_TENSOR and isinstance(node.value, ast.Attribute):
        parts = [node.value.value]
    elif isinstance(node, ast.Attribute) and node.attr == "weight":
        root, _, name = ast.unparse(node.value).partition(".")
        if re.fullmatch(r"[\w.]+", name):
            yield root, name
    for part in parts:
        yield from _reads(part)


def listed(paths: Collection[str], most: int = 5) -> str:
    """How many layers these are and where, alike ones of different blocks once: for a message."""
    kinds = [re.sub(r"\.\d+(?=\.|$)", ".*", path).split(".") for path in paths]
    for depth in range(max(map(len, kinds)), 0, -1):
        shown = sorted({".".join(kind[:depth]) for kind in kinds})
        if len(shown) <= most:
            break
    return f"{len(paths)} layers ({', '.join(shown[:most])})"


def new_heads(model: nn.Module) -> list[str]:
    """What a transformers model has beside its base model, if that makes no logits over a vocabulary: a new head, which
    is trained whole."""
    base = getattr(model, "base_model", model)
    if base is model or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is not None:
        return []
    heads = {name: child for name, child in model.named_children() if child is not base}
    return [name for name, head in heads.items() if next(head.parameters(), None) is not None]
