"""What the page for people who come from peft promises exists under the names it uses, and runs."""

import re
from pathlib import Path

import peft
import pytest
import torch
from adapted_models import adapted, llama
from handtuned.nn.adapter_config import INFORMATION, REFUSED, AdapterConfig
from handtuned.nn.adapters import save_adapter

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "from-peft.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(# handtuned\n.*?)```", PAGE, re.S)


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_adapter(adapted(llama()), "other")
    llama().save_pretrained("base")

    class AutoModelForCausalLM:
        @staticmethod
        def from_pretrained(name, dtype):
            return llama()

    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.long)}
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "torch": torch, "name": "base", "batch": batch}
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        exec(block, names)


def test_every_name_in_the_table_exists():
    from handtuned.nn import multi, variants

    for name in ("use_rslora", "dora_init", "pissa_init", "loftq_init", "lora_plus_groups"):
        assert name in PAGE and hasattr(variants, name)
    assert hasattr(multi, "save_modules")


def test_the_lists_of_fields_are_whole():
    fields = set(re.findall(r"`(\w+)`", PAGE))
    assert fields >= REFUSED
    told = {"base_model_name_or_path", "task_type"}  # information, in AdapterConfig for whoever wants it
    assert AdapterConfig.__dataclass_fields__.keys() - told <= fields


def test_every_field_of_peft_is_known():
    """A new PEFT that adds a field must be looked at before its adapters load."""
    ours = AdapterConfig.__dataclass_fields__.keys() | REFUSED | INFORMATION
    assert peft.LoraConfig.__dataclass_fields__.keys() <= ours
