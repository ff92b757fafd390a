"""A run's directory, and the `checkpoint-N` in it: all that a run needs to go on as if it had never stopped.

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

from ..kernels import backend
from ..kernels.nf4_cpu import has_native
from ..nn.files import whole_directory, write_json, write_safetensors
from ..nn.inject import lora_layers, lora_parameters
from . import logging
from .distributed import World, local, part, whole, whole_adapter
from .models import save_with_record
from .settings import FinetuneSettings, differences, next_output_dir

# Variables that hold torch's libraries down to fewer instructions or other sums than the processor has.
INSTRUCTION_LIMITS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def settings_and_checkpoint(
    resume: str | None, typed: dict, fresh: FinetuneSettings, ranks: int
) -> tuple[FinetuneSettings, Path | None]:
    """Settings with a directory that is free, or those of the run to be resumed and the checkpoint that was named.

    Args:
        resume: what follows --resume, "" for nothing; None when it was not typed.
        typed: the settings that were.
        fresh: settings from these.
        ranks: among which the rows of a step are shared out.
    """
    if resume is not None:
        return _to_resume(resume, typed, fresh, ranks)
    fresh.output_dir = fresh.output_dir or next_output_dir()
    directory = Path(fresh.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output-dir {directory} is a file; name a directory")
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"--output-dir {directory} holds another run; name a new one, or go on with --resume")
    return fresh, None


def _to_resume(resume: str, typed: dict, fresh: FinetuneSettings, ranks: int) -> tuple[FinetuneSettings, Path | None]:
    """What was typed again must agree with the run. With --output-dir DIR --resume, one that never began starts afresh.

    Another number of ranks than before shares out the same rows per step.
    """
    if not (resume or fresh.output_dir):
        raise ValueError("--resume needs the run's directory: --resume DIR, or --output-dir DIR")
    directory, checkpoint = Path(resume or fresh.output_dir), None
    if directory in checkpoints(directory.parent):
        directory, checkpoint = directory.parent, directory
    if not (directory / "run.json").exists():
        if resume or (directory.exists() and any(directory.iterdir())):
            raise ValueError(f"--resume: {directory} holds no run (no run.json)")
        print(f"nothing to resume in {directory}: starting afresh")
        fresh.output_dir = str(directory)
        return fresh, None
    run = _read(directory)
    saved = run["settings"]
    free = ("output_dir", "parallel")
    changed = differences({name: getattr(fresh, name) for name in typed if name not in free}, saved)
    if changed:
        raise ValueError("--resume goes on with the run's own settings: " + "; ".join(changed))
    micro, accumulate = saved["per_device_train_batch_size"], saved["gradient_accumulation_steps"]
    rows, odd = divmod(micro * accumulate * run["marks"].get("ranks", 1), ranks)
    if odd:
        raise ValueError(f"--resume: {ranks} ranks cannot evenly share the {rows * ranks + odd} rows of a step")
    micro = max(size for size in range(1, micro + 1) if rows % size == 0)
    shares = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    places = {"output_dir": str(directory), "parallel": fresh.parallel}
    return FinetuneSettings(**saved | shares | places), checkpoint


def begin(directory: Path, settings: dict, marks: dict[str, str | int], needed: int) -> None:
    """Make the directory of a run, with `run.json`; or check that this run began with the same base model and data.

    Args:
        needed: bytes that must be free on the disk.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"no disk space for {directory}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed")
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".*.tmp"):  # by a process that was killed in the middle of writing
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not (directory / "run.json").exists():
        logging.write_run(directory, settings, marks)
        return
    known = _read(directory)["marks"]
    for name in changed_marks(known, marks):
        what = {"base": f"base model ({settings['model']})", "data": "training data"}.get(name)
        if what:
            raise ValueError(f"{directory}: the {what} is not what it was when this run began")
    if known["base"] != marks["base"]:
        print("the scales of the 4-bit base are rounded differently than when this run began")


