"""quantize_model on real Hugging Face classes, and loading shard by shard."""

import re
import subprocess
import sys

import pytest
import torch
from handtuned.quant import NF4Linear, load_quantized, quantization_summary, quantize_model
from safetensors.torch import load_model, save_model
from torch import nn


def _tiny(kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes, **small, num_key_value_heads=2, **options),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, **small, num_key_value_heads=2, **options),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes, **small),
        "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, **small),
        "falcon": lambda: transformers.FalconConfig(**sizes, **small),
    }[kind]()
    return config, lambda: transformers.AutoModelForCausalLM.from_config(config).eval()


def _kinds(model):
    return {path for path, module in model.named_modules() if isinstance(module, NF4Linear)}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_is_quantized_except_its_head(tied):
    _, build = _tiny("llama", tie_word_embeddings=tied)
    model = build()
    ids = torch.randint(0, 100, (2, 9))
    before, head, weight = model(ids).logits, model.lm_head, model.model.layers[0].mlp.up_proj.weight
    assert quantize_model(model) is model
    assert len(_kinds(model)) == 14 and model.lm_head is head and type(head) is nn.Linear
    up = model.model.layers[0].mlp.up_proj
    assert torch.equal(up.dequantize().weight, NF4Linear.from_linear(_linear_of(weight)).dequantize().weight)
    after = model(ids).logits
    assert 0 < (after - before).norm() / before.norm() < 0.3
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    quantize_model(model)
    assert {path: model.get_submodule(path) for path in layers} == layers, "a second call changed something"


def _linear_of(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight.data)
    return linear


@pytest.mark.parametrize("kind, count", [("qwen2", 14), ("gpt_neox", 8), ("gpt2", 8), ("falcon", 8)])
def test_other_families(kind, count):
    _, build = _tiny(kind)
    model, ids = build(), torch.randint(0, 100, (2, 9))
    before = model(ids).logits
    quantize_model(model, double_quant=False, block_size=32, compute_dtype=torch.float32)
    assert len(_kinds(model)) == count
    assert (model(ids).logits - before).norm() / before.norm() < 0.3


def test_layers_that_their_model_wants_in_fp32_are_left():
    """T5 casts its input to the dtype of `wo.weight`; bytes there would be a disaster."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=50)
    model = quantize_model(transformers.T5ForConditionalGeneration(config))
    assert not any(path.endswith(".wo") for path in _kinds(model)) and _kinds(model)


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 4)


def test_skip_takes_whole_parts_of_paths():
    def quantized(skip):
        model = nn.ModuleDict({"layers": nn.ModuleList([_Block(), _Block()]), "lm_head": nn.Linear(64, 8)})
        return _kinds(quantize_model(model, skip=skip))

    everything = {f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "down_proj")} | {"lm_head"}
    assert quantized(()) == everything, "MultiheadAttention reaches for its out_proj's weight and keeps it"
    assert quantized(("lm_head",)) == everything - {"lm_head"}
    assert quantized(("layers.1.q_proj",)) == everything - {"layers.1.q_proj"}
    assert quantized(("q_proj", "lm_head")) == {"layers.0.down_proj", "layers.1.down_proj"}
    assert quantized(("layers.0",)) == {"layers.1.q_proj", "layers.1.down_proj", "lm_head"}
    with pytest.raises(ValueError, match="skip names 'proj'"):
        quantized(("proj",))
    with pytest.raises(ValueError, match="skip names ''"):
        quantized(("",))
    with pytest.raises(TypeError, match="the string 'lm_head'"):
        quantized("lm_head")
    for wrong in (None, iter(["lm_head"])):  # what can be read once only would skip nothing
        with pytest.raises(TypeError, match=f"skip must be a sequence of names, got {wrong!r}"):
            quantized(wrong)


def test_a_shared_module_stays_shared():
    shared = nn.Linear(64, 64)
    model = quantize_model(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert isinstance(model["a"], NF4Linear) and model["a"] is model["b"][0]


def test_errors_name_model_and_layer():
    with pytest.raises(ValueError, match=r"must hold an nn\.Linear"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"NF4Linear\.from_linear"):
        quantize_model(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="block_size"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), block_size=3)
    with pytest.raises(TypeError, match=r"compute_dtype must be a floating-point .* or None, got 'bfloat16'"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), compute_dtype="bfloat16")
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64)))
    model[1][0].weight.data[0, :3] = float("nan")
    with pytest.raises(ValueError, match=r"1\.0\.weight must be finite, got 3 NaN"):
        quantize_model(model)


def test_summary_adds_up():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 128), nn.Linear(128, 64, bias=False)).half()
    quantize_model(model)
    summary = quantization_summary(model)
    nf4, embedding = summary.rows
    assert (nf4.kind, nf4.modules, nf4.parameters) == ("NF4Linear", 2, 2 * 64 * 128 + 128)
    assert nf4.bytes_before == 2 * nf4.parameters
    assert nf4.bytes_after == sum(m.quantized.nbytes for m in (model[1], model[2])) + 2 * 128
    assert (embedding.bytes_before, embedding.bytes_after) == (1280, 1280)
    assert summary.total.bytes_after == nf4.bytes_after + 1280
    assert [line.split()[0] for line in str(summary).splitlines()[1:]] == ["NF4Linear", "Embedding", "total"]


MIXTURES = {
    "Qwen3-30B-A3B": ("Qwen3MoeConfig", 61.1, 16.7, {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
        "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "tie_word_embeddings": False}),
    "gpt-oss-20b": ("GptOssConfig", 41.8, 12.5, {"num_hidden_layers": 24, "num_local_experts": 32}),
    "OLMoE-1B-7B": ("OlmoeConfig", 13.8, 3.9, {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64}),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_what_published_mixtures_of_experts_take(name):
    """Gigabytes in bf16 and in NF4, of models that hold no memory here."""
    kind, before, after, sizes = MIXTURES[name]
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(**sizes)
    model = _meta(lambda: transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    total = quantization_summary(quantize_model(model)).total
    assert (round(total.bytes_before / 1e9, 1), round(total.bytes_after / 1e9, 1)) == (before, after)


def test_a_large_model_shows_a_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    from handtuned.quant import model as module

    monkeypatch.setattr(module, "BAR_FROM", 1)
    quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert "2/2" in capsys.readouterr().err


def _rename(key):
    return key.replace("embed_out", "lm_head")  # what transformers calls it in GPT-NeoX's files


def _meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_loading_by_shards_equals_quantizing_after(kind, tmp_path):
    """Tied and untied heads, biases, rotary buffers that no file holds, GPT-2's transposed weights."""
    safetensors = pytest.importorskip("safetensors.torch")
    _, build = _tiny(kind, **({"tie_word_embeddings": True} if kind == "qwen2" else {}))
    model, ids = build(), torch.randint(0, 100, (2, 9))
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    loaded = load_quantized(_meta(build), tmp_path / "dense", rename=_rename)
    assert torch.equal(loaded(ids).logits, quantize_model(model)(ids).logits)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    if kind == "qwen2":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    state = {k: v for k, v in loaded.state_dict().items() if k != "lm_head.weight" or kind in ("llama", "gpt_neox")}
    safetensors.save_file(state, tmp_path / "nf4.safetensors")
    again = load_quantized(_meta(build), tmp_path / "nf4.safetensors")
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def _sequence(count=2, size=64):
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(count)), nn.LayerNorm(size))


