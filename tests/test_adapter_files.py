"""Adapter files come from strangers: whatever is wrong gets a clear error, nothing runs, the model stays as it was."""

import io
import json
import pickle
import time

import pytest
import torch
from handtuned.nn import LoRALinear, apply_lora_to_model
from handtuned.nn.adapters import load_adapter, read_adapter_config, save_adapter
from safetensors.torch import load_file, save_file
from torch import nn

A = "base_model.model.block.q_proj.lora_A.weight"
B = "base_model.model.block.q_proj.lora_B.weight"


def pair(layer):
    """A fitting pair for a layer of this name."""
    prefix = f"base_model.model.{layer}"
    return {f"{prefix}.lora_A.weight": torch.ones(2, 6), f"{prefix}.lora_B.weight": torch.ones(5, 2)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 5), nn.Linear(6, 4, bias=False)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.head = nn.Embedding(7, 6), Block(), nn.Linear(6, 7)


def snapshot(model):
    """Everything about a model that loading could change."""
    modules = [(path, type(module)) for path, module in model.named_modules()]
    parameters = [(path, p, p.detach().clone(), p.requires_grad) for path, p in model.named_parameters()]
    return modules, parameters


def assert_unchanged(model, before):
    modules, parameters = before
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    now = dict(model.named_parameters())
    assert len(now) == len(parameters)
    for path, parameter, values, requires_grad in parameters:
        assert now[path] is parameter and parameter.requires_grad == requires_grad
        assert torch.equal(parameter, values)


@pytest.fixture
def files(tmp_path):
    model = apply_lora_to_model(Tiny(), rank=2, target_modules=["q_proj", "v_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    return tmp_path


def change_config(files, **fields):
    path = files / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(files, change):
    path = files / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def with_header(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def refused(files, message):
    for model in (Tiny(), apply_lora_to_model(Tiny(), rank=2, target_modules=["q_proj", "v_proj"])):
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, files)
        assert_unchanged(model, before)


def test_the_good_file_loads(files):
    load_adapter(Tiny(), files)


def test_pain_04_an_adapter_is_never_silently_not_loaded(files):
    """Keys without PEFT's prefix: PEFT loads such a file "fine", with nothing applied."""
    path = files / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}, path)
    refused(files, "does not begin with 'base_model.model.'")


# The weights


