"""`checkpoint-N` directories: all that a run needs to go on as if it had never stopped.

    adapter_model.safetensors, adapter_config.json     the adapter (PEFT's format)
    optimizer.safetensors                              AdamW's moments
    rng.safetensors                                    torch's generators (CPU, and each GPU)
    state.json                                         step, schedule, loss scale, parameter groups

The data order needs no file: it is a function of seed and step. A checkpoint is
written under a temporary name and renamed, so a `checkpoint-N` that exists is whole.
"""

import json
import re
import shutil
from pathlib import Path

import torch

from .nn.adapters import save_adapter
from .nn.files import whole_directory, write_json, write_safetensors
from .nn.inject import lora_layers


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def save_checkpoint(directory: Path, step: int, model, optimizer, schedule, scaler, keep: int, base_model: str) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest `keep`."""
    path = directory / f"checkpoint-{step}"
    if not path.exists():
        state = optimizer.state_dict()
        moments = {
            f"{index}.{key}": torch.as_tensor(value)
            for index, entry in state["state"].items()
            for key, value in entry.items()
        }
        with whole_directory(path) as temporary:
            save_adapter(model, temporary, base_model)
            write_safetensors(temporary / "optimizer.safetensors", moments)
            write_safetensors(temporary / "rng.safetensors", _generators())
            progress = {
                "step": step,
                "param_groups": state["param_groups"],
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict(),
            }
            write_json(temporary / "state.json", progress)
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, model, optimizer, schedule, scaler) -> int:
    """Put a run back to where `path` was written; returns the number of optimizer steps done.

    Raises:
        ValueError: the checkpoint does not fit the model or lacks a part.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        progress = json.loads((path / "state.json").read_text(encoding="utf-8"))
        moments = load_file(path / "optimizer.safetensors")
        generators = load_file(path / "rng.safetensors")
        adapter = load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}") from error
    with torch.no_grad():  # into the parameters that the optimizer holds
        for name, layer in lora_layers(model):
            layer.lora_A.copy_(adapter[f"base_model.model.{name}.lora_A.weight"])
            layer.lora_B.copy_(adapter[f"base_model.model.{name}.lora_B.weight"])
    state: dict[int, dict] = {}
    for name, value in moments.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": progress["param_groups"]})
    schedule.load_state_dict(progress["schedule"])
    scaler.load_state_dict(progress["scaler"])
    torch.set_rng_state(generators["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{index}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda{index}"], index)
    return progress["step"]


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states.update({f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    return states