def test_a_layer_whose_name_begins_with_weight(tmp_path):
    """weights_proj of an indexer: `.weight` is the end of a name, not any part of it."""
    save_file = pytest.importorskip("safetensors.torch").save_file

    def build():
        return nn.ModuleDict({"indexer": nn.ModuleDict({"weights_proj": nn.Linear(64, 64)})})

    model = build()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded, quantized = load_quantized(_meta(build), tmp_path).state_dict(), quantize_model(model).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in quantized.items())


def test_loading_is_strict(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    state = _sequence().state_dict()

    def load(changes, **options):
        save_file({k: v for k, v in (state | changes).items() if v is not None}, path)
        return load_quantized(_meta(_sequence), path, **options)

    model = load({}, dtype=torch.bfloat16, double_quant=False)
    assert model[2].weight.dtype == model[0].bias.dtype == torch.bfloat16 and model[0].nested_absmax is None
    for changes, message in (
        ({"2.bias": None, "1.weight": None}, r"2 missing \['1.weight', '2.bias'\]"),
        ({"extra": torch.zeros(1)}, r"1 unknown \['extra'\]"),
        ({"1.weight": torch.zeros(64, 65)}, "1.weight must be 64 × 64"),
        ({"2.weight": torch.zeros(65)}, r"2.weight must be \(64,\)"),
        ({"0.weight": torch.full((64, 64), float("nan"))}, r"0.weight must be finite, got 4096 NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            load(changes)
    with pytest.raises(ValueError, match="on the meta device"):
        load_quantized(_sequence(), path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_quantized(_meta(_sequence), tmp_path / "nowhere.safetensors")


class _WithTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_a_buffer_that_nobody_computes_is_an_error(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(_WithTable().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not recompute its buffers.*table"):
        load_quantized(_meta(_WithTable), tmp_path)


PEAK = """
import re, sys, torch
from torch import nn
from handtuned.quant import load_quantized, quantize_nf4
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
import safetensors
quantize_nf4(torch.randn(1024, 1024))
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
load_quantized(model, sys.argv[1])
print("MB", status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_4_bit_size_and_one_shard(tmp_path):
    """96 MiB of weights in six shards of 16 become 12.4 MiB; 28 MiB were the peak when this was written."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    for shard in range(6):
        weights = {f"{4 * shard + i}.weight": torch.randn(1024, 1024) for i in range(4)}
        save_file(weights, tmp_path / f"{shard}.safetensors")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(re.search(r"MB ([\d.]+)", done.stdout)[1]) < 12.4 + 16 + 12


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 1000])
def test_safetensors_saves_a_model(size, double_quant, each_backend, device, tmp_path):
    """It refuses entries that share memory, or that are a part of a longer array."""
    models = [
        nn.ModuleList(NF4Linear.from_linear(nn.Linear(size, n), 64, double_quant).to(device) for n in (3, 96))
        for _ in range(2)
    ]
    save_model(models[0], tmp_path / "model.safetensors")
    load_model(models[1], tmp_path / "model.safetensors")
    saved, loaded = (model.state_dict() for model in models)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
