"""What `finetune` says: the plan before, a bar meanwhile, the outcome after."""

import textwrap
from pathlib import Path

import torch
from tqdm import tqdm

from .nn import LoRALinear
from .quant import quantization_summary
from .settings import FinetuneSettings


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def plan(settings: FinetuneSettings, model, rows: int, held_out: int, total: int, device, dtype) -> str:
    """The run in a few lines: parameters, bytes before and after quantization, data, steps."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted = sum(isinstance(module, LoRALinear) for module in model.modules())
    base = [row for row in quantization_summary(model).rows if row.kind != "LoRALinear"]
    parameters, before, after = (sum(getattr(row, name) for row in base) for name in
                                 ("parameters", "bytes_before", "bytes_after"))  # fmt: skip
    where = f"{device}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    lines = [
        f"model        {settings.model}: {parameters:,} parameters",
        f"weights      {megabytes(before)} → {megabytes(after)}"
        if settings.method == "qlora"
        else f"weights      {megabytes(after)}, not quantized",
        f"trainable    {trainable:,} parameters ({100 * trainable / parameters:.2f} %): "
        f"LoRA r {settings.lora_r}, alpha {settings.lora_alpha:g} on {adapted} layers",
        f"data         {rows} rows to learn from, {held_out} held out",
        f"steps        {total} of {settings.per_device_train_batch_size} rows × "
        f"{settings.gradient_accumulation_steps}, learning rate {settings.learning_rate:g}",
        f"on           {where}, computing in {str(dtype).removeprefix('torch.')}",
        f"into         {settings.output_dir}",
    ]
    return "\n".join(lines)


class progress_bar:
    """A bar over the optimizer steps with loss, learning rate and tokens a second."""

    def __init__(self, first: int, total: int):
        self.bar = tqdm(total=total, initial=first, desc="training", unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def show(self, row: dict) -> None:
        self.bar.set_postfix_str(
            f"loss {row['loss']:.4f}, lr {row['learning_rate']:.1e}, {row['tokens_per_second']:.0f} tokens/s"
        )
        self.bar.update(1)


def score(answers, held_out: list, what: str) -> dict | None:
    """Score the held-out rows behind a bar; None when there are none."""
    if not held_out:
        return None
    with tqdm(total=len(held_out), desc=what, unit="row", dynamic_ncols=True, leave=False) as bar:
        return answers.score(held_out, bar=bar)


def outcome(results: dict, directory: Path) -> str:
    """Held-out scores and answers before and after, peak memory, and where to go from here."""
    lines = [""]
    before, after = results["before"], results["after"]
    if before and after:
        lines.append(f"held-out rows ({after['rows']})   before      after")
        for name, text, form in (("exact_match", "exact match", "{:.1%}"), ("token_accuracy", "right tokens", "{:.1%}"),
                                 ("loss", "loss", "{:.4f}")):  # fmt: skip
            lines.append(f"  {text:18} {form.format(before[name]):>9} {form.format(after[name]):>10}")
    for entry in results["answers"]:
        lines += ["", f"prompt    {_short(entry['prompt'])}", f"expected  {_short(entry['expected'])}",
                  f"before    {_short(entry['before'])}", f"after     {_short(entry['after'])}"]  # fmt: skip
    lines += [
        "",
        f"peak memory  {megabytes(results['peak_memory_bytes'])}",
        f"time         {results['seconds']:.0f} s",
        f"adapter      {directory}",
        f'talk to it   handtuned generate --adapter {directory} "{_short(results["answers"][0]["prompt"])}"'
        if results["answers"]
        else f'talk to it   handtuned generate --adapter {directory} "…"',
    ]
    return "\n".join(lines)


def _short(text: str) -> str:
    return textwrap.shorten(text, 110, placeholder=" …")
