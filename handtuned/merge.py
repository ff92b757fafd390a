"""`handtuned merge`: base + adapter as one plain model directory that transformers loads.

A 4-bit merge erases the adapter: the update is smaller than the gaps between the 16 levels, and rounding throws it
away. So the base is dequantized, the update is added, and the sum is written in 16 or 32 bits. The base is the
*quantized* one by default, because that is what the adapter was trained on; adding the update to the original weights
instead (`--onto original`) gives a model that nobody has trained.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .nn.adapters import load_adapter
from .nn.files import in_use, whole_directory, write_safetensors
from .nn.inject import lora_layers
from .nn.merge import merge_and_unload, merge_errors
from .quant import NF4Linear
from .quant.experts import dequantize_experts
from .training import data
from .training.evaluation import CausalLM
from .training.loading import auto_class, load_base, one_line, reason
from .training.models import add_adapter_flags, choose_device, is_whole, load_with_adapter
from .training.saving import write_plain
from .training.settings import column_names

PROBE_ROWS = 32
COMPARED_TOKENS = 32
# Of the logits' size. Both are sums in fp32 of the same numbers; a tensor that is lost or transposed changes far more.
TOLERANCE = 1e-3
READ_BACK = """
import sys, torch, transformers
from safetensors.torch import load_file
directory, logits, kind, device, code = sys.argv[1:]
options = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": bool(code)}
model, found = getattr(transformers, kind).from_pretrained(directory, **options)
wrong = {name: sorted(map(str, keys)) for name, keys in found.items() if keys}
if wrong:
    raise SystemExit(f"tensors do not fit: {wrong}")
kept = load_file(logits)
with torch.no_grad():
    now = model.to(device).eval()(input_ids=kept["ids"].to(device), use_cache=False).logits.cpu()
print("apart:", ((now - kept["logits"]).norm() / kept["logits"].norm()).item())
"""


def add_arguments(parser) -> None:
    add_adapter_flags(parser, required=True)
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
    if is_whole(args):
        raise ValueError(f"{args.adapter} is a whole model already, without an adapter to merge")
    model, tokenizer, record = load_with_adapter(args)
    probe = _errand("the loss on held-out rows", lambda: _probe(args.data, tokenizer, record)) or []
    before = _errand("the loss with the adapter", lambda: _loss(model, probe))
    if any(layer.lora_A is not None for _, layer in lora_layers(model)):  # not if whole modules were trained alone
        _errand("what merging loses", lambda: print(merge_errors(model, four_bits=args.errors)))
    if args.onto == "original":
        base = args.model or record.get("model")
        if not base:
            raise ValueError("--onto original needs the base model; give it with --model")
        model, _ = load_base(base, "lora", torch.float32, choose_device(args.device),
                             trust_remote_code=args.trust_remote_code)  # fmt: skip
        load_adapter(model, args.adapter)
    model = to_plain_model(model, getattr(torch, args.save_dtype))
    after = _errand("the loss of the merged model", lambda: _loss(model, probe))
    with whole_directory(out) as temporary:
        with one_line("the merged model cannot be saved"):
            write_plain(model, tokenizer, temporary)
        ids = list(probe[0].input_ids if probe else tokenizer("The capital of France is Paris.")["input_ids"]) or [0, 1]
        apart = _read_back(model, ids[:COMPARED_TOKENS], temporary, args.trust_remote_code)
    if before is not None and after is not None:
        print(f"loss on {len(probe)} held-out rows: {before:.4f} with the adapter, {after:.4f} merged")
    print(f"read back by transformers in a process of its own: logits within {apart:.0e} of their size")
    print(f"merged model in {args.save_dtype}, onto {args.onto} weights: {out}")
    return 0


def to_plain_model(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Merge the adapter and turn every LoRA and NF4 layer into the layer that it was made of, in place, in `dtype`.

    A weight tied to the embedding that received an update is untied first, in the config too. The sum is formed in
    fp32 and rounded once.

    ValueError: as `merge_and_unload`, or a weight that is too large for `dtype`.
    """
    for module in model.float().modules():
        if isinstance(module, NF4Linear):
            module.weight_dtype = torch.float32  # in which it is decoded
    model = merge_and_unload(model, dequantize=True, untie=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(name, module.dequantize(dtype))
    dequantize_experts(model, dtype)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} leaves the range of {dtype}; save in another dtype")
    return model


def _errand(what: str, work: Callable):
    """What `work` gives; None where it fails, with a line: nothing beside the merge may stop it."""
    try:
        return work()
    except Exception as error:
        print(f"note: {what} is not measured: {reason(error)}", file=sys.stderr)
        return None


def _probe(path: str | None, tokenizer, record: dict) -> list:
    """The first encoded rows of `path`, or of those held out in training, read as in training; none if unknown."""
    path = path or record.get("eval_data")
    if path is None:
        return []
    skip_bad_rows, train_on = record.get("skip_bad_rows", False), record.get("train_on", "answers")
    rows = data.load_rows(path, skip_bad_rows, column_names(record.get("columns")), train_on).rows[:PROBE_ROWS]
    return data.encode_rows(rows, tokenizer, record.get("max_seq_length", 512), skip_bad_rows, train_on).examples


def _loss(model, probe: list) -> float | None:
    return CausalLM(model, probe[0].input_ids[None, :8]).score(probe)["loss"] if probe else None


@torch.no_grad()
def _read_back(model: torch.nn.Module, ids: list[int], directory: Path, code: bool) -> float:
    """Load `directory` by plain transformers in a new process; gives how far its logits are from those of `model`.

    ValueError: it does not load, or its logits are others. The model is moved to the meta device.
    """
    device, ids = next(model.parameters()).device, torch.tensor([ids])
    kept = directory / "logits.safetensors"
    write_safetensors(kept, {"ids": ids, "logits": model.float()(input_ids=ids.to(device), use_cache=False).logits})
    kind = auto_class(model.config)
    model.to("meta")  # only one of the two in memory
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    words = [sys.executable, "-c", READ_BACK, directory.absolute(), kept.absolute(), kind, device, "code" * code]
    done = subprocess.run(list(map(str, words)), env=os.environ | quiet, capture_output=True, text=True)
    kept.unlink()
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1][:500]
        raise ValueError(f"transformers does not read the merged model back ({why}); nothing was written")
    apart = float(done.stdout.split("apart:")[-1])
    if not apart <= TOLERANCE:
        raise ValueError("transformers reads the merged model back with other logits, apart by "
                         f"{apart:.1%} of their size; nothing was written")  # fmt: skip
    return apart
