"""A run's directory, and the `checkpoint-N` in it: all that a run needs to go on as if it had never stopped.

    run.json                                           of the run: command, settings, versions, marks of base and data
    adapter_model.safetensors, adapter_config.json     the adapter (PEFT's format); or, trained whole, the model
    handtuned.json                                     the base that it belongs to, and how that was loaded
    optimizer.safetensors                              AdamW's moments, and what it steps: "master", in FP32
    rng.safetensors                                    torch's generators (CPU, and in a run alone each GPU)
    state.json                                         step, schedule, loss scale, parameter groups, machine

The data order needs no file: it is a function of seed and step. A checkpoint is written under a temporary name and
renamed, so a `checkpoint-N` that exists is whole. All tensors in it are whole too, whatever number of ranks wrote or
reads it.
"""

import math
import os
import platform
import re
import shutil
from pathlib import Path

import torch

from ..kernels import backend
from ..kernels.nf4_cpu import has_native
from ..nn.adapter_file import read_adapter_tensors
from ..nn.files import in_use, whole_directory, write_json, write_safetensors
from ..nn.inject import lora_layers
from ..nn.parameters import file_prefixes
from ..nn.peft_rules import old_names
from . import logging
from .saving import save_with_record
from .settings import FinetuneSettings, absolute, next_output_dir, resumed
from .world import World

# Variables that hold torch's libraries down to fewer instructions or other sums than the processor has.
INSTRUCTION_LIMITS = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
ANOTHER_RUN = "--output-dir {} holds another run; name a new one, or go on with --resume"


def settings_and_checkpoint(resume: str | None, typed: dict, fresh: FinetuneSettings,
                            ranks: int) -> tuple[FinetuneSettings, Path | None]:  # fmt: skip
    """Settings with a directory that is free, or those of the run to be resumed and the checkpoint that was named.

    With --output-dir DIR --resume, a run that never began starts afresh. Another number of ranks than before shares
    out the same rows per step. Of --max-steps, or the epochs where a run counts these, there may be more than before.

    Args:
        resume: what follows --resume, "" for nothing; None when it was not typed.
        typed: the settings that were, and `fresh`: settings from these.
        ranks: among which the rows of a step are shared out.
    """
    if resume == "" and not fresh.output_dir:
        raise ValueError("--resume needs the run's directory: --resume DIR, or --output-dir DIR")
    directory, checkpoint = Path(resume or fresh.output_dir or next_output_dir()), None
    if resume is not None and directory in checkpoints(directory.parent):
        directory, checkpoint = directory.parent, directory
    if resume and fresh.output_dir and os.path.realpath(fresh.output_dir) != os.path.realpath(directory):
        raise ValueError(f"--resume goes on in {directory}, and --output-dir names {fresh.output_dir}")
    if resume is None or not (directory / "run.json").exists():
        if resume or (resume == "" and in_use(directory)):
            raise ValueError(f"--resume: {directory} holds no run (no run.json)")
        if directory.is_file():
            raise ValueError(f"--output-dir {directory} is a file; name a directory")
        if in_use(directory):
            raise ValueError(ANOTHER_RUN.format(directory))
        if resume == "":
            print(f"nothing to resume in {directory}: starting afresh")
        fresh.output_dir = str(directory)
        return fresh, None
    run = logging.read_json(directory / "run.json", "settings", "marks")
    counted = "max_steps" if run["settings"].get("max_steps") else "num_train_epochs"
    more = {counted: typed[counted]} if typed.get(counted, 0) > (run["settings"].get(counted) or math.inf) else {}
    settings = resumed("run", typed, run, output_dir=str(directory),
                       parallel=fresh.parallel, offload=fresh.offload, **more)  # fmt: skip
    micro = settings.per_device_train_batch_size
    rows, odd = divmod(micro * settings.gradient_accumulation_steps * run["marks"].get("ranks", 1), ranks)
    if odd:
        raise ValueError(f"--resume: {ranks} ranks cannot evenly share the {rows * ranks + odd} rows of a step")
    settings.per_device_train_batch_size = max(size for size in range(1, micro + 1) if rows % size == 0)
    settings.gradient_accumulation_steps = rows // settings.per_device_train_batch_size
    return settings, checkpoint


