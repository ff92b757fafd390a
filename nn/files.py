"""Files that are either whole or absent: written under a temporary name, then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def in_use(path: Path) -> bool:
    """Whether something stands there that must not be written over: a file, or a directory that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block ends without error."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends without error.

    FileExistsError: `path` exists and is not an empty directory, or has become one while the block ran.
    """
    path = Path(path)
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError:
            _check_free(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_free(path: Path) -> None:
    if in_use(path):
        raise FileExistsError(f"{path} exists already and is not empty")


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors in safetensors format (metadata `{"format": "pt"}`), whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(ready, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{path} cannot be written: {error}") from error
        temporary.chmod(mode)  # safetensors lets the owner alone read what it writes, whatever the umask
