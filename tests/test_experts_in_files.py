"""Adapter files from before transformers fused experts: each expert's acts as it did, or the file is refused."""

import json
import re
import warnings

import pytest
import tiny_architectures
import torch
import transformers
from handtuned.nn import apply_lora_to_model, load_adapter, save_adapter
from handtuned.quant import quantize_model
from handtuned.quant.experts import experts_layers
from test_lora_experts import assert_equal_logits, build, filled, logits

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")
MIXTRAL, QWEN, SHORT = (".block_sparse_moe.", "w1 w3 w2"), (".mlp.", "gate_proj up_proj down_proj"), "w1 w3 w2"
OLD = {"mixtral": MIXTRAL, "phimoe": MIXTRAL, "qwen3_moe": QWEN, "olmoe": QWEN, "deepseek_v3": QWEN, "glm4_moe": QWEN,
       "qwen3_next": QWEN, "lfm2_moe": (".feed_forward.", SHORT)}  # fmt: skip
in_peft = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])  # no dense MLP, which PEFT would drop


def parts_of(model, kind):
    """Old path → view of the weight today, of all linear layers, routers and experts but the head."""
    block, names = OLD[kind]
    found = {path: m.weight for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del found["lm_head"]
    found |= {name.removesuffix(".weight"): p for name, p in model.named_parameters()
              if re.search(r"(mlp|feed_forward)\.(gate|router)\.weight$", name)}  # fmt: skip
    for name, fused in model.named_parameters():
        path, _, last = name.rpartition(".")
        for e in range(len(fused) if path.endswith("experts") else 0):
            halves = fused[e].chunk(2) if last == "gate_up_proj" else [fused[e]]
            found |= {f"{path}.{e}.{old}": half for old, half in zip(
                names.split()[:2] if last == "gate_up_proj" else names.split()[2:], halves, strict=True)}  # fmt: skip
    return {path.replace(".mlp.", block): weight for path, weight in found.items()}


def write(kind, directory, r=3, change=lambda tensors: None, **fields):
    """An adapter as PEFT wrote it for the modules of transformers 4, and the model with W + s·BA in their places."""
    torch.manual_seed(1)
    model, tensors = build(kind), {}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "use_rslora": False} | fields
    for path, weight in parts_of(model, kind).items():
        rank = next((n for end, n in config.get("rank_pattern", {}).items() if path.endswith(end)), r)
        A, B = torch.randn(rank, weight.shape[1]) * 0.1, torch.randn(len(weight), rank) * 0.1
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
        weight.data += 6 / (rank**0.5 if config["use_rslora"] else rank) * B @ A
    config.setdefault("target_modules", sorted({key.split(".")[-3] for key in tensors}))
    change(tensors)
    safetensors.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_dropout": 0.1}], ids=["plain", "rslora"])
@pytest.mark.parametrize("kind", OLD)
def test_each_expert_does_what_it_did(kind, fields, tmp_path):
    expected = write(kind, tmp_path, **fields)
    ours = build(kind)
    for _ in range(2):  # the second time into the adapter that is there
        load_adapter(ours, tmp_path)
        assert_equal_logits(ours, expected, build(kind))


@in_peft
def test_peft_makes_the_same_of_them(kind, tmp_path):
    write(kind, tmp_path)
    ours = build(kind)
    load_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert_equal_logits(ours, theirs, build(kind))
    save_adapter(ours, tmp_path / "again")
    again = safetensors.load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, tensor in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(again.pop(key), tensor)
    assert not again


@in_peft
def test_saved_again_they_are_what_every_reader_knows(kind, tmp_path):
    """With rsLoRA, which PEFT scales √2 times too much in gate_up_proj of the old file."""
    expected = write(kind, tmp_path, use_rslora=True)
    ours = build(kind)
    load_adapter(ours, tmp_path)
    save_adapter(ours, tmp_path / "again")
    assert_equal_logits(peft.PeftModel.from_pretrained(build(kind), tmp_path / "again").eval(), expected, build(kind))
    again = build(kind)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(ours))


