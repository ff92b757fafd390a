"""Mixtures of experts of transformers in 4 bits: every layout, quantized in memory or while loading."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from handtuned.quant import NF4Experts, NF4Linear, load_quantized, quantization_summary, quantize_model
from handtuned.quant.experts import IMPLEMENTATION, dequantize_experts, experts_layers, quantize_experts
from helpers import assert_same_function, assert_within_budget
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},
    "deepseek_v3": GROUPS | {"moe_intermediate_size": 64, "kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16,
                             "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
    "glm4_moe": GROUPS | {"moe_intermediate_size": 64},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "lfm2_moe": {"num_experts": 4, "moe_intermediate_size": 64, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
                   "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.arange(2, 26).view(2, 12)


def build(kind, seed=0):
    config_class = transformers.CONFIG_MAPPING[kind]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**SIZES | KINDS[kind]), dtype=torch.float32)
    return model.eval()


def on_meta(kind):
    with torch.device("meta"):
        return build(kind)


def nf4(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, (NF4Experts, NF4Linear))}


def as_eager(layer, dtype):
    """A copy whose experts are dense again, run by its own forward."""
    dense = copy.deepcopy(layer)
    dequantize_experts(dense, dtype)
    if hasattr(dense, "config"):
        dense.config._experts_implementation = "eager"
    return dense


@pytest.mark.filterwarnings("ignore:The explicitly set RoPE")
@each_kind
def test_experts_are_quantized_and_compute_what_the_dense_ones_do(kind):
    """In fp64: logits, and the gradient of the embeddings, of the 4-bit model and of transformers' eager one."""
    model = build(kind)
    quantize_model(model)
    experts = [m for m in nf4(model).values() if isinstance(m, NF4Experts)]
    assert experts and not list(experts_layers(model))
    quantized = [m.quantized for m in nf4(model).values()]
    weights = sum(q.shape.numel() for q in quantized)
    assert sum(q.nbytes for q in quantized) <= 0.53 * weights
    results = []
    for one in (model.double(), as_eager(model, torch.float64)):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("embed" in name)
        logits = one(IDS, use_cache=False).logits
        logits.double().square().mean().backward()
        results.append((logits.double(), one.get_input_embeddings().weight.grad.double()))
    # some models compute their router or their mixer in fp32, whatever the dtype of the model
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def layer_of(gate, transposed, bias, norm, E=4, H=64, inner=32):
    """A layer of experts in one of the layouts that transformers' interface knows."""

    class Layer(nn.Module):
        def __init__(self, config):
            super().__init__()
            wide = 2 * inner if gate else inner
            up, down = ((H, wide), (inner, H)) if transposed else ((wide, H), (H, inner))
            self.num_experts, self.act_fn = E, nn.functional.silu
            for name, size, out in (("gate_up_proj" if gate else "up_proj", up, wide), ("down_proj", down, H)):
                self.register_parameter(name, nn.Parameter(torch.randn(E, *size) * 0.2))
                if bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, out)))
            if norm:
                self.post_expert_norm = nn.LayerNorm(H)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            """The loop over dense experts."""
            y = torch.zeros_like(hidden_states)
            name = "gate_up_proj" if gate else "up_proj"
            for e in range(E):
                token, place = torch.where(top_k_index == e)
                h = hidden_states[token]
                for child in (name, "down_proj"):
                    W = getattr(self, child)[e]
                    h = h @ W if transposed else nn.functional.linear(h, W)
                    h = h + getattr(self, f"{child}_bias")[e] if bias else h
                    if child == name:
                        h = self._apply_gate(h) if gate else self.act_fn(h)
                h = self.post_expert_norm(h) if norm else h
                y = y.index_add(0, token, (h * top_k_weights[token, place, None]).to(y.dtype))
            return y

    decorate = moe.use_experts_implementation(
        has_gate=gate, is_transposed=transposed, has_bias=bias, has_post_expert_norm=norm
    )
    layer = decorate(Layer)(transformers.LlamaConfig())
    quantize_experts(layer, (64, True, None), "layer")
    return layer