def begin(directory: Path, training, new: bool = False) -> dict:
    """Make the directory of a run, with `run.json`; or check that this run began with the same base model and data,
    and note there that it shall be longer, so that it goes on to the new end after the next kill, too.

    `new`: the directory was free when this run began to load; another may have come first meanwhile.

    Gives the results that it holds so far.
    """
    world, settings, results = training.world, training.settings.to_json(), {}
    record, scored = directory / "run.json", directory / "results.json"
    with world.shared_errors():
        if world.main:
            place = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
            free = shutil.disk_usage(place).free
            there = min(len(checkpoints(directory)), settings["save_total_limit"])
            # In fp32: the parameter twice, and moments.
            needed = training.elements * 4 * 4 * (settings["save_total_limit"] + 2 - there)
            if free < needed:
                raise ValueError(f"no disk space for {directory}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB "
                                 "needed")  # fmt: skip
            if new and in_use(directory):
                raise ValueError(ANOTHER_RUN.format(directory))
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(".*.tmp"):  # by a process that was killed in the middle of writing
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            marks = training.base.marks | {"ranks": world.size}
            if record.exists():
                run = logging.read_json(record, "settings", "marks")
                _check_marks(directory, settings["model"], run["marks"], marks)
                longer = run["settings"] | {name: settings[name] for name in ("max_steps", "num_train_epochs")}
                if run["settings"] != longer:
                    print("longer than before: from here on the learning rate is that of a run of the new length")
                    commands = [*run.get("lengthened", ()), logging.command_line()]
                    write_json(record, run | {"settings": longer, "lengthened": commands})
            else:
                write_json(record, {
                    "command": logging.command_line(), "settings": settings, "paths": absolute(settings),
                    "versions": logging.versions(), "machine": f"{platform.system()} {platform.machine()}",
                    "marks": marks})  # fmt: skip
            results = logging.read_json(scored) if scored.exists() else {}
    return world.broadcast(results)


def _check_marks(directory: Path, model: str, known: dict, marks: dict[str, str | int]) -> None:
    what = {"base": f"base model ({model})", "data": "training data", "held_out": "held-out data",
            "adapter": "adapter of --init-adapter"}  # fmt: skip
    earlier = "" if "held_out" in known else ", or was read otherwise by an earlier version"
    changed = changed_marks(known, marks)
    for name in filter(changed.__contains__, what):
        raise ValueError(f"{directory}: the {what[name]} is not what it was when this run began{earlier}")
    if known["base"] != marks["base"]:
        print("the scales of the 4-bit base are rounded differently than when this run began")


def changed_marks(before: dict, now: dict) -> list[str]:
    """Which marks of base model, data and the like differ.

    "codes" alone decides about a base in NF4: its scales may be rounded differently on another kind of CPU.
    """
    same_codes = "codes" in before and before["codes"] == now["codes"]
    older = {"held_out": now.get("held_out")} | before  # which had no such mark
    names = [name for name in now if name != "codes" and older.get(name) != now[name]]
    return [name for name in names if name != "base" or not same_codes]


def go_on(directory: Path, checkpoint: Path | None, training) -> int:
    """Load `checkpoint`, or the newest, and delete those of later steps; returns the optimizer steps done."""
    saved = training.world.broadcast(checkpoints(directory))
    if not saved:
        return 0
    with training.world.shared_errors():
        first = load_checkpoint(checkpoint or saved[-1], training)
    for path in saved if training.world.main else ():
        if _step(path) > first:
            _delete(path)
    return first


def _delete(checkpoint: Path) -> None:
    """First it loses its name: a kill must not leave a part of it there."""
    left = checkpoint.with_name(f".{checkpoint.name}.tmp")
    os.replace(checkpoint, left)
    shutil.rmtree(left)


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def save_checkpoint(directory: Path, step: int, training) -> Path:
    """Write `checkpoint-<step>` of a `loop.Training` and delete all but the newest `save_total_limit`. All ranks call
    it, the main one writes."""
    model, world, path = training.lm.model, training.world, directory / f"checkpoint-{step}"
    state, moments = training.optimizer.state_dict(), {}
    for index, (tensor, parameter) in enumerate(_trained(training)):
        for key, value in (state["state"].get(index, {}) | {"master": tensor}).items():
            whole = world.whole(key, torch.as_tensor(value), parameter)
            if world.main:
                moments[f"{index}.{key}"] = whole
    with world.gathered(model):
        if world.main and not path.exists():
            with whole_directory(path) as temporary:
                save_with_record(training.base, temporary)
                write_safetensors(temporary / "optimizer.safetensors", moments)
                write_safetensors(temporary / "rng.safetensors", _generators(world))
                write_json(temporary / "state.json", {
                    "step": step, "param_groups": state["param_groups"], "schedule": training.schedule.state_dict(),
                    "scaler": training.scaler.state_dict(), "machine": machine(training.lm.device)})  # fmt: skip
    for old in checkpoints(directory)[: -training.settings.save_total_limit] if world.main else ():
        _delete(old)
    return path


