"""gpt-oss as it is published: experts in MXFP4, decoded, kept in their bytes or made NF4, trained and merged."""

import json

import finetuned
import pytest
import tiny_architectures
import torch
from handtuned.nn.live_memory import LiveMemory
from handtuned.quant import NF4Experts, NF4Linear, quantization_summary
from handtuned.quant.linear import FrozenNF4
from handtuned.quant.mxfp4 import DECODING, MXFP4Experts, decode_mxfp4
from safetensors.torch import load_file, save_file

from handtuned.cli import main
from handtuned.memory import estimate
from handtuned.training.loading import load_base

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("transformers.integrations.mxfp4")
IDS = torch.arange(4, 44)[None]
SKIPPED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny gpt-oss with its experts in MXFP4, and the same decoded by transformers, as a plain checkpoint."""
    root = tmp_path_factory.mktemp("gpt-oss")
    for name in ("mxfp4", "plain"):
        tiny_architectures.make("gpt_oss", root / name)
    held, generator = load_file(root / "mxfp4" / "model.safetensors"), torch.Generator().manual_seed(0)
    packed, plain = {}, {}
    for name, weight in held.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            E, inputs, outputs = weight.shape
            blocks = torch.randint(0, 256, (E, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(119, 124, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            packed[name] = plain[name] = weight
    for name, tensors in (("mxfp4", packed), ("plain", plain)):
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    path = root / "mxfp4" / "config.json"
    how = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": SKIPPED}}
    path.write_text(json.dumps(json.loads(path.read_text()) | how))
    return root


def experts(model, kind=torch.nn.Module):
    return {path: m for path, m in model.named_modules() if path.endswith("_proj") and isinstance(m, kind)
            and ".experts." in path}  # fmt: skip


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_and_scale_is_decoded_as_by_transformers(dtype):
    """Bit for bit; in fp16 where it holds them (to 2^-24 and 65504)."""
    low, high = (112, 139) if dtype == torch.float16 else (2, 252)
    scales = torch.arange(low, high, dtype=torch.uint8).view(1, 1, -1)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)[:, None, :].expand(16, scales.numel(), 16)
    scales = scales.expand(1, 16, -1)
    expected = theirs.convert_moe_packed_tensors(blocks[None], scales, dtype=dtype)
    ours = decode_mxfp4(blocks[None], scales, dtype)
    assert ours.dtype == dtype and torch.equal(ours.mT, expected) and len(expected.unique()) > 100


def test_lora_on_the_decoded_weights(published):
    model, _ = load_base(str(published / "mxfp4"), "lora")
    plain, _ = load_base(str(published / "plain"), "lora")
    ours, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert torch.equal(logits(model), logits(plain)) and not hasattr(model.config, "quantization_config")


def test_kept_in_their_bytes(published):
    model, _ = load_base(str(published / "mxfp4"), "qlora")
    held = load_file(published / "mxfp4" / "model.safetensors")
    found = experts(model, MXFP4Experts)
    assert len(found) == 2 * len(model.model.layers)
    for path, module in found.items():
        assert torch.equal(module.weight, held[f"{path}_blocks"]) and torch.equal(module.absmax, held[f"{path}_scales"])
    assert isinstance(model.model.layers[0].self_attn.q_proj, NF4Linear)
    row = next(row for row in quantization_summary(model).rows if row.kind == "MXFP4Experts")
    assert row.bytes_after == row.parameters * 17 / 32
    plain, _ = load_base(str(published / "plain"), "qlora")
    for path in experts(plain, NF4Experts):
        layer, child = plain.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        delattr(layer, child)
        layer.register_parameter(child, torch.nn.Parameter(found[path].dequantize(), requires_grad=False))
    results = []
    for one in (model, plain):
        embedding = one.get_input_embeddings().weight.requires_grad_(True)
        out = one(input_ids=IDS, use_cache=False).logits
        results.append((out.detach(), *torch.autograd.grad(out.square().mean(), embedding)))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 2e-6 * expected.norm()


def test_a_scale_that_is_no_number_is_refused():
    layer = torch.nn.Module()
    layer.up_proj = torch.nn.Parameter(torch.zeros(2, 32, 3))
    scales = torch.full((2, 3, 1), 127, dtype=torch.uint8)
    scales[1, 2] = 255
    module = MXFP4Experts(torch.zeros(2, 3, 1, 16, dtype=torch.uint8), scales)
    with pytest.raises(ValueError, match=r"layer\.up_proj must be finite"):
        module.take_place(torch.nn.ModuleDict({"layer": layer}), "layer.up_proj")


def test_made_nf4(published):
    model, _ = load_base(str(published / "mxfp4"), "qlora", requantize=True)
    plain, _ = load_base(str(published / "plain"), "qlora")
    assert not experts(model, MXFP4Experts) and len(experts(model, NF4Experts)) == 2 * len(model.model.layers)
    for (name, ours), (other, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, expected), name


def test_decoding_needs_little_more_than_the_expert():
    blocks = torch.randint(0, 256, (64, 90, 16), dtype=torch.uint8)
    scales = torch.full((64, 90), 120, dtype=torch.uint8)
    with LiveMemory("cpu") as memory:
        decode_mxfp4(blocks, scales, torch.bfloat16)
    assert memory.peak_added <= 1.02 * DECODING * 2 * blocks.numel()


@pytest.mark.parametrize("requantize", [False, True], ids=["kept", "nf4"])
@pytest.mark.parametrize("loaded", [False, True], ids=["files", "model"])
def test_their_bytes_are_estimated(published, requantize, loaded):
    """To the byte, as the model holds them."""
    place = str(published / "mxfp4")
    model, _ = load_base(place, "qlora", torch.bfloat16, requantize=requantize)
    held = sum(p.nbytes for p in model.parameters())
    scales = sum(b.nbytes for m in model.modules() if isinstance(m, FrozenNF4)
                 for name, b in m.named_buffers(recurse=False) if name != "nested_code")  # fmt: skip
    found = estimate(model if loaded else place, "qlora", "bfloat16", batch=1, seq=32, requantize=requantize)
    assert (found["weights"], found["quantization constants"]) == (held, scales)


def test_an_adapter_on_experts_made_nf4_fits_the_dense_copy(published, tmp_path, capsys):
    """Whose experts are made NF4 with the very bits; generating and merging know no flag for it."""
    rows = tiny_architectures.write_rows(tmp_path / "rows.jsonl")
    words = ["finetune", "--model", published / "mxfp4", "--data", rows, "--batch-size", 2, "--max-seq-length", 48,
             "--max-steps", 1, "--eval-fraction", 0.125, "--requantize", "--output-dir", tmp_path / "run"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert main(["generate", "--adapter", str(tmp_path / "run"), "--model", str(published / "plain"), "lamp red",
                 "--max-new-tokens", "2"]) == 0  # fmt: skip
    assert "not, bit for bit" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--requantize"], ["--method", "lora"]], ids=["kept", "nf4", "dense"])
def test_trained_resumed_and_merged(published, flags, tmp_path):
    """With adapters on the experts. Merging compares the logits of the directory, read by transformers, itself."""
    rows = tiny_architectures.write_rows(tmp_path / "rows.jsonl")
    words = ["finetune", "--model", published / "mxfp4", "--data", rows, "--batch-size", 2, "--max-seq-length", 48,
             "--target-parameters", "experts.gate_up_proj,experts.down_proj", "--learning-rate", "1e-2",
             "--eval-fraction", 0.125, "--save-steps", 1, "--max-steps", 3, *flags]  # fmt: skip
    assert main([str(word) for word in (*words, "--output-dir", tmp_path / "run")]) == 0
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any("experts.base_layer.lora_B" in key and tensor.abs().max() > 0 for key, tensor in adapter.items())
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "run" / file).unlink()
    done = tmp_path / "run" / "checkpoint-3"
    done.rename(tmp_path / "away")
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert adapter.keys() == again.keys() and all(torch.equal(adapter[key], again[key]) for key in adapter)
    merged = tmp_path / "merged"
    assert finetuned.merge(tmp_path / "run", merged, "--save-dtype", "float32") == 0
    _, found = transformers.AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(found.values()) and "quantization_config" not in json.loads((merged / "config.json").read_text())