def run(layer, dtype, x, index, weights, dy):
    x, weights = (t.to(dtype).requires_grad_() for t in (x, weights))
    y = layer(x, index, weights)
    return y.detach(), *torch.autograd.grad(y, (x, weights), dy.to(dtype))


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gate"])
def test_every_layout_computes_what_its_dense_loop_does(gate, transposed, bias, norm):
    """In fp64, so that a fault of logic is not lost among roundings; and the same loop on the layer in 4 bits."""
    layer = layer_of(gate, transposed, bias, norm).double()
    x, dy, weights = torch.randn(11, 64), torch.randn(11, 64), torch.rand(11, 2)
    index = torch.rand(11, 4).topk(2).indices
    index[:, 0] = index[:, 0].clamp(max=2)  # the last expert has few rows, maybe none
    ours = run(layer, torch.float64, x, index, weights, dy)
    theirs = run(as_eager(layer, torch.float64), torch.float64, x, index, weights, dy)
    looped = copy.deepcopy(layer)
    looped.config._experts_implementation = "eager"
    by_loop = run(looped, torch.float64, x, index, weights, dy)
    for what, one, two, three in zip(("y", "dx", "router"), ours, theirs, by_loop, strict=True):
        assert_same_function(one, two, what)
        assert_same_function(three, two, f"{what} by the loop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_low_precision_is_as_close_as_transformers_own(each_backend, device, dtype):
    layer = layer_of(True, True, True, False).to(device)
    x, dy, weights = (torch.randn(size, device=device).to(dtype).float() for size in ((33, 64), (33, 64), (33, 2)))
    index = torch.rand(33, 4, device=device).topk(2).indices
    layer.to(dtype)
    ours = run(layer, dtype, x, index, weights, dy)
    exact = run(as_eager(layer.double(), torch.float64), torch.float64, x, index, weights, dy)
    low = run(as_eager(layer.to(dtype), dtype), dtype, x, index, weights, dy)
    for what, one, two, three in zip(("y", "dx", "router"), ours, exact, low, strict=True):
        assert_within_budget(one, two, three, 64 + 32, two.abs().max() * torch.ones_like(two), what)


def same_bits(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.filterwarnings("ignore:The explicitly set RoPE")
@each_kind
def test_loading_shard_by_shard_equals_quantizing_after(kind, tmp_path):
    """From the checkpoint as transformers writes it, most with a weight per expert; then from our own file."""
    model = build(kind)
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    quantize_model(model)
    loaded = load_quantized(on_meta(kind), tmp_path / "dense")
    assert same_bits(loaded, model)
    model.save_pretrained(tmp_path / "nf4")
    again = load_quantized(on_meta(kind), tmp_path / "nf4")
    assert same_bits(again, model)
    wanted = model(IDS, use_cache=False).logits
    assert torch.equal(again.eval()(IDS, use_cache=False).logits, wanted)
    other = quantize_model(build(kind, seed=1))
    safetensors.save_model(model, tmp_path / "nf4.safetensors")
    safetensors.load_model(other, tmp_path / "nf4.safetensors")
    assert same_bits(other, model)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:The explicitly set RoPE")
def test_a_model_that_is_dense_again_is_saved_as_its_checkpoint_was(kind, tmp_path):
    """As `merge` does: transformers writes a weight per expert where it read them so, and loads what it wrote."""
    build(kind).save_pretrained(tmp_path / "dense")
    model = load_quantized(on_meta(kind), tmp_path / "dense")
    for path, layer in nf4(model).items():
        if isinstance(layer, NF4Linear):
            model.set_submodule(path, layer.dequantize())
    dequantize_experts(model)
    model.save_pretrained(tmp_path / "again")
    names = [set(safetensors.load_file(tmp_path / part / "model.safetensors")) for part in ("dense", "again")]
    assert names[0] == names[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert same_bits(loaded, model)


def test_an_expert_that_no_file_holds_is_named(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    weights = safetensors.load_file(path)
    name = next(name for name in weights if "layers.1." in name and name.endswith("experts.3.w2.weight"))
    whole = weights.pop(name)
    safetensors.save_file(weights, path)
    with pytest.raises(ValueError, match=r"1 missing \['model.layers.1.mlp.experts.down_proj\[3\]'\]"):
        load_quantized(on_meta("mixtral"), tmp_path)
    safetensors.save_file(weights | {name: whole, name.replace(".3.", ".7."): whole.clone()}, path)
    with pytest.raises(ValueError, match=r"has 4 experts.*7"):
        load_quantized(on_meta("mixtral"), tmp_path)
    safetensors.save_file(weights | {name: whole * float("inf")}, path)
    with pytest.raises(ValueError, match=r"down_proj\[3\] must be finite"):
        load_quantized(on_meta("mixtral"), tmp_path)


def test_what_is_skipped_stays_dense_and_runs():
    model, dense = build("qwen3_moe"), build("qwen3_moe")
    quantize_model(model, skip=["lm_head", "layers.0.mlp.experts", "self_attn"])
    names = [path for path, m in nf4(model).items() if isinstance(m, NF4Experts)]
    assert names == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    skipped = model.model.layers[0].mlp.experts
    assert skipped.config._experts_implementation == IMPLEMENTATION
    same = dense.model.layers[0].mlp.experts
    x, index, weights = torch.randn(5, 64), torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
    assert torch.equal(skipped(x, index, weights), same(x, index, weights))
    assert quantization_summary(model).dense_experts == (("Qwen3MoeExperts", 4 * 3 * 64 * 64),)


def test_experts_that_cannot_be_reached_are_said_with_their_share():
    class HomeMadeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 64, 64))

    model = nn.Sequential(nn.Linear(64, 64, bias=False), HomeMadeExperts())
    with pytest.warns(UserWarning, match=r"80.0% of the parameters stay dense: expert weights of HomeMadeExperts"):
        quantize_model(model)
    assert "expert weights of HomeMadeExperts, 80.0% of the parameters" in str(quantization_summary(model))


@pytest.mark.parametrize("name", ["longcat_flash.LongcatFlash", "step3p7.Step3p7"])
def test_loops_of_a_layer_s_own(name):
    """Layers that do not go by the interface; Llama 4 and JetMoE are tested as models."""
    folder, _, kind = name.partition(".")
    modeling = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    config = SimpleNamespace(
        expert_ffn_hidden_size=32, n_routed_experts=4, zero_expert_num=0, hidden_size=64, hidden_act="silu",
        num_local_experts=4, moe_intermediate_size=32,
    )  # fmt: skip
    layer = getattr(modeling, f"{kind}Experts")(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    quantize_experts(layer, (64, True, None), "layer")
    x, dy, weights = torch.randn(11, 64), torch.randn(11, 64), torch.rand(11, 2)
    given = torch.float64, x, torch.rand(11, 4).topk(2).indices, weights, dy
    both = run(layer, *given), run(as_eager(layer, torch.float64), *given)
    for what, one, two in zip(("y", "dx", "router"), *both, strict=True):
        assert_same_function(one, two, what)


def test_no_more_than_one_expert_is_ever_dense():
    layer, biggest = layer_of(True, False, False, False, E=16), [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **kwargs or {})
            if isinstance(made, torch.Tensor) and made.is_floating_point():
                biggest[0] = max(biggest[0], made.numel())
            return made

    x, index, weights = torch.randn(8, 64), torch.arange(16).view(8, 2), torch.rand(8, 2)
    with Watch():
        run(layer, torch.float64, x, index, weights, torch.randn(8, 64))
    assert 0 < biggest[0] <= 64 * 64  # gate and up of one expert


def test_dtypes_devices_and_modes():
    """Codes and scales keep their dtypes; autocast and compute_dtype choose the product's."""
    layer = layer_of(True, False, True, False).bfloat16()
    kept = {name: t.dtype for name, t in layer.down_proj.state_dict().items()}
    assert kept == {"weight": torch.uint8, "absmax": torch.uint8, "nested_absmax": torch.float32,
                    "nested_code": torch.float32, "nested_offset": torch.float32}  # fmt: skip
    x, ends = torch.randn(5, 32), torch.tensor([1, 3, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.down_proj(x, ends).dtype == torch.bfloat16
    layer.down_proj.compute_dtype = torch.float64
    W = layer.down_proj.dequantize(torch.float64)[[0, 1, 1, 3, 3]]
    exact = (W @ x.double()[:, :, None])[:, :, 0]
    torch.testing.assert_close(layer.down_proj(x, ends), exact.float(), rtol=1e-6, atol=1e-6)
    again = quantize_model(nn.ModuleList([layer]))
    assert again[0] is layer and isinstance(layer.down_proj, NF4Experts)


PEAK = """
import re, sys, torch, transformers
from handtuned.quant import load_quantized
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def load(directory):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model = load_quantized(model, directory)
    return status("VmHWM") - before
load(sys.argv[1])
print("MB", load(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_4_bit_size_and_one_shard(tmp_path):
    """96 MiB of experts in shards of 8 MiB become 12.4 MiB."""
    for name, sizes in (("small", {}), ("large", {"hidden_size": 256, "intermediate_size": 512, "num_experts": 64})):
        config = transformers.OlmoeConfig(**SIZES | KINDS["olmoe"] | sizes | {"num_hidden_layers": 1})
        transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / name)
    [path] = (tmp_path / "large").glob("*.safetensors")
    weights = sorted(safetensors.load_file(path).items())
    path.unlink()
    for first in range(0, len(weights), 16):
        safetensors.save_file(dict(weights[first : first + 16]), path.with_name(f"model-{first:03}.safetensors"))
    megabytes = sum(tensor.nbytes for _, tensor in weights) / 2**20
    assert megabytes > 96
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(re.search(r"MB ([\d.]+)", done.stdout)[1]) < 0.516 / 4 * megabytes + 8 + 12
