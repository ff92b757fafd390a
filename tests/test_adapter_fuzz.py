"""Thousands of damaged adapter files: each is refused with a ValueError and no trace, or loads exactly what it says."""

import json
import random

import pytest
import torch
from handtuned.nn import LoRALinear, apply_lora_to_model
from handtuned.nn.adapters import load_adapter, save_adapter
from test_adapter_files import Tiny, assert_unchanged, snapshot
from torch import nn

WEIRD = [
    None, True, False, 0, 1, 2, 3, -1, 2**31, 2**63, 2**64, 10**400, 0.0, -0.5, 1e308, 1e999, "", "2", "q_proj", "LORA",
    ".*", "(", "all-linear", "../../etc/passwd", "\x00", "é", "x" * 5000, [], [1], [-1], ["q_proj"], [None], [[1]], {},
    {"q_proj": 2}, {"q_proj": "2"}, {"(": 1}, {"a": {"b": []}}, "F16", "BF16", "I64", [0, 4], [4, 0], [2, 6],
]  # fmt: skip
NAMES = [
    "r", "peft_type", "base_model.model.block.q_proj.lora_A.weight", "base_model.model.head.weight", "__metadata__",
    "base_model.model.block.q_proj.lora_magnitude_vector", "dtype", "shape", "data_offsets", "../x", "", "use_dora",
    "base_model.model..lora_A.weight", "target_modules", "unknown",
]  # fmt: skip


def change_json(rng, value):
    """Replace, remove, rename, repeat or add something, anywhere inside a JSON value."""
    while isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.6:
            value = value[key]
            continue
        action = rng.randrange(4)
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, dict):
            value[rng.choice(NAMES)] = value.pop(key)
        elif action == 2 and isinstance(value[key], int) and not isinstance(value[key], bool):
            value[key] += rng.choice([-1, 1, 4, -4, 2**40])
        else:
            value[key] = rng.choice(WEIRD)
        return
    if isinstance(value, dict):
        value[rng.choice(NAMES)] = rng.choice(WEIRD)
    elif isinstance(value, list):
        value.append(rng.choice(WEIRD))


def change_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
        elif action == 2:
            del data[at : at + rng.choice([1, 4, 64])]
        elif data:
            data = data[:at] if rng.random() < 0.3 else data[:at] + data[rng.randrange(len(data)) :]
    return bytes(data)


def mutate(rng, config, weights):
    kind = rng.randrange(4)
    if kind == 0:
        return change_bytes(rng, config), weights
    if kind == 1:
        fields = json.loads(config)
        for _ in range(rng.choice([1, 1, 2])):
            change_json(rng, fields)
        return json.dumps(fields).encode(), weights
    if kind == 2:
        return config, change_bytes(rng, weights)
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    for _ in range(rng.choice([1, 1, 2])):
        change_json(rng, header)
    raw = json.dumps(header).encode()
    return config, len(raw).to_bytes(8, "little") + raw + weights[8 + length :]


def fuzz(tmp_path, count, seed):
    source = apply_lora_to_model(Tiny(), rank=2, target_modules=["q_proj", "v_proj"])
    for parameter in source.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    source.block.v_proj.scaling = 3.0
    save_adapter(source, tmp_path)
    files = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good = [file.read_bytes() for file in files]
    base = dict(Tiny().named_parameters())
    rng = random.Random(seed)
    model, before, refused, messages = None, None, 0, set()
    for _ in range(count):
        if model is None:
            model = Tiny()
            before = snapshot(model)
        for file, content in zip(files, mutate(rng, *good), strict=True):
            file.write_bytes(content)
        try:
            report = load_adapter(model, tmp_path)
        except ValueError as error:
            assert_unchanged(model, before)
            refused += 1
            messages.add(str(error).removeprefix(str(tmp_path))[:60])
            assert len(str(error)) < 2000
        else:
            layers = [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]
            assert sorted(layers) == report.layers
            for path, parameter in model.named_parameters():
                assert torch.isfinite(parameter).all()
                if "lora_" not in path and "copies" not in path:
                    assert torch.equal(parameter, base[path.replace(".base_layer", "")])
            model = None
    return refused, messages


def test_four_hundred_damaged_files(tmp_path):
    refused, messages = fuzz(tmp_path, 400, seed=0)
    assert refused > 250  # the other mutations are harmless, such as another alpha or another value
    assert len(messages) > 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_two_thousand_damaged_files(tmp_path, seed):
    refused, _ = fuzz(tmp_path, 2000, seed)
    assert refused > 1200