def test_a_rank_of_its_own_for_the_last_projection_over_experts_in_4_bits(tmp_path):
    """ΔW of the fused experts is that of the file, whatever lies under them."""
    expected, plain, ours = write("mixtral", tmp_path, rank_pattern={"w2": 5}), build("mixtral"), build("mixtral")
    quantize_model(ours)
    report = load_adapter(ours, tmp_path)
    modules = dict(ours.named_modules())
    experts = [path for path in report.layers if ".experts." in path]
    assert len(experts) == 4 and not list(experts_layers(ours))
    for path in experts:
        assert modules[path].rank == (5 if path.endswith("down_proj") else 6)
        change = expected.get_parameter(path) - plain.get_parameter(path)
        assert (modules[path].delta_weight() - change).norm() <= 1e-6 * change.norm()


def without(*endings):
    """A change that takes tensors out of the file."""
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if re.search("|".join(endings), key)]


def another_shape(tensors):
    key = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
    tensors[key] = tensors[key][:, 1:].clone()


@pytest.mark.parametrize("change, fields, words", [
    (without(r"layers\.1\.mlp\.experts\.2\."), {}, "1.mlp.experts.down_proj needs .*the file has 3 of 4, such as"),
    (without("experts.*up_proj"), {}, "0.mlp.experts.gate_up_proj needs .* 2 projections of 4.*the file has 4 of 8"),
    (without(r"layers\.1\.mlp\.experts"), {}, "missing in the file: 'model.layers.1.mlp.experts.down_proj', 'model.la"),
    (without(r"layers\.1\.mlp\.gate\."), {}, "missing in the file: 'model.layers.1.mlp.gate'; unexpected"),
    (another_shape, {}, "1.mlp.experts.gate_up_proj needs plain LoRA of one rank, scaling and shape for all 2 proj"),
    (lambda t: None, {"rank_pattern": {"experts.1.up_proj": 2}}, "gate_up_proj needs plain LoRA of one rank"),
    (lambda t: None, {"alpha_pattern": {"experts.1.down_proj": 2}}, "down_proj needs plain LoRA of one rank"),
    (lambda t: t.update({"base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_magnitude_vector":
                         torch.ones(64)}), {}, "gate_up_proj needs plain LoRA"),
    (lambda t: t.update({key.replace("experts.3", "experts.4"): t[key].clone() for key in list(t)}), {},
     "the file has 5 of 4"),
    (lambda t: None, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj"]},
     "unexpected in the file: .*experts.0.down_proj'.*; experts that target_modules does not select"),
])  # fmt: skip
def test_what_cannot_be_put_together_is_refused_in_a_line(change, fields, words, tmp_path):
    write("qwen3_moe", tmp_path, change=change, **fields)
    model = build("qwen3_moe")
    keys = [*model.state_dict()]
    with pytest.raises(ValueError, match=words) as error:
        load_adapter(model, tmp_path)
    assert [*model.state_dict()] == keys and "\n" not in str(error.value)


def test_layers_of_an_old_name_are_found_by_both(tmp_path):
    """Laguna's shared experts, whose names of today transformers' table for old checkpoints would change again."""
    kind, bases = transformers.AutoModelForCausalLM, []
    for _ in range(3):
        torch.manual_seed(0)
        bases.append(kind.from_config(tiny_architectures.config_of("laguna"), dtype=torch.float32).eval())
    trained, ours, theirs = bases
    plain = logits(ours)
    filled(apply_lora_to_model(trained, 2, 4.0, ["gate_proj", "up_proj", "down_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(trained, tmp_path, save_for="peft")
    load_adapter(ours, tmp_path)
    for model in (ours, peft.PeftModel.from_pretrained(theirs, tmp_path).eval()):
        assert_equal_logits(model, trained, plain)


@pytest.mark.parametrize("fields", [
    {"layers_to_transform": [1]},
    {"target_modules": r".*layers\.1\.(self_attn\.[qkvo]_proj|mlp\.gate|mlp\.experts\.\d+\.(gate|up|down)_proj)"},
])  # fmt: skip
def test_a_config_that_selects_one_layer_by_the_old_names(fields, tmp_path):
    write("qwen3_moe", tmp_path, change=without(r"layers\.0\."), **fields)
    assert {path.split(".")[2] for path in load_adapter(build("qwen3_moe"), tmp_path).layers} == {"1"}
