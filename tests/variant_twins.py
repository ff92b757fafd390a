"""The same variant of LoRA in our model and in PEFT's, trained and saved side by side."""

import peft
import torch
from adapted_models import TOKENS, close, doubled, llama, logits, our_layers, peft_layers
from handtuned.nn import apply_lora_to_model
from handtuned.nn.adapters import load_adapter, save_adapter

TARGETS = ["q_proj", "down_proj"]


def ours(base=llama, rank=4, alpha=16, targets=TARGETS, **settings):
    return apply_lora_to_model(base(), rank=rank, lora_alpha=alpha, target_modules=targets, **settings)


def theirs(base=llama, rank=4, alpha=16, targets=TARGETS, **settings):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    return peft.get_peft_model(base(), config).eval()


def steps(model, optimizer, count=5):
    """A few steps on a fixed batch, in fp64; the losses."""
    losses = []
    doubled(model)
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def same_gradients(model, other, rounded=False):
    """Of our adapters and peft's; `rounded` as for `close`."""
    for one in (model, other):
        doubled(one).zero_grad()
        one(TOKENS, labels=TOKENS).loss.backward()
    for a, b in zip(peft_layers(other).values(), our_layers(model).values(), strict=True):
        close(b.lora_A.grad, a.lora_A["default"].weight.grad, rounded)
        close(b.lora_B.grad, a.lora_B["default"].weight.grad, rounded)
        if hasattr(b, "lora_magnitude"):
            expected = a.lora_magnitude_vector["default"].weight.grad
            close(b.lora_magnitude.grad, expected, rounded)


def round_trip(model, tmp_path, base=llama):
    """The file gives peft and us, on a fresh base, the same model."""
    save_adapter(model, tmp_path)
    expected = logits(model.eval())
    close(logits(peft.PeftModel.from_pretrained(base(), tmp_path)), expected, rounded=True)
    again = base()
    load_adapter(again, tmp_path)
    close(logits(again), expected, rounded=True)
