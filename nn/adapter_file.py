"""`adapter_model.safetensors`: read as a stranger's file, and its keys taken apart.

A safetensors file is eight bytes that give the length of a JSON header, the header (name → dtype,
shape, byte range), and the data. It cannot carry code. What it can carry is lies: lengths beyond
the file, shapes without data, names built like paths. All of it is checked before a tensor exists.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .adapter_config import short, unique

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_HEADER_BYTES = 25 * 2**20
DTYPES = {"F64": (torch.float64, 8), "F32": (torch.float32, 4), "F16": (torch.float16, 2), "BF16": (torch.bfloat16, 2)}
NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


@dataclass
class AdapterTensors:
    """The tensors of one adapter file.

    Attributes:
        lora_A, lora_B, magnitude: by the path of their layer; magnitude is DoRA's.
        base: by parameter name, weights of adapted layers themselves. PEFT adds these copies when the
            output head is adapted; they must equal the model's.
        whole: by parameter name, the weights of modules that are replaced whole.
    """

    lora_A: dict[str, torch.Tensor] = field(default_factory=dict)
    lora_B: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def read_adapter_tensors(directory: str | Path) -> AdapterTensors:
    """Read and check `directory/adapter_model.safetensors`.

    Raises:
        ValueError: missing, a pickle, truncated, with a damaged header, tensors that are not finite
            floating point numbers, names that PEFT does not write, half a pair, or ranks that differ
            within a pair; also tensors of methods that are not supported, by name.
    """
    path = Path(directory) / WEIGHTS_NAME
    tensors = read_safetensors(path)
    result = AdapterTensors()
    for key, tensor in tensors.items():
        _sort_in(result, path, key, tensor)
    halves = result.lora_A.keys() ^ result.lora_B.keys()
    if halves:
        raise ValueError(f"{path}: {listed(halves)} has only one of lora_A and lora_B")
    lost = result.magnitude.keys() - result.lora_A.keys()
    if lost:
        raise ValueError(f"{path}: {listed(lost)} has a lora_magnitude_vector but no lora_A")
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    for layer, A in result.lora_A.items():
        B = result.lora_B[layer]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
            raise ValueError(
                f"{path}: {layer}: lora_A must be (rank, in) and lora_B (out, rank), "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
    return result


KINDS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B",
         "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}  # fmt: skip
UNSUPPORTED = re.compile(r"(?:^|\.)(lora_embedding_[AB]|lora_[AB]\.bias|lora_\w+)(?:\.|$)")


def _sort_in(result: AdapterTensors, path: Path, key: str, tensor: torch.Tensor) -> None:
    if not NAME.fullmatch(key):
        raise ValueError(f"{path}: {short(key)} is no tensor name")
    if not key.startswith(PREFIX):
        raise ValueError(f"{path}: {short(key)} does not begin with {PREFIX!r}, as every key of a PEFT adapter does")
    name = key[len(PREFIX) :]
    for ending, kind in KINDS.items():
        if name.endswith(f".{ending}"):
            layer = name[: -len(ending) - 1]
            if layer in getattr(result, kind):
                raise ValueError(f"{path}: {layer} has two tensors for {kind}")
            getattr(result, kind)[layer] = tensor
            return
    unsupported = UNSUPPORTED.search(name)
    if unsupported:
        raise ValueError(f"{path}: {short(key)}: {unsupported[1]} in this place is not supported")
    kind, name = (result.base, name.replace(".base_layer.", ".")) if ".base_layer." in name else (result.whole, name)
    if name in kind:
        raise ValueError(f"{path}: {name} occurs twice")
    kind[name] = tensor


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Name → tensor (on the CPU, in memory of its own), everything checked first.

    Raises:
        ValueError: see `read_adapter_tensors`.
    """
    if not path.is_file():
        bin_file = path.with_suffix(".bin")
        if bin_file.exists():
            raise ValueError(f"{bin_file} is a pickle and can run any code when it is read; only {path.name} is")
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
                raise ValueError(f"{path} is a pickle under a false name; refused, for reading one can run any code")
            raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes, header of {length})")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {length} bytes is too large (at most {MAX_HEADER_BYTES})")
        entries = _check_header(path, file.read(length), size - 8 - length)
        tensors = {}
        for name, (dtype, shape, begin, end) in entries.items():
            file.seek(8 + length + begin)
            data = bytearray(file.read(end - begin))
            tensor = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{path}: {short(name)} holds NaN or infinite values")
            tensors[name] = tensor
    return tensors


def _check_header(path: Path, raw: bytes, data_bytes: int) -> dict[str, tuple]:
    """Name → (dtype, shape, begin, end), with the byte ranges covering the data once and without a gap."""

    def damaged(why):
        return ValueError(f"{path}: damaged header: {why}")

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(str(error) or type(error).__name__) from None
    if not isinstance(header, dict):
        raise damaged(f"it must be a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise damaged("__metadata__ must hold strings")
    entries = {}
    for name, info in header.items():
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged(f"{short(name)} must have dtype, shape and data_offsets")
        dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{path}: {short(name)} is of dtype {short(dtype)}, expected one of {', '.join(DTYPES)}")
        if not _is_sizes(shape) or len(shape) > 8 or not _is_sizes(offsets) or len(offsets) != 2:
            raise damaged(f"{short(name)} has shape {short(shape)} and data_offsets {short(offsets)}")
        torch_dtype, width = DTYPES[dtype]
        if offsets[1] - offsets[0] != math.prod(shape) * width or offsets[1] > data_bytes:
            raise damaged(
                f"{short(name)}: {dtype} of shape {short(shape)} does not fill the bytes {offsets} of {data_bytes} "
                "(truncated file?)"
            )
        entries[name] = (torch_dtype, shape, *offsets)
    position = 0
    for begin, end in sorted(entry[2:] for entry in entries.values()):
        if begin != position:
            raise damaged(f"tensors overlap or leave a gap at byte {min(begin, position)}")
        position = end
    if position != data_bytes:
        raise damaged(f"{data_bytes - position} bytes after the last tensor")
    return entries


def _is_sizes(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def listed(names) -> str:
    """The first few of some names, for a message."""
    shown = ", ".join(short(name) for name in sorted(names)[:5])
    return (shown or "none") + (f" and {len(names) - 5} more" if len(names) > 5 else "")
