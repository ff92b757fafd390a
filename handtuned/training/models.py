"""A base model with its rows, the adapters that are put on it, and what later commands must know of both."""

import contextlib
import hashlib
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.nf4_cpu import AVX512_BF16, LEVEL
from ..nn import apply_lora_to_model, variants
from ..nn.adapter_config import CONFIG_NAME
from ..nn.adapter_file import WEIGHTS_NAME
from ..nn.adapters import load_adapter, read_adapter_config
from ..nn.checkpoint_layers import checkpoint_layers
from ..nn.inject import leave_out_idle, lora_layers
from ..nn.peft_rules import unloadable
from .data import EncodedRows, context_length, digest, encode_chats, load_chats, shared_system_prompt
from .encoding import Example
from .loading import check_causal, load_base, locate, other_parts
from .logging import read_json, versions
from .settings import DTYPES, METHODS, FinetuneSettings
from .sources import format_of, located

TRAINING_RECORD = "handtuned.json"
RECORDED = ("model", "method", "max_seq_length", "columns", "train_on", "skip_bad_rows", "skip_modules", "save_for",
            "requantize")  # fmt: skip
CHECKED_TOKENS = 16
SAMPLE_BYTES = 65536  # of each tensor in a fingerprint
POWER_ITERATIONS = 16  # of the randomized decompositions: seconds where the exact one takes minutes


