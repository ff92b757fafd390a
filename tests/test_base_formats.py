"""Bases that are quantized already: decoded, or refused by the name of their format; and GGUF files."""

import json
import re
from pathlib import Path

import pytest
import tiny_architectures
import torch
from handtuned.quant import NF4Experts, NF4Linear, NF4Tensor, quantize_nf4
from handtuned.quant.conversion import decode_fp8
from safetensors.torch import load_file, save_file
from tiny import make_model

from handtuned.training.loading import load_base, other_parts

transformers = pytest.importorskip("transformers")
LAYER, KEPT = "model.layers.0.mlp.down_proj", "model.layers.1.mlp"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return Path(make_model(tmp_path_factory.mktemp("dense")))


def _bitsandbytes(dense, directory, **how):
    pytest.importorskip("bitsandbytes")
    how = transformers.BitsAndBytesConfig(**how)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=how, device_map="cpu")
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(directory)
    return str(directory), model.dequantize(torch.float32).get_submodule(LAYER).weight.float()


@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_nf4_of_bitsandbytes_is_taken_as_it_is(dense, tmp_path, method, nested):
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    place, decoded = _bitsandbytes(dense, tmp_path / "m", **how)
    model, _ = load_base(place, method)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, NF4Linear) == (method == "qlora")
    weight = layer.dequantize(torch.float32).weight if method == "qlora" else layer.weight
    torch.testing.assert_close(weight, decoded, rtol=0, atol=2**-8 * decoded.abs().max().item())
    if method == "qlora":
        held = load_file(tmp_path / "m" / "model.safetensors")
        assert torch.equal(layer.weight.view(-1), held[f"{LAYER}.weight"].view(-1)), "its very bytes"
    assert not hasattr(model.config, "quantization_config")


def test_what_bitsandbytes_files_keep_in_16_bits_stays_so(dense, tmp_path):
    """As in the dynamic 4-bit checkpoints of unsloth, which name the layers that 4 bits would hurt."""
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    place, _ = _bitsandbytes(dense, tmp_path / "m", **how, llm_int8_skip_modules=["lm_head", KEPT, "vision"])
    model, _ = load_base(place, "qlora")
    kept = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", *(f"{KEPT}.{name}_proj" for name in ("gate", "up", "down"))}


@pytest.mark.parametrize("how", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}],
                         ids=["int8", "fp4"])  # fmt: skip
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_other_formats_of_bitsandbytes_are_decoded(dense, tmp_path, method, how):
    place, decoded = _bitsandbytes(dense, tmp_path / "m", **how)
    model, _ = load_base(place, method)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, NF4Linear) == (method == "qlora") and not hasattr(model.config, "quantization_config")
    if method == "lora":
        torch.testing.assert_close(layer.weight, decoded, rtol=2**-8, atol=1e-6)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(5, 12)[None]).logits).all()


def _rewritten(dense, directory, change, config):
    """The model in bf16 with its projections as `change` gives them, and a quantization_config."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(directory)
    file, written = directory / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        written |= change(name, tensor) if "_proj.weight" in name else {name: tensor}
    save_file(written, file, metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return str(directory)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def _blockwise(name, weight):
    """What a file holds of a weight in FP8: 4 bits of mantissa, and a power of two for every block."""
    rows, columns = (-(-size // 32) for size in weight.shape)
    scale = 2.0 ** torch.randint(-8, -4, (rows, columns))
    wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
    return {name: (weight.float() / wide).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_fp8_is_decoded(dense, tmp_path, method):
    decoded = {}

    def blockwise(name, weight):
        packed, scale = (held := _blockwise(name, weight)).values()
        wide = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: weight.shape[0], : weight.shape[1]]
        decoded[name] = packed.float() * wide
        return held

    model, _ = load_base(_rewritten(dense, tmp_path / "m", blockwise, FP8), method)
    layer = model.get_submodule(LAYER)
    if method == "lora":
        assert torch.equal(layer.weight, decoded[f"{LAYER}.weight"])
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}, "not that of the files"
    assert isinstance(layer, NF4Linear) == (method == "qlora") and not hasattr(model.config, "quantization_config")


def _in_nf4(name, weight):
    return quantize_nf4(weight, 64, True).state_dict(name.removesuffix("weight"))


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("pack", "config"), [(_in_nf4, NF4), (_blockwise, FP8)], ids=["nf4", "fp8"])
def test_single_experts_of_a_file_are_decoded_and_fused(tmp_path, monkeypatch, pack, config, method):
    """As transformers 4 and the makers of FP8 wrote them; in shards, without transformers' own reader."""
    tiny_architectures.make("qwen3_moe", tmp_path / "dense")
    place, packed = _rewritten(tmp_path / "dense", tmp_path / "m", pack, config), {}
    for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
        packed.setdefault(re.match(r"(.*\.weight)(?=[._]|$)", name)[1], {})[name] = tensor
    plain = {}
    for name, parts in packed.items():
        if len(parts) == 1:
            plain |= parts
        elif config is NF4:
            plain[name] = NF4Tensor.from_state_dict(parts, name.removesuffix("weight")).dequantize().contiguous()
        else:
            codes, scales = parts[name].float(), parts[f"{name}_scale_inv"].repeat_interleave(32, 0)
            plain[name] = codes * scales.repeat_interleave(32, 1)[: len(codes), : codes.shape[1]]
    save_file(plain, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    expected, _ = load_base(str(tmp_path / "dense"), method)
    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "from_pretrained", None)
    model, _ = load_base(place, method)
    assert not hasattr(model.config, "quantization_config")
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if config is not NF4 or "experts" in name or method == "lora":  # linear layers are taken as they are
            assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name
    assert sum(isinstance(module, NF4Experts) for module in model.modules()) == 4 * (method == "qlora")


