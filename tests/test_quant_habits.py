"""4-bit layers in what people put around a model: replicas, default devices, other processes, classes of their own."""

import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from adapted_models import model_of
from handtuned.nn import apply_lora_to_model
from handtuned.quant import NF4Linear, load_quantized, quantization_summary, quantize_model
from handtuned.quant.experts import dequantize_experts
from safetensors.torch import save_model
from test_quant_experts import build
from torch import nn

transformers = pytest.importorskip("transformers")


def test_a_replica_of_data_parallel_computes():
    """It holds its tensors as plain attributes, as nn.DataParallel makes it for a second GPU."""
    layer, x = NF4Linear(64, 32), torch.randn(3, 64)
    replica = layer._replicate_for_data_parallel()
    assert not replica._parameters
    replica.weight, replica.bias = layer.weight.data, layer.bias.data
    assert torch.equal(replica(x), layer(x))


def test_shapes_on_the_meta_device():
    layer = NF4Linear(64, 32, device="meta")
    assert layer(torch.empty(2, 5, 64, device="meta")).shape == (2, 5, 32)


def test_tables_lie_in_memory_wherever_the_package_is_imported():
    code = (
        "import torch\nwith torch.device('meta'):\n    from handtuned.quant import mxfp4\n"
        "print(mxfp4.decode_mxfp4(torch.full((1, 16), 0x21, dtype=torch.uint8), torch.full((1,), 127).byte())[:2])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "[0.5000, 1.0000]" in done.stdout, done.stderr


class Reader(nn.Module):
    """Its method has text at the first column, which an indented block of Python may."""

    def __init__(self):
        super().__init__()
        self.proj, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        """
Text
        """
        return F.linear(x, self.proj.weight) + self.other(x)


@pytest.mark.filterwarnings("ignore:left dense")
def test_a_method_with_text_at_the_first_column_is_read():
    model = quantize_model(nn.ModuleDict({"reader": Reader()}))
    assert type(model["reader"].proj) is nn.Linear and isinstance(model["reader"].other, NF4Linear)


def test_a_summary_of_nothing():
    assert "total" in str(quantization_summary(nn.ReLU()))


@pytest.mark.filterwarnings("ignore")
def test_experts_quantized_in_two_calls_are_saved_as_the_checkpoint_had_them(tmp_path):
    model, plain = build("mixtral"), build("mixtral")
    quantize_model(model, skip=["lm_head", "layers.0"])
    quantize_model(model)
    dequantize_experts(model)
    assert getattr(model, "_weight_conversions", None) == getattr(plain, "_weight_conversions", None)


@pytest.mark.filterwarnings("ignore")
def test_experts_of_another_process_run(tmp_path):
    model, ids = quantize_model(build("mixtral")), torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, tmp_path / "logits.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\nmodel = pickle.load(open(sys.argv[1] + '/model.pkl', 'rb'))\n"
        "logits = model(torch.arange(5, 20)[None]).logits\n"
        "torch.testing.assert_close(logits, torch.load(sys.argv[1] + '/logits.pt'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_class_keeps_in_fp32_stays_so(tmp_path, monkeypatch, dtype):
    """As transformers loads it: the strict list in both dtypes, the other one in float16."""
    kind = transformers.LlamaForCausalLM
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2)  # fmt: skip
    kind(config).save_pretrained(tmp_path)
    monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", ["input_layernorm", "up_proj"])
    monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["post_attention_layernorm"])
    with torch.device("meta"):
        model = kind(config)
    load_quantized(model, tmp_path, dtype=dtype)
    theirs = {name: p.dtype for name, p in kind.from_pretrained(tmp_path, dtype=dtype).named_parameters()}
    ours = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.uint8}
    assert ours == {name: theirs[name] for name in ours}
    assert ours["model.layers.0.mlp.up_proj.weight"] == torch.float32 and len(set(ours.values())) == 2


def test_a_compiled_classifier_is_quantized_but_for_its_head():
    model = model_of("bert", transformers.AutoModelForSequenceClassification, num_labels=3)
    quantize_model(torch.compile(model, backend="eager"))
    assert type(model.classifier) is nn.Linear
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, NF4Linear)


def test_a_head_that_the_files_hold_in_4_bits_is_taken_so(tmp_path):
    """As bitsandbytes and an earlier version wrote it."""
    saved, auto = (model_of("bert", transformers.AutoModelForSequenceClassification, num_labels=3) for _ in range(2))
    quantize_model(saved)
    saved.classifier = NF4Linear.from_linear(saved.classifier)
    save_model(saved, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(auto.config)
    load_quantized(model, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert isinstance(model.classifier, NF4Linear) and torch.equal(model.eval()(ids).logits, saved.eval()(ids).logits)


def test_a_bias_that_is_a_slice_of_a_longer_one(kernel_backend):
    """Of an interleaved qkv bias each third: the kernels read it with its stride."""
    whole = torch.randn(3 * 64).half()
    layer = nn.Linear(64, 64).half()
    layer.bias = nn.Parameter(whole[0::3])
    model = apply_lora_to_model(nn.Sequential(layer), 4, target_modules=["0"])
    packed = NF4Linear.from_linear(layer)
    packed.bias = layer.bias
    x = torch.zeros(5, 64).half()
    for module in (model, packed):
        assert torch.equal(module(x), whole[0::3].expand(5, -1))
