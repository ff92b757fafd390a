"""What a run leaves for later commands: the adapter, or the model trained whole, and the record of its training."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from ..nn.adapters import save_adapter
from ..nn.files import write_json
from .evaluation import end_tokens
from .loading import one_line
from .models import TRAINING_RECORD, Base
from .sources import resolve


def save_with_record(base: Base, directory: Path) -> None:
    """Write what was trained, adapter or whole model, and the record; for PEFT `smollm2` becomes its directory."""
    if base.record["method"] == "full":
        save_model(base.model, base.tokenizer, directory)
    else:
        save_adapter(base.model, directory, base_model=resolve(base.record["model"]), save_for=base.record["save_for"])
    write_json(directory / TRAINING_RECORD, base.record)


def save_model(model: torch.nn.Module, tokenizer, directory: Path) -> None:
    """Write a model that transformers loads, each file whole or not at all, and read it back.

    ValueError: a weight is not finite, or was read back with other values; or transformers cannot save it.
    """
    place = tempfile.TemporaryDirectory(dir=directory, prefix=".", suffix=".tmp")
    with one_line("the model cannot be saved"), place as temporary:
        write_plain(model, tokenizer, temporary)
        with torch.random.fork_rng():  # nor must reading move the generators of a run
            read = type(model).from_pretrained(temporary, dtype=model.dtype)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name} holds NaN or infinite values")
            if not torch.equal(read.get_parameter(name), parameter.cpu()):
                raise ValueError(f"{name} was read back with other values")
        mode = Path(temporary, "config.json").stat().st_mode
        for path in Path(temporary).iterdir():
            path.chmod(mode)  # safetensors lets the owner alone read what it writes
            os.replace(path, directory / path.name)


def write_plain(model: torch.nn.Module, tokenizer, directory: str | Path) -> None:
    """What transformers loads: the model, its tokenizer, the files of its processor, and how it generates."""
    model.generation_config.eos_token_id = end_tokens(model, tokenizer)  # other programs stop there too
    mend_generation_config(model.generation_config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in Path(model.config.name_or_path).glob("*processor*.json"):  # of pictures and sounds
        shutil.copy(path, directory)


def mend_generation_config(config) -> None:
    """Change as little as makes transformers save it: for one, it refuses a temperature without do_sample."""

    def complaint() -> str:
        try:
            return config.validate(strict=True) or ""
        except ValueError as error:
            return str(error)

    changed = []
    for name, value in [("do_sample", True), *vars(type(config)()).items()]:
        said, old = complaint(), getattr(config, name, None)
        if said and old != value:
            setattr(config, name, value)
            if len(complaint()) < len(said):
                changed.append(f"{name} = {value}")
            else:
                setattr(config, name, old)
    if changed:
        print(f"generation_config.json, which transformers would not save as it is: {', '.join(changed)}")