def test_blocks_of_fp8_at_the_edges_and_one_scale_for_all():
    weight, scales = torch.randn(3, 40, 70).to(torch.float8_e4m3fn), torch.rand(3, 2, 3) + 0.1
    decoded = decode_fp8(weight, scales, (32, 32))
    for e, row, column in ((0, 31, 31), (1, 32, 64), (2, 39, 69)):
        assert decoded[e, row, column] == weight[e, row, column].float() * scales[e, row // 32, column // 32]
    assert torch.equal(decode_fp8(weight, torch.tensor(0.5)), weight.float() / 2)
    with pytest.raises(ValueError, match=r"must have scales \(3, 1, 1\), got \(3, 2, 3\)"):
        decode_fp8(weight, scales)
    with pytest.raises(ValueError, match=r"FP8 with floating-point scales is read, got torch\.int8"):
        decode_fp8(weight.view(torch.int8), scales)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_what_was_decoded_is_written_as_it_is_now(tmp_path, kind):
    """Nor are the scales written again, nor experts that transformers would not find."""
    tiny_architectures.make(kind, tmp_path / "dense")
    model, _ = load_base(_rewritten(tmp_path / "dense", tmp_path / "m", _blockwise, FP8), "lora")
    model.save_pretrained(tmp_path / "out")
    read, found = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "aqlm", "hqq", "torchao", "own"])
@pytest.mark.parametrize("inner", [False, True], ids=["config", "text_config"])
def test_what_is_not_read_is_refused_by_its_name(dense, tmp_path, method, inner):
    place = Path(_rewritten(dense, tmp_path / "m", lambda name, tensor: {name: tensor}, {"quant_method": method}))
    if inner:
        config = json.loads((place / "config.json").read_text())
        config["text_config"] = {"quantization_config": config.pop("quantization_config")}
        (place / "config.json").write_text(json.dumps(config))
    for way in ("lora", "qlora"):
        with pytest.raises(ValueError, match=f"weights are in {method}, which is not read here; take .*16 bits"):
            load_base(str(place), way)


@pytest.mark.parametrize(("config", "said"), [
    ({"bits": 4}, "weights are in a format that has no name, which is not read here; take .*16 bits"),
    ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, r"the files \(in bitsandbytes; the checkpoint in 16 bits"),
])  # fmt: skip
def test_a_format_that_is_read_in_part_or_has_no_name(dense, tmp_path, config, said):
    pytest.importorskip("bitsandbytes")

    def alien(name, tensor):
        return {name: tensor, f"{name}.alien": tensor[0].clone()}

    with pytest.raises(ValueError, match=said):
        load_base(_rewritten(dense, tmp_path / "m", alien, config))


def _gguf(dense, path):
    """The model as llama.cpp's converter writes it: other names, and q and k with their halves interleaved."""
    gguf = pytest.importorskip("gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", "ab", *(chr(65 + n) for n in range(config.vocab_size - 2))])
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output_norm.weight": model.model.norm.weight}
    for index, block in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = block.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):
                n = heads if theirs == "attn_q" else kv_heads
                weight = weight.view(n, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{index}.{theirs}.weight"] = weight
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_gguf_by_file_and_by_directory(dense, tmp_path, method):
    expected, ids = _gguf(dense, tmp_path / "m.gguf"), torch.arange(5, 12)[None]
    for place in (tmp_path / "m.gguf", tmp_path):
        model, tokenizer = load_base(str(place), method)
        if method == "lora":
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert isinstance(model.get_submodule(LAYER), NF4Linear) == (method == "qlora")
        if method == "lora":
            model.save_pretrained(tmp_path / "saved")  # no mark of GGUF is left that would forbid it
        assert tokenizer.convert_ids_to_tokens(0) == "<|end|>"
    (tmp_path / "other.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    with pytest.raises(ValueError, match=r"name one of the GGUF files 'm\.gguf', 'other\.gguf'"):
        load_base(str(tmp_path), method)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"--model .*other\.gguf, tokenizer: .+") as caught:
        load_base(str(tmp_path / "other.gguf"), method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "llama4", "mistral3"])
def test_qlora_keeps_what_a_model_has_beside_its_text(name, tmp_path):
    tiny_architectures.make(name, place := str(tmp_path / name))
    dense, _ = load_base(place)
    packed, _ = load_base(place, "qlora")
    parts = tuple(f"{part}." for part in other_parts(packed))
    assert parts and not any(path.startswith(parts) for path, m in packed.named_modules() if isinstance(m, NF4Linear))
    assert any(isinstance(m, NF4Linear) for m in packed.modules())
    kept = {name: p for name, p in packed.named_parameters() if name.startswith(parts)}
    assert kept and all(torch.equal(p, dense.get_parameter(name)) for name, p in kept.items())