def choose_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one; else a CPU or a CUDA device that is there, or a ValueError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError):  # torch knows no such device
        chosen = torch.device(device)
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        if chosen.type in ("cpu", "cuda"):
            return chosen
    raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: float32 on a CPU; on a GPU bfloat16, or float16 with loss scaling where that is only emulated (T4)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def fingerprint(model: torch.nn.Module, scales: bool = True) -> str:
    """A sha256 over the base model as loaded: names, shapes, dtypes and the first bytes of every tensor.

    An adapter belongs to the base it was trained on, its quantization included (merging it into another one silently
    loses quality). LoRA parameters are left out. `scales`: also look at what decodes the 4-bit codes of an NF4 base. A
    mean and a division are in it, which another kind of CPU may round differently; the codes are the same on all.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name or (not scales and re.search(r"absmax$|nested_offset$|quant_map$|\.quant_state\.", name)):
            continue
        name = name.replace(".base_layer.", ".")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        head = tensor.detach().flatten()[: SAMPLE_BYTES // tensor.element_size()].contiguous().cpu()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Base:
    """A base model and the rows that adapters of it are to learn."""

    model: torch.nn.Module
    tokenizer: object
    device: torch.device  # of the computation, as is `dtype`
    dtype: torch.dtype
    examples: Sequence[Example]
    held_out: EncodedRows
    marks: dict[str, str]  # by which a run or a study that is resumed recognizes model and data
    record: dict  # what `generate` and `merge` must know of an adapter: its base, how that is loaded, its prompts


def load_base_and_rows(settings: FinetuneSettings, device: torch.device, place: torch.device | str) -> Base:
    """Read and check all that a run starts from; `place` is where the model is put at first."""
    start, dtype = {}, choose_dtype(settings.dtype, device)
    if settings.init_adapter:
        read_adapter_config(settings.init_adapter)
        weights = Path(settings.init_adapter) / WEIGHTS_NAME
        start = {"adapter": hashlib.sha256(weights.read_bytes()).hexdigest()}
    fast = LEVEL == AVX512_BF16 and dtype == torch.bfloat16
    if device.type == "cpu" and dtype.itemsize == 2 and not fast:
        print(f"note: --dtype {settings.dtype} is slower than float32 on this CPU", file=sys.stderr)
    chats, eval_chats, eval_file = load_chats(settings)
    eval_file = None if eval_file == "-" else eval_file  # which later commands cannot read again
    told = settings.skip_modules or (), settings.trust_remote_code, settings.requantize
    if settings.requantize and format_of(locate(settings.model).quantized) != "mxfp4":
        raise ValueError("--requantize is for experts in MXFP4, and the files hold none")
    model, tokenizer = load_base(settings.model, settings.method, dtype, place, *told)
    context, longest = context_length(model), settings.max_seq_length
    if context is not None and longest > context:
        raise ValueError(f"max_seq_length must be within the model's context of {context}, got {longest}")
    learnt, held_out = encode_chats(chats, eval_chats, tokenizer, settings)
    check_causal(model, learnt.examples[0].input_ids[:CHECKED_TOKENS], settings.model)
    marks = {"base": fingerprint(model), "codes": fingerprint(model, scales=False), "data": digest(learnt.examples),
             "held_out": digest(held_out.examples)} | start  # fmt: skip
    if start:
        _check_base(training_record(settings.init_adapter), marks["base"])
    record = {name: getattr(settings, name) for name in RECORDED}
    record |= {"dtype": str(dtype).removeprefix("torch."), "fingerprint": marks["base"], "eval_data": eval_file,
               "system_prompt": shared_system_prompt(chats), "versions": versions(),
               "paths": {"model": located(settings.model), "eval_data": located(eval_file)}}  # fmt: skip
    return Base(model, tokenizer, device, dtype, learnt.examples, held_out, marks, record)


def _check_base(record: dict, found: str) -> None:
    if record.get("fingerprint", found) != found:
        print("warning: this base model is not, bit for bit, the one that the adapter was trained on", file=sys.stderr)


def add_adapters(model: torch.nn.Module, settings: FinetuneSettings) -> None:
    """Put adapters on a model in place, those of `--init-adapter` or new ones, the same for the same seed; or make it
    trainable whole."""
    torch.manual_seed(settings.seed)
    if settings.method == "full":
        packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
        if packed:
            raise ValueError(f"--method full trains every parameter, and {packed[0]} of {settings.model} is quantized")
        train_whole(model)
    elif settings.init_adapter:
        load_adapter(model, settings.init_adapter, trainable=True)
    else:
        plain = settings.lora_r, settings.lora_alpha, settings.target_modules, settings.lora_dropout
        apply_lora_to_model(model, *plain, **settings.choices())
        if settings.target_modules != "all-linear":
            leave_out_idle(model)
        _initialize(model, settings)
    if settings.save_for == "peft" and (words := unloadable(model, [path for path, _ in lora_layers(model)])):
        raise ValueError(f"--save-for peft: {'; '.join(words)}; leave these layers out by --exclude-modules")
    if settings.lora_fa:
        variants.freeze_A(model)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)


def train_whole(model: torch.nn.Module) -> None:
    """Every parameter but those beside the text: no row reaches these, and weight decay alone would change them."""
    model.requires_grad_(True)
    others = [model.get_submodule(part).requires_grad_(False) for part in other_parts(model)]
    if others:
        kept, whole = (sum(p.numel() for module in modules for p in module.parameters())
                       for modules in (others, [model]))  # fmt: skip
        warnings.warn(f"--method full leaves out {', '.join(other_parts(model))} with {kept / whole:.1%} of the "
                      "parameters, which text does not train", stacklevel=2)  # fmt: skip


def _initialize(model: torch.nn.Module, settings: FinetuneSettings) -> None:
    """Scale and first values. The scale comes first and DoRA's magnitudes last: each sees the former.

    LoftQ reads the model once more, unquantized, into host memory.
    """
    if settings.use_rslora:
        variants.use_rslora(model)
    if settings.init_lora_weights == "gaussian":
        variants.gaussian_init(model)
    elif settings.init_lora_weights == "pissa":
        variants.pissa_init(model, POWER_ITERATIONS)
    elif settings.init_lora_weights == "loftq":
        dense, _ = load_base(settings.model, trust_remote_code=settings.trust_remote_code)
        variants.loftq_init(model, dense.state_dict(), POWER_ITERATIONS)
    if settings.use_dora:
        variants.dora_init(model)


def add_adapter_flags(parser, required: bool = False) -> None:
    parser.add_argument("--adapter", required=required, metavar="DIR", help="directory that finetune (or peft) wrote")
    parser.add_argument("--model", help="base model (default: the one the adapter was trained on)"
                        + ("" if required else "; or, without --adapter, a whole model"))  # fmt: skip
    parser.add_argument("--method", choices=METHODS[:2], help="base in NF4 (qlora) or not (default: as in training)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="compute dtype (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the base model brings along")


def training_record(adapter: str | Path) -> dict:
    """What `finetune` wrote beside the adapter (`Base.record`); {} for an adapter of other origin."""
    path = Path(adapter) / TRAINING_RECORD
    record = read_json(path) if path.is_file() else {}
    return record | {name: located(place) or record.get(name) for name, place in record.get("paths", {}).items()}


def is_whole(args) -> bool:
    """Whether `load_with_adapter` would find no adapter: --model alone, or the directory of a full run."""
    return args.adapter is None or (Path(args.adapter, "config.json").is_file()
                                    and not Path(args.adapter, CONFIG_NAME).is_file())  # fmt: skip


def load_with_adapter(args) -> tuple[torch.nn.Module, object, dict]:
    """Load the base as it was in training and put the adapter on it; `args` are those of `add_adapter_flags`.

    A whole model (`is_whole`) is loaded as it is. Warns when the base differs from the one that the adapter was trained
    on: its numbers would fit only by luck.

    Returns (model in eval mode, tokenizer, training record).
    """
    if args.adapter is not None and not Path(args.adapter).is_dir():
        raise ValueError(f"--adapter {args.adapter}: no such directory")
    if not (args.adapter or args.model):
        raise ValueError("--adapter DIR is missing, or --model for a model without one")
    whole, record = is_whole(args), training_record(args.adapter or args.model)
    if whole and args.adapter and args.model:
        raise ValueError(f"--adapter {args.adapter} holds a whole model, which --model {args.model} cannot be under")
    config = {} if whole else read_adapter_config(args.adapter)
    base = args.model or (args.adapter if whole else record.get("model") or config.get("base_model_name_or_path"))
    if not base:
        raise ValueError(f"{args.adapter} does not name its base model; give it with --model")
    device = choose_device(args.device)
    method = args.method or ("lora" if whole else record.get("method", "lora"))
    dtype = record.get("dtype", "auto") if args.dtype == "auto" else args.dtype
    trust = getattr(args, "trust_remote_code", False)  # never out of the record: whoever wrote that could run code
    told = record.get("skip_modules") or (), trust, record.get("requantize", False)
    model, tokenizer = load_base(base, method, choose_dtype(dtype, device), device, *told)
    if whole:
        return model, tokenizer, record
    _check_base(record, fingerprint(model))
    load_adapter(model, args.adapter)
    return model.eval(), tokenizer, record
