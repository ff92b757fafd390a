"""Loading a base model: from any source, quantized while it is read, and refused where it is not what it seems.

transformers fills what a checkpoint lacks with random numbers, and takes an encoder for a decoder, with a warning at
most; both train, and to nothing. Here each is an error that names the tensors or the fault.
"""

import contextlib
import re
from collections.abc import Sequence

import torch

from ..nn.adapter_file import listed
from ..quant import load_quantized, quantize_model
from ..quant.experts import dequantize_experts
from .sources import Source, find, format_of, resolve

# Tokens of pictures and sounds, which the tokenizer of a text model may share with its multimodal sisters.
OTHER_MODALITIES = re.compile("image|audio|video|vision", re.IGNORECASE)


def load_base(model: str, method: str = "lora", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
              skip: Sequence[str] = (), trust_remote_code: bool = False, requantize: bool = False):  # fmt: skip
    """Load a causal LM and its tokenizer, its linears quantized to NF4 when `method` is "qlora".

    Args:
        model: `smollm2`, a directory, a GGUF file, or a hub name.
        method: "qlora" packs every linear but the output head into NF4 with double quantization, if it is not in NF4
            already; any other takes the weights as they are, decoded where they are quantized.
        dtype: of the weights that are not quantized, and of the computation.
        skip: layers that "qlora" leaves dense, as for `quantize_model`.
        trust_remote_code: whether code that the model brings along may run.
        requantize: whether "qlora" makes NF4 of experts in MXFP4, if there are any, which it else keeps in their bytes.

    Returns (model, tokenizer), on `device`, in eval mode, with every parameter frozen.
    ValueError: whatever keeps it from being loaded, in one line.
    """
    from transformers import AutoTokenizer

    source = locate(model)
    told = {"trust_remote_code": trust_remote_code}
    if source.weights[0].suffix == ".gguf":
        told["gguf_file"] = source.weights[0].name
    with one_line(f"--model {model}, tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.directory, **told)
    with one_line(f"--model {model}"):
        skip = ("lm_head", *skip) if method == "qlora" else None
        loaded = _read(source, skip, dtype, device, told, requantize).requires_grad_(False)
        if skip:
            # What is quantized already is left alone.
            quantize_model(loaded, (*skip, *left_dense(loaded, source.quantized)))
        # To the tokens of a GGUF file transformers adds its own.
        _check(loaded, {} if "gguf_file" in told else tokenizer.get_vocab())
    return loaded.to(device).eval(), tokenizer


def locate(model: str) -> Source:
    """The files of a base model, fetched where they are not there. ValueError: as `load_base`."""
    place = resolve(model)
    with one_line(f"--model {model}"):
        return find(place)


@contextlib.contextmanager
def one_line(what: str):
    """Make any exception a ValueError of one line that begins with `what`; too little memory stays what it is.

    What transformers would print on the way, such as its table of missing tensors, is left out.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what}: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def is_out_of_memory(error: Exception) -> bool:
    """On a GPU torch has a class for it; on a CPU there is the text alone."""
    known = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return known or "not enough memory" in str(error) or "can't allocate memory" in str(error)


def reason(error: Exception) -> str:
    """An exception of any library in one short line."""
    if "trust_remote_code" in str(error):
        return ("it brings code of its own (auto_map in its config.json), which would run on this machine; read that, "
                "then add --trust-remote-code")  # fmt: skip
    kind = "" if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or ["no reason given"])[0][:500]


def auto_class(config) -> str:
    """The name of the transformers class that builds the model: all of it, where there is more than the text part."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

    whole = MULTIMODAL.get(config.model_type)
    named = (getattr(config, "architectures", None) or [whole])[0]
    return "AutoModelForImageTextToText" if whole and named == whole else "AutoModelForCausalLM"


def _read(source: Source, skip: tuple[str, ...] | None, dtype: torch.dtype, device, told: dict,
          requantize: bool) -> torch.nn.Module:  # fmt: skip
    """The model with all that the files hold, and nothing else; in NF4 but for those to `skip`, None: as it is."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.directory, **told)
    kind, quantized, model = getattr(transformers, auto_class(config)), source.quantized, None
    in_nf4 = quantized.get("load_in_4bit") and quantized.get("bnb_4bit_quant_type") == "nf4"
    known = in_nf4 or quantized.get("quant_method") in ("mxfp4", "fp8")
    if source.weights[0].suffix == ".safetensors" and (known or (skip and not quantized)):
        model = _read_in_shards(source, kind, config, dtype, device, skip, told["trust_remote_code"], requantize)
        if model is not None and not skip:
            dequantize_experts(model, dtype)
    if model is None:
        more = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **told}
        if "gguf_file" not in told:
            more["config"] = config
        elif hasattr(transformers, "GgufConfig"):
            more["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if quantized.get("quant_method") == "fp8":
            config.quantization_config["dequantize"] = True
        model, found = kind.from_pretrained(source.directory, **more)
        wrong = {what: [name if isinstance(name, str) else name[0] for name in found[f"{what}_keys"]]
                 for what in ("missing", "unexpected", "mismatched")}  # fmt: skip
        if any(wrong.values()):
            lists = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
            origin = f"{format_of(quantized)}; the checkpoint in 16 bits that they were made from is read"
            files = f"the files (in {origin})" if quantized else "the files"
            raise ValueError(f"{files} must hold the model's tensors, and no others: {lists}")
        if hasattr(model, "hf_quantizer"):
            model = model.dequantize(dtype)
        for parameter in model.parameters() if quantized else ():  # what was dense is in the dtype of the files
            if parameter.is_floating_point() and parameter.dtype not in (dtype, torch.float32):
                parameter.data = parameter.data.to(dtype)
        if quantized:
            model._weight_conversions = None  # saving goes by the architecture's own and does not quantize again
    for part in (model.config, model.config.get_text_config()):
        vars(part).pop("quantization_config", None)  # the weights are so no longer
    return model


def _read_in_shards(source: Source, kind, config, dtype: torch.dtype, device, skip, trust, requantize):
    """The model quantized while it is read, so that it never stands in memory unquantized; `skip` None: as it is.

    None where the files' tensors do not become the model's: transformers says what is missing.
    """
    from transformers import GenerationConfig

    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, trust_remote_code=trust)
    skip = None if skip is None else (*skip, *left_dense(model, source.quantized))
    try:
        load_quantized(model, source.weights, skip=skip, dtype=dtype, device=device, requantize=requantize)
    except ValueError:
        return None
    with contextlib.suppress(OSError):  # there is no such file
        model.generation_config = GenerationConfig.from_pretrained(source.directory)
    return model


def left_dense(model: torch.nn.Module, quantized: dict) -> list[str]:
    """What "qlora" leaves dense unasked: `other_parts`, and what bitsandbytes' files keep in 16 bits on purpose."""
    names = quantized.get("llm_int8_skip_modules") or () if quantized.get("load_in_4bit") else ()
    paths = [f".{path}." for path, _ in model.named_modules()]
    return [*other_parts(model), *(name for name in names if any(f".{name}." in path for path in paths))]


def other_parts(model: torch.nn.Module) -> list[str]:
    """Paths of what a multimodal model has beside its text: "qlora" keeps it dense, so that a merge gives it back."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return []
    text, head = model.get_decoder(), model.get_output_embeddings()
    around = [path for path, module in model.named_modules() if module is not text and text in module.modules()]
    parts = {f"{path}.{name}".lstrip("."): part for path in around
             for name, part in model.get_submodule(path).named_children()}  # fmt: skip
    return [path for path, part in parts.items() if part is not head and text not in part.modules()]


def _check(model: torch.nn.Module, vocabulary: dict[str, int]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            wider = "" if parameter.dtype != torch.float16 else ", in float16; --dtype float32 may hold them"
            raise ValueError(f"{name} holds NaN or infinite values{wider}")
    rows = len(model.get_input_embeddings().weight)
    beyond = [token for token, number in vocabulary.items() if number >= rows and not OTHER_MODALITIES.search(token)]
    if beyond:
        raise ValueError(f"its tokenizer has tokens beyond the {rows} rows of its embedding: {listed(beyond)}; resize "
                         "the embedding and save the model, or take the tokenizer that belongs to it")  # fmt: skip


@torch.no_grad()
def check_causal(model: torch.nn.Module, tokens, name: str) -> None:
    """Raise ValueError if a change of the last of `tokens`, (T,), reaches the logits before it, as in an encoder."""
    ids = torch.as_tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)[None]
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else abs(ids[0, -1] - 1)
    with one_line(f"--model {name}: a forward pass fails"):
        one, two = (model(input_ids=rows, use_cache=False).logits[0].float() for rows in (ids, other))
    before, last = ((one - two)[part].norm() for part in (slice(-1), slice(-1, None)))
    if before > last * torch.finfo(model.dtype).eps ** 0.5:
        raise ValueError(f"--model {name}: {type(model).__name__} is not a causal language model: a token changes the "
                         "logits of those before it")  # fmt: skip
