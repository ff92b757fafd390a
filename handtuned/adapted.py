"""Putting a base model and a trained adapter back together, as `generate` and `merge` need them."""

import json
import sys
from pathlib import Path

import torch

from .models import choose_device, choose_dtype, fingerprint, load_base, resolve
from .nn.adapters import load_adapter, read_adapter_config, save_adapter
from .nn.files import write_json

TRAINING_RECORD = "handtuned.json"


def add_adapter_arguments(parser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="directory that finetune (or peft) wrote")
    parser.add_argument("--model", help="base model (default: the one the adapter was trained on)")
    parser.add_argument("--method", choices=("qlora", "lora"),
                        help="base in NF4 (qlora) or as it is (lora) (default: as in training)")  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="compute dtype (default: auto)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def save_with_record(model: torch.nn.Module, directory: Path, record: dict) -> None:
    """Write the adapter and, beside it, what it was trained on; PEFT is told the place of `smollm2`, not the word."""
    save_adapter(model, directory, base_model=resolve(record["model"]))
    write_json(directory / TRAINING_RECORD, record)


def training_record(adapter: str | Path) -> dict:
    """What `finetune` noted beside the adapter: base, method, fingerprint, system prompt; {} for a foreign adapter."""
    path = Path(adapter) / TRAINING_RECORD
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def load_adapted(args) -> tuple[torch.nn.Module, object, dict]:
    """Load the base as it was in training and put the adapter on it.

    Warns when the base differs from the one that the adapter was trained on: its
    numbers would fit only by luck.

    Returns:
        (model in eval mode, tokenizer, training record).
    """
    if not Path(args.adapter).is_dir():
        raise ValueError(f"--adapter {args.adapter}: no such directory")
    config = read_adapter_config(args.adapter)
    record = training_record(args.adapter)
    base = args.model or record.get("model") or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{args.adapter} does not name its base model; give it with --model")
    device = choose_device(args.device)
    method = args.method or record.get("method", "lora")
    model, tokenizer = load_base(base, method, choose_dtype(args.dtype, device), device)
    trained_on = record.get("fingerprint")
    if trained_on and trained_on != fingerprint(model):
        print("warning: this base model is not, bit for bit, the one that the adapter was trained on", file=sys.stderr)
    load_adapter(model, args.adapter)
    return model.eval(), tokenizer, record
