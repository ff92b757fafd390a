"""One training step on random tokens, to measure what `estimate` predicts."""

from collections.abc import Callable

import torch

from .nn import apply_lora_to_model, lora_parameters
from .optim import AdamW
from .training.evaluation import CausalLM


def training_step(
    model,
    method: str,
    batch: int,
    seq: int,
    checkpoint: bool = False,
    logits: str = "chunked",
    lora_r: int = 8,
    target_modules="all-linear",
    accumulation_steps: int = 1,
) -> Callable[[], None]:
    """A function that does one step (forward, loss, backward, AdamW); it has run once, so that AdamW's state is there.

    Args:
        model: a transformers causal LM, its linears in NF4 if the method is "qlora"; it is changed.
        method, batch, seq, checkpoint, logits, lora_r, target_modules, accumulation_steps: as `estimate` has them.
    """
    if method == "full":
        model.requires_grad_(True)
        parameters = list(model.parameters())
    else:
        model.requires_grad_(False)
        apply_lora_to_model(model, lora_r, 16.0, target_modules)
        parameters = list(lora_parameters(model))
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(0, model.config.vocab_size, (batch, seq), device=parameters[0].device)
    answers = CausalLM(model, tokens[:1, :8])
    optimizer = AdamW(parameters, lr=1e-5)
    model.train()

    def loss() -> torch.Tensor:
        if logits == "full":
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return answers.loss({"input_ids": tokens, "labels": tokens}) / tokens.numel()

    def step() -> None:
        for _ in range(accumulation_steps):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step
