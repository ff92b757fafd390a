"""Quantize the linear layers and the experts of a model, or load a checkpoint with them quantized.

A model of 7 billion parameters is 14 GB in bf16 and 4 GB in NF4. Loading first and quantizing then needs both at
once. `load_quantized` starts with the model on the meta device, and every tensor of a shard goes straight to its place:
a linear layer's weight as NF4, an expert's too, anything else as it is. The most that is held is what is done so far,
plus one shard (mapped from the file, so the system can drop its pages), plus one weight.

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    load_quantized(model, directory)
"""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from .conversion import Conversion
from .experts import NF4Experts, dense_experts, expert_weights, experts_layers, projections, quantize_experts
from .linear import FrozenNF4, NF4Linear, dense_layer, lies_transposed
from .mxfp4 import MXFP4Experts
from .nf4 import FACTS, NF4Tensor, check_options, quantize_nf4
from .readers import listed, new_heads, weights_read

WIDE = ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules")  # of a class of transformers; the latter in fp16 alone
BAR_FROM = 250_000_000  # parameters from which a progress bar is shown


def quantize_model(
    model: nn.Module, skip: Sequence[str] = ("lm_head",), block_size: int = 64, double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """Replace every `nn.Linear` that is not skipped by an NF4Linear, and the fused expert weights of transformers'
    mixtures of experts by NF4Experts, in place, one after the other.

    Left alone besides `skip`: an output layer (what a Hugging Face model calls its output embeddings, and any layer
    that shares its weight with an `nn.Embedding`), the new head of a classifier, layers that a Hugging Face class wants
    in fp32, subclasses of nn.Linear (but Falcon's), and layers whose weight the model's code reads instead of calling
    them (a warning names those). GPT-2's `Conv1D` is a linear layer with its weight transposed and is quantized too.
    Layers that are NF4 already stay as they are, so calling again changes nothing. A model on the meta device stays
    there, ready for `load_quantized`. Expert weights that transformers' experts interface does not reach stay dense,
    and a warning gives their share.

    Args:
        skip: layers to leave, by path or by consecutive parts of one: "lm_head", "mlp.down_proj" (in every
            block), "vision_tower" (everything below). Whole parts only: "proj" does not skip "q_proj".
        block_size, double_quant, compute_dtype: as for `NF4Linear`.

    Returns `model`.

    Raises:
        TypeError: `skip` is not a sequence, or a single string.
        ValueError: nothing to quantize; an entry of `skip` that names no module; a weight that is not finite
            (the layer is named, and those before it are quantized already).
    """
    check_options(block_size, compute_dtype)
    (targets, read), experts = linear_layers(model, skip), _experts(model, skip)
    options, parameters = (block_size, double_quant, compute_dtype), sum(p.numel() for p in model.parameters())
    if targets and read:
        share = sum(p.numel() for layer in read.values() for p in layer.parameters()) / parameters
        warnings.warn(f"left dense: {listed(read)} with {share:.1%} of the parameters, whose weights the model's code "
                      "reads itself", stacklevel=1)  # fmt: skip
    if not targets and not experts and not any(isinstance(module, FrozenNF4) for module in model.modules()):
        hint = "; for a single layer use NF4Linear.from_linear" if is_linear(model) else ""
        raise ValueError(f"model ({type(model).__name__}) must hold an nn.Linear that is not skipped{hint}")
    made: dict[int, NF4Linear] = {}
    for path, linear in _progress([*targets, *experts], parameters):
        if (path, linear) in experts:
            quantize_experts(linear, options, path)
            continue
        made[id(linear)] = made.get(id(linear)) or _packed(linear, options, path)
        model.set_submodule(path, made[id(linear)])
    # Else transformers would take codes apart as it does dense experts, when it saves the model.
    if experts and not hasattr(model, "dense_conversions"):
        model.dense_conversions, model._weight_conversions = getattr(model, "_weight_conversions", None), []
    left = {path: found for path, found in dense_experts(model).items() if not _skipped(model, path, skip)}
    if left and (targets or experts):
        share = sum(count for _, count in left.values()) / parameters
        kinds = ", ".join(sorted({kind for kind, _ in left.values()}))
        warnings.warn(f"{share:.1%} of the parameters stay dense: expert weights of {kinds}, which transformers' "
                      f"experts interface does not reach", stacklevel=2)  # fmt: skip
    return model


def _packed(linear: nn.Module, options: tuple, path: str) -> NF4Linear:
    plain = linear
    if is_conv1d(linear):
        plain = dense_layer(nn.Linear, linear.weight.detach().t(), linear.bias, linear.training)
    layer = NF4Linear.from_linear(plain, *options, name=path)
    layer.dense_class = type(linear)
    return layer


def linear_layers(model: nn.Module, skip: Sequence[str]) -> tuple[list[tuple[str, nn.Module]], dict[str, nn.Module]]:
    """The paths and layers that `quantize_model` replaces, a layer reached by several paths with each; and path → layer
    of those that stay dense because the model's code reads their weights."""
    if isinstance(skip, str) or not isinstance(skip, Collection):
        what = "the string " if isinstance(skip, str) else ""
        raise TypeError(f"skip must be a sequence of names, got {what}{skip!r}")
    paths = dict(model.named_modules(remove_duplicate=False))
    for name in skip:
        if name != "lm_head" and not any(path and _within(path, name) for path in paths):
            raise ValueError(f"skip names {name!r}, which is not part of any module's path in {type(model).__name__}")
    keep = {id(module.weight) for module in paths.values() if isinstance(module, nn.Embedding)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    keep |= {id(output), id(getattr(output, "weight", None))}
    whole = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has the attributes of what it wraps
    heads = {id(part) for head in new_heads(whole) for part in whole.get_submodule(head).modules()}
    layers = {
        path: module
        for path, module in paths.items()
        if path and is_linear(module) and not keep & {id(module), id(module.weight)}
        if not _skipped(model, path, skip) and id(module) not in heads
    }
    read = {path: layers.pop(path) for path in sorted(weights_read(model, layers))}
    return list(layers.items()), read


def _experts(model: nn.Module, skip: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The paths and layers whose fused expert weights `quantize_model` replaces."""
    return [
        (path, layer)
        for path, layer in experts_layers(model)
        if not any(_skipped(model, f"{path}.{child}", skip) for child in projections(layer))
    ]


def _skipped(model: nn.Module, path: str, skip: Sequence[str]) -> bool:
    kept = any(_within(f"{path}.weight", name) for kind in WIDE for name in getattr(model, kind, None) or ())
    return kept or any(_within(path, name) for name in skip)


def _within(path: str, name: str) -> bool:
    return f".{name}." in f".{path}."


def is_linear(module: nn.Module) -> bool:
    """Whether it is exactly nn.Linear, Falcon's own name for it, or the transposed Conv1D of GPT-2."""
    kind = type(module)
    return kind is nn.Linear or is_conv1d(module) or (kind.__name__ == "FalconLinear" and issubclass(kind, nn.Linear))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight lies as (in, out)."""
    return lies_transposed(type(module))


def _progress(targets: list, parameters: int) -> Iterator:
    if parameters >= BAR_FROM:
        with contextlib.suppress(ImportError):
            from tqdm.auto import tqdm

            return iter(tqdm(targets, desc="quantizing", unit="layer"))
    return iter(targets)


def load_quantized(
    model: nn.Module, files: str | Path | Sequence[str | Path], skip: Sequence[str] | None = ("lm_head",),
    block_size: int = 64, double_quant: bool = True, compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rename: Callable[[str], str] | None = None,
    requantize: bool = False,
) -> nn.Module:  # fmt: skip
    """Fill a model on the meta device from safetensors files, its linear layers in NF4.

    Layers are chosen as `quantize_model` chooses them. A weight that the files hold in NF4 already (ours or
    bitsandbytes') is taken as it is, but for one that the model fuses with others; FP8 is decoded. Tied weights stay
    tied. Buffers that no file holds and the model computes itself (rotary frequencies) are computed again by the
    model's own `_init_weights`.

    Args:
        model: built under `torch.device("meta")`; filled in place.
        files: safetensors files, or a directory: of it what its index names, else `model.safetensors`, else all.
        skip, block_size, double_quant, compute_dtype: as for `quantize_model`; `skip` None: nothing is quantized, and
            what the files hold in NF4 is decoded.
        dtype: what the other floating-point tensors are cast to; None: as in the files.
        rename: gives the model's name for a name in the files, where they differ; None: as transformers renames and
            fuses them, for a model of its own.
        requantize: make NF4 of experts in MXFP4 too, which are else kept as they are.

    Returns `model`.

    Raises:
        FileNotFoundError: no safetensors file.
        ValueError: a tensor that the model needs and no file holds, one that the files hold and the model
            does not know, a wrong shape, or a weight that is not finite; all of a kind are named together.
    """
    from safetensors import safe_open

    if not all(parameter.is_meta for parameter in model.parameters()):
        raise ValueError('model must have its parameters on the meta device: build it under torch.device("meta")')
    paths = _shards(files)
    linear, experts = ([], []) if skip is None else (linear_layers(model, skip)[0], _experts(model, skip))
    transposed = {path for path, layer in linear if is_conv1d(layer)}
    fused = {f"{path}.{child}" for path, layer in experts for child in projections(layer)}
    shards = [safe_open(str(path), framework="pt") for path in paths]
    keys = [key for shard in shards for key in shard.keys()]  # noqa: SIM118  (no mapping)
    conversion = Conversion(model, keys, fused, rename, decode=skip is None)
    everything = set(conversion.names.values())
    if skip is not None:
        options = block_size, double_quant, compute_dtype
        quantize_model(model, skip, *options)
        for path, layer in [*model.named_modules()]:
            if is_linear(layer) and f"{path}.weight.{FACTS}" in everything:  # in NF4 it is taken so
                model.set_submodule(path, _packed(layer, options, path))
    target = _Target(model, torch.device(device), dtype)
    weights, in_mxfp4 = expert_weights(model).keys(), {}
    in_nf4: dict[str, dict[str, torch.Tensor]] = {}  # layer → what the files hold of it in NF4
    while shards:
        shard = shards.pop(0)  # and drop it when it is done: what it maps counts as memory held
        for key in shard.keys():  # noqa: SIM118
            for name, expert, tensor in conversion.take(key, shard.get_tensor(key)):
                layer, part = re.fullmatch(r"(.+)\.weight(\..+)?|.*", name).groups()
                stem, _, kind = name.rpartition("_")
                if stem in weights and kind in ("blocks", "scales"):
                    in_mxfp4.setdefault(stem, {})[kind] = tensor.to(target.device, copy=True)
                    if len(in_mxfp4[stem]) == 2:
                        experts = MXFP4Experts(**in_mxfp4.pop(stem), dtype=dtype or torch.bfloat16)
                        target.put_mxfp4(stem, experts, requantize)
                elif name in target.experts:
                    target.quantize_experts(name, expert, tensor)
                elif layer not in target.layers:
                    target.put(name, tensor)
                elif part or f"{name}.{FACTS}" in everything:
                    in_nf4.setdefault(layer, {})[name] = tensor.clone()
                else:
                    target.quantize(layer, tensor.t() if layer in transposed else tensor, double_quant)
    for layer, state in in_nf4.items():
        target.layers[layer].quantized = NF4Tensor.from_state_dict(state, layer + ".").to(target.device)
    target.finish()
    return model


def _shards(files) -> list[Path]:
    if isinstance(files, (str, Path)):
        place, single = Path(files), Path(files) / "model.safetensors"
        index = place / f"{single.name}.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [place / name for name in sorted(names)]
        else:
            files = [single] if single.is_file() else sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    paths = [Path(path) for path in files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"files must name safetensors files, got {', '.join(missing) or 'none'}")
    return paths


class _Target:
    """The places of a meta model, by the names that its state dict would have."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype | None):
        self.model, self.device, self.dtype = model, device, dtype
        modules = dict(model.named_modules(remove_duplicate=False))
        self.layers = {path: module for path, module in modules.items() if isinstance(module, NF4Linear)}
        self.experts = {path: module for path, module in modules.items() if isinstance(module, NF4Experts)}
        self.waiting: dict[str, set[int]] = {}  # experts of those that have begun to come
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}  # every place of a tied parameter
        self.unknown: list[str] = []
        by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
        for path, module in modules.items():
            temporary = module._non_persistent_buffers_set
            own = module._parameters | {k: v for k, v in module._buffers.items() if k not in temporary}
            for name, tensor in own.items():
                if tensor is not None:
                    places = by_identity.setdefault(id(tensor), [])
                    places.append((module, name))
                    self.places[f"{path}.{name}" if path else name] = places

    def quantize(self, path: str, weight: torch.Tensor, double_quant: bool) -> None:
        layer, name = self.layers[path], f"{path}.weight"
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(f"{name} must be {layer.out_features} × {layer.in_features}, got {tuple(weight.shape)}")
        layer.quantized = quantize_nf4(weight.to(self.device), layer.block_size, double_quant, name=name)

    def quantize_experts(self, name: str, expert: int | None, weight: torch.Tensor) -> None:
        experts = self.experts[name]
        if expert is None and weight.shape != experts.shape:
            raise ValueError(f"{name} must be {tuple(experts.shape)}, got {tuple(weight.shape)}")
        waiting = self.waiting.setdefault(name, set(range(len(experts))))
        for e, part in enumerate(weight) if expert is None else [(expert, weight)]:
            if e not in waiting:
                raise ValueError(f"{name} has {len(experts)} experts, the files hold one more, or twice: {e}")
            experts.put(e, part.to(self.device), name=f"{name}[{e}]")
            waiting.remove(e)

    def put_mxfp4(self, name: str, experts: MXFP4Experts, requantize: bool) -> None:
        if requantize and name in self.experts:
            for e in range(len(experts)):
                self.quantize_experts(name, e, experts.decoded(e).t())
            return
        experts.take_place(self.model, name)
        self.places = {key: at for key, at in self.places.items() if not f"{key}.".startswith(f"{name}.")}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self.places:
            self.unknown.append(name)
            return
        for module, attribute in self.places[name]:
            old = getattr(module, attribute)
            if old.shape != tensor.shape:
                raise ValueError(f"{name} must be {tuple(old.shape)}, got {tuple(tensor.shape)}")
        is_parameter = isinstance(old, nn.Parameter)
        dtype = self.dtype if self.dtype and is_parameter and tensor.is_floating_point() else tensor.dtype
        kinds = WIDE[: {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 0) * is_parameter]
        if any(_within(name, part) for kind in kinds for part in getattr(self.model, kind, None) or ()):
            dtype = torch.float32
        tensor = tensor.to(self.device, dtype, copy=True)  # not a view that would keep the whole shard
        if is_parameter:
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for module, attribute in self.places[name]:
            setattr(module, attribute, tensor)

    def finish(self) -> None:
        """Compute the buffers that are in no file, and raise if anything is left over or missing."""
        missing = [n for n, places in self.places.items() if getattr(*places[0]).is_meta]
        missing += [f"{name}[{e}]" for name, waiting in self.waiting.items() for e in sorted(waiting)]
        if missing or self.unknown:
            raise ValueError(f"files must hold the model's tensors, and no others: {len(missing)} missing "
                             f"{missing[:5]}, {len(self.unknown)} unknown {self.unknown[:5]}")  # fmt: skip
        for parameter in self.model.parameters():
            parameter._is_hf_initialized = True  # transformers' own mark: do not initialize again
        for path, module in self.model.named_modules():
            buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
            if not buffers:
                continue
            # A part of a model that is one of its own (the text half) knows its settings itself.
            parents = [self.model.get_submodule(path[:at]) for at, c in enumerate(f"{path}.") if c == "."]
            owner = next((m for m in reversed([self.model, *parents]) if hasattr(m, "_init_weights")), None)
            results = []
            for fill in (0, 1):  # what nothing computes keeps them
                for name, buffer in buffers.items():
                    module._buffers[name] = torch.full_like(buffer, fill, device=self.device)
                if owner is not None:
                    owner._init_weights(module)
                results.append({name: module._buffers[name].clone() for name in buffers})
            unset = [f"{path}.{name}" for name in buffers if not torch.equal(*(result[name] for result in results))]
            if unset:
                raise ValueError(f"the model does not recompute its buffers {unset}, which no file holds; build it "
                                 "with its buffers off the meta device")  # fmt: skip