WANTS = r"in the file, but the model and the config want .'lora_A': \(2, 6\)"
TENSOR_FAULTS = {
    "missing key": (lambda t: t.pop(B), r"block.q_proj is .'lora_A': \(2, 6\). in the file, but"),
    "missing layer": (lambda t: [t.pop(A), t.pop(B)], "missing in the file: 'block.q_proj'"),
    "extra layer": (lambda t: t.update(pair("block.k_proj")), "unexpected in the file: 'block.k_proj'"),
    "extra tensor": (lambda t: t.update({"base_model.model.x": t[A].clone()}), "unexpected in the file: 'x'"),
    "module that is not linear": (lambda t: t.update(pair("embed")), "unexpected in the file: 'embed'"),
    "wrong rank": (lambda t: t.update({A: torch.ones(3, 6), B: torch.ones(5, 3)}), r"\(3, 6\).*" + WANTS),
    "rank differs within the pair": (lambda t: t.update({A: torch.ones(3, 6)}), r"\(3, 6\).*" + WANTS),
    "wrong inputs": (lambda t: t.update({A: torch.ones(2, 8)}), r"\(2, 8\).*" + WANTS),
    "wrong outputs": (lambda t: t.update({B: torch.ones(9, 2)}), r"\(9, 2\).*" + WANTS),
    "rank zero": (lambda t: t.update({A: torch.ones(0, 6), B: torch.ones(5, 0)}), WANTS),
    "one dimension": (lambda t: t.update({A: torch.ones(12)}), WANTS),
    "three dimensions": (lambda t: t.update({A: torch.ones(2, 6, 1)}), WANTS),
    "NaN": (lambda t: t[A].fill_(float("nan")), "NaN or infinite"),
    "infinite": (lambda t: t[B].view(-1)[3:4].fill_(float("inf")), "NaN or infinite"),
    "integers": (lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int32)}), "torch.int32, expected one of torch"),
    "embedding adapter": (
        lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.ones(2, 7)}),
        "unexpected in the file: 'embed.lora_embedding_A'",
    ),
    "adapter bias": (lambda t: t.update({A.replace("weight", "bias"): torch.ones(2)}), "unexpected .*lora_A.bias'"),
    "DoRA that the config denies": (
        lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(5)}),
        r"'lora_magnitude': \(5,\). in the file",
    ),
    "path upwards": (lambda t: t.update({"base_model.model.../../x.lora_A.weight": torch.ones(2)}), r"unexpected .*/x"),
    "absolute path": (lambda t: t.update({"/etc/passwd": torch.ones(2, 6)}), "does not begin with"),
    "attribute of every object": (lambda t: t.update(pair("block.__class__")), "unexpected .*'block.__class__'"),
    "nothing inside": (lambda t: t.clear(), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_wrong_tensors(files, change, message):
    change_tensors(files, change)
    refused(files, message)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BYTES = {
    "empty": (b"", "header too small"),
    "seven bytes": (b"\x01" * 7, "header too small"),
    "header longer than the file": (b"\xff" * 8 + b"{}", "header too large"),
    "huge header": ((2**25).to_bytes(8, "little") + b" " * 2**25, "EOF while parsing"),
    "no JSON": (with_header(b"\x00\x01\x02"), "invalid JSON"),
    "deep JSON": (with_header(b"[" * 100_000), "invalid JSON"),
    "a list": (with_header([1]), "invalid type: sequence"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "invalid UTF-8"),
    "key twice": (with_header(b'{"a": {}, "a": {}}'), "missing field"),
    "entry of another type": (with_header({"a": 3}), "invalid type: integer"),
    "field missing": (with_header({"a": {"dtype": "F32", "shape": [1]}}), "missing field `data_offsets`"),
    "dtype unknown": (with_header({"a": {**ONE, "dtype": "F33"}}, b"\0" * 4), "unknown variant `F33`"),
    "dtype a list": (with_header({"a": {**ONE, "dtype": ["F32"]}}, b"\0" * 4), "invalid type: sequence"),
    "negative size": (with_header({"a": {**ONE, "shape": [-1]}}, b"\0" * 4), "invalid value: integer `-1`"),
    "size a float": (with_header({"a": {**ONE, "shape": [1.0]}}, b"\0" * 4), "invalid type: floating point"),
    "size true": (with_header({"a": {**ONE, "shape": [True]}}, b"\0" * 4), "invalid type: boolean"),
    "size beyond 64 bits": (with_header({"a": {**ONE, "shape": [2**64]}}, b"\0" * 4), "invalid type: floating point"),
    "sizes that overflow": (with_header({"a": {**ONE, "shape": [2**62, 4]}}, b"\0" * 4), "overflow"),
    "offsets backwards": (with_header({"a": {**ONE, "data_offsets": [4, 0]}}, b"\0" * 4), "invalid offset"),
    "offsets beyond the end": (with_header({"a": {**ONE, "data_offsets": [4, 8]}}, b"\0" * 4), "invalid offset"),
    "overlap": (with_header({"a": ONE, "b": ONE}, b"\0" * 4), "invalid offset"),
    "gap": (with_header({"a": {**ONE, "data_offsets": [4, 8]}}, b"\0" * 8), "invalid offset"),
    "bytes left over": (with_header({"a": ONE}, b"\0" * 8), "not fully covered"),
    "metadata of another type": (with_header({"__metadata__": [1]}), "expected a map"),
    "metadata not strings": (with_header({"__metadata__": {"format": 1}}), "expected a string"),
}


@pytest.mark.parametrize(("content", "message"), BYTES.values(), ids=BYTES)
def test_damaged_safetensors(files, content, message):
    (files / "adapter_model.safetensors").write_bytes(content)
    refused(files, f"is damaged or not a safetensors file: .*{message}")


def test_truncated_anywhere(files):
    path = files / "adapter_model.safetensors"
    whole = path.read_bytes()
    model = Tiny()
    before = snapshot(model)
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            load_adapter(model, files)
    assert_unchanged(model, before)


class Trap:
    """Unpickling this would leave a mark."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_where_safetensors_belongs(files, protocol):
    path = files / "adapter_model.safetensors"
    path.write_bytes(pickle.dumps(Trap(), protocol))
    refused(files, "is a pickle under a false name")
    buffer = io.BytesIO()
    torch.save({A: Trap()}, buffer)
    path.write_bytes(buffer.getvalue())
    refused(files, "is a pickle under a false name")


def test_pickle_beside_nothing_is_named(files):
    (files / "adapter_model.safetensors").unlink()
    refused(files, r"adapter_model\.safetensors: no such file")
    (files / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(files, r"adapter_model\.bin is a pickle")


# The config


CONFIG_FAULTS = {
    "r a string": ({"r": "2"}, "'r' is '2': expected an integer"),
    "r true": ({"r": True}, "'r' is True"),
    "r zero": ({"r": 0}, "at least 1"),
    "r a float": ({"r": 2.0}, "expected an integer"),
    "r null": ({"r": None}, "expected an integer"),
    "alpha a string": ({"lora_alpha": "16"}, "'lora_alpha'.*finite number"),
    "alpha huge": ({"lora_alpha": 10**400}, "'lora_alpha'.*finite number"),
    "dropout one": ({"lora_dropout": 1}, r"\[0, 1\)"),
    "targets a number": ({"target_modules": 3}, "'target_modules'"),
    "targets mixed": ({"target_modules": ["q_proj", 3]}, "'target_modules'"),
    "targets an object": ({"target_modules": {"q_proj": 1}}, "'target_modules'"),
    "target that has no tensors": ({"target_modules": ["q_proj", "v_proj", "head"]}, "missing in the file: 'head'"),
    "tensors that are not targets": ({"target_modules": ["q_proj"]}, "unexpected in the file: 'block.v_proj'"),
    "bad regex": ({"target_modules": "(q_proj"}, "not a regular expression"),
    "bad regex that repeats": ({"target_modules": "*q_proj"}, "not a regular expression"),
    "patterns a list": ({"rank_pattern": [2]}, "'rank_pattern'"),
    "pattern value a string": ({"rank_pattern": {"q_proj": "2"}}, "'rank_pattern'"),
    "pattern with another rank": ({"rank_pattern": {"q_proj": 3}}, r"in the file, but .* want .'lora_A': \(3, 6\)"),
    "alpha pattern a string": ({"alpha_pattern": {"q_proj": "x"}}, "'alpha_pattern'"),
    "layers a string": ({"layers_to_transform": "0"}, "'layers_to_transform'"),
    "modules_to_save that are not there": ({"modules_to_save": ["lm_head"]}, "'lm_head', which the model does not"),
    "modules_to_save without tensors": ({"modules_to_save": ["head"]}, "missing in the file: 'head.bias', 'head.we"),
    "modules_to_save holds an adapter": ({"modules_to_save": ["block"]}, "missing|holds the adapted"),
    "bias trained": ({"bias": "all"}, "'bias' is 'all'"),
    "another method": ({"peft_type": "IA3"}, "peft_type must be 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type must be 'LORA'"),
    "DoRA without magnitudes": ({"use_dora": True}, "want .*'lora_magnitude'"),
    "PiSSA on a changed base": ({"init_lora_weights": "pissa"}, "'init_lora_weights'.*replaces the base weights"),
    "LoftQ on a changed base": ({"init_lora_weights": "loftq"}, "'init_lora_weights'.*replaces the base weights"),
    "layer_replication": ({"layer_replication": [[0, 1]]}, "'layer_replication'.*not supported"),
    "megatron_config": ({"megatron_config": {"a": 1}}, "'megatron_config'.*not supported"),
    "lora_bias": ({"lora_bias": True}, "'lora_bias'.*not supported"),
    "trainable tokens": ({"trainable_token_indices": [1]}, "'trainable_token_indices'.*not supported"),
    "target_parameters": ({"target_parameters": ["x"]}, "target_parameters names x, which the model has not"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "'alora_invocation_tokens'.*not supported"),
    "unknown field": ({"brand_new": "thing"}, "'brand_new'.*unknown field"),
    "layers_pattern alone": ({"layers_pattern": "layers"}, "'layers_pattern'.*needs layers_to_transform"),
    "layers with a regex": ({"target_modules": ".*proj", "layers_to_transform": [0]}, "'layers_to_transform'.*one str"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_wrong_configs(files, fields, message):
    change_config(files, **fields)
    refused(files, message)


CONFIG_TEXTS = {
    "empty": b"",
    "no JSON": b"peft_type: LORA",
    "a list": b"[]",
    "a string": b'"LORA"',
    "cut off": b'{"peft_type": "LORA", "r":',
    "key twice": b'{"peft_type": "LORA", "r": 2, "r": 2}',
    "NaN": b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
    "infinite": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
    "deep": b'{"peft_type": "LORA", "r": ' + b"[" * 100_000,
    "not UTF-8": b'{"peft_type": "LORA\xff"}',
    "number of 5,000 digits": b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"peft_type": "LORA"}'.encode("utf-16"),
}


@pytest.mark.parametrize("text", CONFIG_TEXTS.values(), ids=CONFIG_TEXTS)
def test_damaged_configs(files, text):
    (files / "adapter_config.json").write_bytes(text)
    refused(files, r"adapter_config\.json")


def test_missing_or_huge_config(files):
    path = files / "adapter_config.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    refused(files, "bytes are too many")
    path.unlink()
    refused(files, r"adapter_config\.json: no such file")
    refused(files / "nowhere", "no such file")


def test_a_regex_that_never_ends_is_stopped(files, monkeypatch):
    import handtuned.nn.adapter_config as module

    monkeypatch.setattr(module, "REGEX_SECONDS", 1)
    change_config(files, target_modules=r"(([a-z]|_|\.|\w|.|[^!])+)+(?<=\d)")
    start = time.process_time()
    with pytest.raises(ValueError, match="takes more than 1 seconds"):
        load_adapter(Tiny(), files)
    assert time.process_time() - start < 5


def test_fields_that_say_nothing_about_the_result_are_let_pass(files):
    change_config(
        files, peft_version="9.9", auto_mapping={"a": 1}, revision="x", inference_mode=False, brand_new=None,
        megatron_core="megatron.core", qalora_group_size=16, runtime_config={}, another=False, third=[],
        eva_config={"rho": 2.0}, init_lora_weights="eva", loftq_config={}, layer_replication=None, use_qalora=False,
    )  # fmt: skip
    load_adapter(Tiny(), files)


def test_the_least_config_that_peft_loads(files):
    """peft_type and r alone: the file's own tensors say which layers; alpha is PEFT's default of 8."""
    (files / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    model = Tiny()
    load_adapter(model, files)
    assert isinstance(model.block.v_proj, LoRALinear)
    assert model.block.v_proj.scaling == 4


def test_nothing_that_the_config_names_is_opened(files):
    change_config(files, base_model_name_or_path="/dev/zero", revision="../../etc")
    load_adapter(Tiny(), files)
    assert read_adapter_config(files)["base_model_name_or_path"] == "/dev/zero"
