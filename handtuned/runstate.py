"""`checkpoint-N` directories: all that a run needs to go on as if it had never stopped.

    adapter_model.safetensors, adapter_config.json     the adapter (PEFT's format)
    handtuned.json                                     the base that it belongs to, and how that was loaded
    optimizer.safetensors                              AdamW's moments
    rng.safetensors                                    torch's generators (CPU, and in a run alone each GPU)
    state.json                                         step, schedule, loss scale, parameter groups, machine

The data order needs no file: it is a function of seed and step. A checkpoint is
written under a temporary name and renamed, so a `checkpoint-N` that exists is whole.
All tensors in it are whole too, whatever number of ranks wrote or reads it.
"""

import json
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from .adapted import save_with_record
from .kernels import backend
from .kernels.nf4_cpu import has_native
from .nn.files import whole_directory, write_json, write_safetensors
from .nn.inject import lora_layers, lora_parameters
from .parallel import Team
from .records import versions
from .shards import local, part, whole, whole_adapter

# Variables that hold torch's libraries down to fewer instructions or other sums than the processor has.
INSTRUCTION_LIMITS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def clear_unfinished(directory: Path) -> None:
    """Remove what a process that was killed in the middle of writing has left under temporary names."""
    for left in directory.glob(".*.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def save_checkpoint(
    directory: Path, step: int, model, optimizer, schedule, scaler, keep: int, record: dict, team: Team
) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest `keep`. All ranks call it, the main one writes."""
    path = directory / f"checkpoint-{step}"
    state = optimizer.state_dict()
    parameters = list(lora_parameters(model))
    moments = {
        f"{index}.{key}": whole(torch.as_tensor(value), like=parameters[index])
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }
    with whole_adapter(model):
        if team.main and not path.exists():
            progress = {
                "step": step,
                "param_groups": state["param_groups"],
                "schedule": schedule.state_dict(),
                "scaler": scaler.state_dict(),
                "machine": machine(next(model.parameters()).device),
            }
            with whole_directory(path) as temporary:
                save_with_record(model, temporary, record)
                write_safetensors(temporary / "optimizer.safetensors", moments)
                write_safetensors(temporary / "rng.safetensors", _generators(team))
                write_json(temporary / "state.json", progress)
    if team.main:
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    return path


def drop_after(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps: those steps will be run again."""
    for path in checkpoints(directory):
        if _step(path) > step:
            shutil.rmtree(path)


def load_checkpoint(path: Path, model, optimizer, schedule, scaler, team: Team) -> int:
    """Put a run back to where `path` was written; returns the number of optimizer steps done.

    On another kind of machine the run goes on, and a line says that its bits will be others.

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
            for own in ("lora_A", "lora_B"):
                parameter = getattr(layer, own)
                local(parameter).copy_(part(adapter[f"base_model.model.{name}.{own}.weight"], like=parameter))
    parameters = list(lora_parameters(model))
    state: dict[int, dict] = {}
    for name, value in moments.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = part(value, like=parameters[int(index)]).clone()
    optimizer.load_state_dict({"state": state, "param_groups": progress["param_groups"]})
    schedule.load_state_dict(progress["schedule"])
    scaler.load_state_dict(progress["scaler"])
    torch.set_rng_state(generators["cpu"])
    for index in range(torch.cuda.device_count() if team.mode == "none" else 0):
        if f"cuda{index}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda{index}"], index)
    here = machine(next(model.parameters()).device)
    before = progress.get("machine", here)  # checkpoints of version 0.1.0 do not tell
    changed = [f"{name} was {before.get(name)}, now {now}" for name, now in here.items() if before.get(name) != now]
    if changed:
        print(f"not bit-equal from here on to a run that was never stopped: {'; '.join(changed)}")
    return progress["step"]


def machine(device: torch.device) -> dict[str, str | int | bool]:
    """What decides how numbers are rounded; two runs agree to the bit where all of it is the same.

    Floating-point sums depend on their order, and MKL, oneDNN, torch and our own compiled C
    order them by the processor's vector width, its vendor and the number of threads.
    """
    installed = versions()
    libraries = re.findall(r"Math Kernel Library Version (\S+)|MKL-DNN (v\S+)", torch.__config__.show())
    return {
        "processor": _processor(),
        "vector width": torch.backends.cpu.get_cpu_capability(),
        "instruction limits": ", ".join(f"{k}={os.environ[k]}" for k in INSTRUCTION_LIMITS if k in os.environ),
        "threads": torch.get_num_threads(),
        "torch": installed["torch"],
        "triton": installed["triton"],
        "MKL and oneDNN": " ".join(first or second for first, second in libraries),
        "kernels": backend(torch.empty(0, device=device)),
        "compiled C": has_native(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    """Vendor, family, model and name, as Linux tells them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    told = [facts[name] for name in ("vendor_id", "cpu family", "model", "model name") if name in facts]
    return " ".join(told) or platform.machine()


def _generators(team: Team) -> dict[str, torch.Tensor]:
    """Ranks draw from generators seeded anew for each forward pass, and must not touch each other's GPUs."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and team.mode == "none":
        states.update({f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    return states