def changed_marks(before: dict, now: dict) -> list[str]:
    """Which marks of base model, data and the like differ.

    "codes" alone decides about a base in NF4: its scales may be rounded differently on another kind of CPU.
    """
    same_codes = "codes" in before and before["codes"] == now["codes"]
    names = [name for name in now if name != "codes" and before.get(name) != now[name]]
    return [name for name in names if name != "base" or not same_codes]


def go_on(directory: Path, checkpoint: Path | None, training) -> int:
    """Load `checkpoint`, or the newest, and delete those of later steps; returns the optimizer steps done."""
    world = training.world
    saved = world.broadcast(checkpoints(directory))
    first = 0
    if saved:
        with world.shared_errors():
            first = load_checkpoint(checkpoint or saved[-1], training)
    if world.main:
        for path in checkpoints(directory):
            if _step(path) > first:
                shutil.rmtree(path)
    return first


def _read(directory: Path) -> dict:
    path = directory / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": {**run["settings"]}, "marks": {**run["marks"]}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def save_checkpoint(directory: Path, step: int, training, keep: int, record: dict) -> Path:
    """Write `checkpoint-<step>` and delete all but the newest `keep`. All ranks call it, the main one writes.

    Args:
        training: a `loop.Training`.
        record: what is written beside the adapter (`models.Base.record`).
    """
    model, world = training.lm.model, training.world
    path = directory / f"checkpoint-{step}"
    state = training.optimizer.state_dict()
    parameters = list(lora_parameters(model))
    moments = {
        f"{index}.{key}": whole(torch.as_tensor(value), like=parameters[index])
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }
    with whole_adapter(model):
        if world.main and not path.exists():
            progress = {
                "step": step,
                "param_groups": state["param_groups"],
                "schedule": training.schedule.state_dict(),
                "scaler": training.scaler.state_dict(),
                "machine": machine(training.lm.device),
            }
            with whole_directory(path) as temporary:
                save_with_record(model, temporary, record)
                write_safetensors(temporary / "optimizer.safetensors", moments)
                write_safetensors(temporary / "rng.safetensors", _generators(world))
                write_json(temporary / "state.json", progress)
    if world.main:
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, training) -> int:
    """Put a `loop.Training` back to where `path` was written; returns the number of optimizer steps done.

    On another kind of machine the run goes on, and a printed line names what will change its bits.

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
    model = training.lm.model
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
    training.optimizer.load_state_dict({"state": state, "param_groups": progress["param_groups"]})
    training.schedule.load_state_dict(progress["schedule"])
    training.scaler.load_state_dict(progress["scaler"])
    torch.set_rng_state(generators["cpu"])
    for index in range(torch.cuda.device_count() if training.world.mode == "none" else 0):
        if f"cuda{index}" in generators:
            torch.cuda.set_rng_state(generators[f"cuda{index}"], index)
    here = machine(training.lm.device)
    before = progress.get("machine", here)  # version 0.1.0 did not record it
    changed = [f"{name} was {before.get(name)}, now {now}" for name, now in here.items() if before.get(name) != now]
    if changed:
        print(f"not bit-equal from here on to a run that was never stopped: {'; '.join(changed)}")
    return progress["step"]


def machine(device: torch.device) -> dict[str, str | int | bool]:
    """What decides how numbers are rounded; two runs agree to the bit where all of it is the same.

    Floating-point sums depend on their order, and MKL, oneDNN, torch and our own compiled C
    order them by the processor's vector width, its vendor and the number of threads.
    """
    installed = logging.versions()
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
    """Vendor, family, model and name on Linux; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    parts = [facts[name] for name in ("vendor_id", "cpu family", "model", "model name") if name in facts]
    return " ".join(parts) or platform.machine()


def _generators(world: World) -> dict[str, torch.Tensor]:
    """Ranks draw from generators seeded anew for each forward pass, and must not touch each other's GPUs."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and world.mode == "none":
        states.update({f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    return states
