"""`handtuned merge`: base + adapter as one plain model directory that transformers loads.

A 4-bit merge erases the adapter: the update is smaller than the gaps between the 16 levels, and rounding throws it
away. So the base is dequantized, the update is added, and the sum is written in 16 or 32 bits. The base is the
*quantized* one by default, because that is what the adapter was trained on; adding the update to the original weights
instead (`--onto original`) gives a model that nobody has trained.
"""

from pathlib import Path

import torch

from .nn.adapters import load_adapter
from .nn.files import whole_directory
from .nn.inject import lora_layers
from .nn.merge import merge_and_unload, merge_errors
from .quant import NF4Linear
from .training import data
from .training.evaluation import CausalLM, end_tokens
from .training.models import add_adapter_flags, choose_device, load_base, load_with_adapter
from .training.settings import column_names, in_use

PROBE_ROWS = 32


def add_arguments(parser) -> None:
    add_adapter_flags(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the merged model goes (must not exist)")
    parser.add_argument("--onto", default="quantized", choices=("quantized", "original"),
                        help="weights that receive the update (default: quantized, the ones trained on)")  # fmt: skip
    parser.add_argument("--save-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"),
                        help="dtype of the merged weights (default: bfloat16)")  # fmt: skip
    parser.add_argument("--errors", action="store_true", help="also measure what merging into 4 bits would lose")
    parser.add_argument("--data", help="rows whose loss is shown before and after (default: those of training)")


def run(args) -> int:
    out = Path(args.out)
    if in_use(out):
        raise ValueError(f"--out {out} exists already and is not empty")
    model, tokenizer, record = load_with_adapter(args)
    probe = _probe(args.data or record.get("eval_data"), tokenizer, record)
    before = _loss(model, probe)
    if any(layer.lora_A is not None for _, layer in lora_layers(model)):  # not if whole modules were trained alone
        print(merge_errors(model, four_bits=args.errors))
    if args.onto == "original":
        base = args.model or record.get("model")
        if not base:
            raise ValueError("--onto original needs the base model; give it with --model")
        model, _ = load_base(base, "lora", torch.float32, choose_device(args.device))
        load_adapter(model, args.adapter)
    model = to_plain_model(model, getattr(torch, args.save_dtype))
    after = _loss(model, probe)
    model.generation_config.eos_token_id = end_tokens(model, tokenizer)  # other programs stop there too
    with whole_directory(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    if probe:
        print(f"loss on {len(probe)} held-out rows: {before:.4f} with the adapter, {after:.4f} merged")
    print(f"merged model in {args.save_dtype}, onto {args.onto} weights: {out}")
    return 0


def to_plain_model(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Merge the adapter and turn every LoRA and NF4 layer into a plain `nn.Linear`, in place, in `dtype`.

    A weight tied to the embedding that received an update is untied first, in the config too. The sum is formed in
    fp32 and rounded once.

    Raises:
        ValueError: as `merge_and_unload`, or a weight that is too large for `dtype`.
    """
    model = merge_and_unload(model.float(), dequantize=True, untie=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(name, module.dequantize())
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} leaves the range of {dtype}; save in another dtype")
    return model


def _probe(path: str | None, tokenizer, record: dict) -> list:
    """The first encoded rows of `path`, read as those of training; none when it is not known or not there any more."""
    if path is None or not Path(path).exists():
        return []
    skip_bad_rows, train_on = record.get("skip_bad_rows", False), record.get("train_on", "answers")
    rows = data.load_rows(path, skip_bad_rows, column_names(record.get("columns")), train_on).rows[:PROBE_ROWS]
    return data.encode_rows(rows, tokenizer, record.get("max_seq_length", 512), skip_bad_rows, train_on).examples


def _loss(model, probe: list) -> float | None:
    return CausalLM(model, probe[0].input_ids[None, :8]).score(probe)["loss"] if probe else None
