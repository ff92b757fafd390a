"""Tiny models with adapters: ours, and PEFT's with the same values."""

import copy

import peft
import torch
from handtuned.nn import LoRALinear, apply_lora_to_model, lora_parameters
from helpers import assert_same_function
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

TOKENS = torch.arange(24).view(2, 12)
SIZES = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, **changes)).eval()


def qwen(seed=0):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=64, n_layer=3, n_head=4)).eval()


def doubled(model):
    """`model` in fp64, with norms that compute in the dtype of their input and not in fp32."""
    model.double()
    for path, module in list(model.named_modules()):
        if isinstance(module, (LlamaRMSNorm, Qwen2RMSNorm)):
            norm = nn.RMSNorm(module.weight.numel(), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    return model


def logits(model):
    """In fp64, of the values as they are: what order a CPU adds in does not show."""
    with torch.no_grad():
        return doubled(copy.deepcopy(model))(TOKENS).logits


def model_of(kind, auto=AutoModelForCausalLM, **further):
    """A model of any architecture that takes the common names of sizes."""
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **SIZES, pad_token_id=0, **further)).eval()


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def shake(model, seed=1):
    """Adapters far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model):
        parameter.data.normal_(0, 0.1, generator=generator)
    return model


def adapted(model, **settings):
    return shake(apply_lora_to_model(model, **{"rank": 4, "target_modules": ["q_proj", "down_proj"], **settings}))


def peft_adapted(model, seed=1, **settings):
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], **settings}
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(model, config).eval()


def close(actual, expected, rounded=False):
    """Equal logits; `rounded` if values were rounded to fp32 on the way, as a merge or a decomposition does.

    A chain of 3 layers with 7 products of up to 128 terms each then errs as a sum of so many terms.
    """
    assert_same_function(actual, expected, terms=3 * 7 * 128 if rounded else 0)


def peft_layers(model):
    layers = {p: m for p, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return dict(sorted(layers.items()))


def our_layers(model):
    return dict(sorted((path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALinear)))


def copy_values(source, target):
    """peft's A, B and magnitudes into ours."""
    with torch.no_grad():
        for a, b in zip(peft_layers(source).values(), our_layers(target).values(), strict=True):
            b.lora_A.copy_(a.lora_A["default"].weight)
            b.lora_B.copy_(a.lora_B["default"].weight)
            if hasattr(b, "lora_magnitude"):
                b.lora_magnitude.copy_(a.lora_magnitude_vector["default"].weight)