@torch.no_grad()
def load_checkpoint(path: Path, training) -> int:
    """Put a `loop.Training` back to where `path` was written; returns the number of optimizer steps done.

    On another kind of machine the run goes on, and a printed line names what will change its bits.

    ValueError: the checkpoint does not fit the model or lacks a part.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    world, schedule = training.world, training.schedule
    try:
        progress = logging.read_json(path / "state.json", "schedule", "scaler")
        moments, generators = (load_file(path / f"{name}.safetensors") for name in ("optimizer", "rng"))
        trained = [(*both, moments.pop(f"{i}.master")) for i, both in enumerate(_trained(training))]
        state: dict[int, dict] = {}
        for name, value in moments.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = world.part(key, value, trained[int(index)][1])
        layers = dict(lora_layers(training.lm.model))
        saved = read_adapter_tensors(path).layers if layers else {}
        prefixes = file_prefixes(training.lm.model, layers)
        for name, old in old_names(training.lm.model, prefixes.values()).items():  # by which PEFT finds them
            saved[name] = saved.get(name) or saved[old]
        # Into the tensors that the optimizer holds, the parameters, and what is not trained of LoRA.
        for name, (tensor, parameter, master) in zip(training.names, trained, strict=True):
            part = world.part("master", master, parameter)
            if part.shape != tensor.shape:
                raise ValueError(f"{name} must have the shape {tuple(tensor.shape)}, got {tuple(part.shape)}")
            tensor.copy_(part)
            world.load(parameter, master)
        for name, layer in layers.items():
            for own, value in layer.parts(saved[prefixes[name]]).items():
                if not getattr(layer, own).requires_grad:
                    world.load(getattr(layer, own), value)
        training.optimizer.load_state_dict({"state": state, "param_groups": progress["param_groups"]})
        step, at = progress["step"], progress["schedule"]["last_epoch"]
        rates = [peak * share(at) for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        # The run's length, not the checkpoint's.
        length = {"lr_lambdas": schedule.state_dict()["lr_lambdas"], "_last_lr": rates}
        schedule.load_state_dict(progress["schedule"] | length)
        training.scaler.load_state_dict(progress["scaler"])
        torch.set_rng_state(generators["cpu"])
        for name in _generators(world).keys() & generators.keys() - {"cpu"}:
            torch.cuda.set_rng_state(generators[name], int(name.removeprefix("cuda")))
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        why = f"it lacks {error}; is it of an earlier version?" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a whole checkpoint: {why}") from error
    here = machine(training.lm.device)
    before = progress.get("machine", here)  # version 0.1.0 did not record it
    changed = [f"{name} was {before.get(name)}, now {now}" for name, now in here.items() if before.get(name) != now]
    if changed:
        print(f"not bit-equal from here on to a run that was never stopped: {'; '.join(changed)}")
    return step


def _trained(training) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what the optimizer steps: the parameter, its master or this rank's shard; the parameter), in its order."""
    held = [tensor for group in training.optimizer.param_groups for tensor in group["params"]]
    parameters = dict(training.lm.model.named_parameters())
    return [(tensor, parameters[name]) for name, tensor in zip(training.names, held, strict=True)]


def machine(device: torch.device) -> dict[str, str | int | bool]:
    """What decides how numbers are rounded; two runs agree to the bit where all of it is the same.

    MKL, oneDNN, torch and our own compiled C order sums by the processor's vector width, its vendor and the threads.
    """
    installed = logging.versions()
    libraries = re.findall(r"Math Kernel Library Version (\S+)|MKL-DNN (v\S+)", torch.__config__.show())
    return {
        "processor": " ".join(logging.processor("vendor_id", "cpu family", "model", "model name")),
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


def _generators(world: World) -> dict[str, torch.Tensor]:
    """Ranks draw from generators seeded anew for each forward pass, and must not touch each other's GPUs."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and world.mode == "none":
        states.update({f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())})
    return states
