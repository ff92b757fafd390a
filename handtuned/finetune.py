"""`handtuned finetune`: put low-rank adapters on a (4-bit) model and train them on your rows.

Read it downward: `finetune` prepares, says what it is going to do, trains and reports.
The loop itself is `training.train`; what is printed is in `telling`.
"""

import hashlib
import json
import math
import shutil
import signal
import time
from pathlib import Path

import torch

from . import data, records, runstate, telling
from .adapted import TRAINING_RECORD
from .amp import GradScaler
from .answers import AnswerModel, write_answers
from .models import choose_device, choose_dtype, fingerprint, load_base
from .nn import apply_lora_to_model, lora_parameters
from .nn.adapters import save_adapter
from .nn.files import write_json
from .optim import AdamW, cosine_with_warmup
from .settings import FinetuneSettings, add_flags, differences, next_output_dir
from .training import peak_memory, train

SHOWN_PROMPTS = 3


class Interrupted(Exception):
    """Ctrl-C; the state has been saved."""


def add_arguments(parser) -> None:
    add_flags(parser)
    parser.add_argument("--resume", "--resume-from-checkpoint", nargs="?", const="", default=None, metavar="DIR",
                        help="go on with a run that was stopped: its directory (default: --output-dir)")  # fmt: skip


def run(args) -> int:
    typed = {name: value for name, value in vars(args).items() if name != "resume"}
    settings = FinetuneSettings(**typed)
    if args.resume is not None:
        settings = _settings_to_resume(args.resume or settings.output_dir, typed, settings)
    else:
        settings.output_dir = settings.output_dir or next_output_dir()
        directory = Path(settings.output_dir)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise ValueError(f"--output-dir {directory} holds another run; name a new one, or go on with --resume")
    try:
        finetune(settings)
    except Interrupted as stop:
        print(f"\n{stop}\ngo on with: handtuned finetune --resume {settings.output_dir}")
        return 130
    return 0


def _settings_to_resume(place: str | None, typed: dict, fresh: FinetuneSettings) -> FinetuneSettings:
    """The settings of the run at `place`; what was typed again must agree. A run that never began starts afresh."""
    if not place:
        raise ValueError("--resume needs the run's directory: --resume DIR, or --output-dir DIR")
    directory = Path(place)
    if directory.name.startswith("checkpoint-"):
        directory = directory.parent
    record = directory / "run.json"
    if not record.exists():
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(f"--resume: {directory} holds no run (no run.json)")
        print(f"nothing to resume in {directory}: starting afresh")
        fresh.output_dir = str(directory)
        return fresh
    saved = json.loads(record.read_text(encoding="utf-8"))["settings"]
    changed = differences({name: getattr(fresh, name) for name in typed if name != "output_dir"}, saved)
    if changed:
        raise ValueError("--resume goes on with the run's own settings: " + "; ".join(changed))
    return FinetuneSettings(**saved | {"output_dir": str(directory)})


def finetune(settings: FinetuneSettings) -> dict:
    """Fine-tune as `settings` say; everything lands in `settings.output_dir`.

    A directory that holds a checkpoint of the same run is gone on with from there, to
    the bit where an unbroken run would be.

    Returns:
        what `results.json` holds: {"before": scores, "after": scores, "answers": …, …}.

    Raises:
        ValueError: settings, data or model that cannot be used; nothing is written then.
        Interrupted: Ctrl-C; a checkpoint of the last whole step has been written.
    """
    started = time.perf_counter()
    settings = settings.with_defaults()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    directory = Path(settings.output_dir)

    train_rows, eval_rows = load_rows(settings)
    model, tokenizer = load_base(settings.model, settings.method, dtype, device)
    data.check_max_seq_length(settings.max_seq_length, getattr(model.config, "max_position_embeddings", None))
    examples = encode(train_rows, "training", tokenizer, settings)
    held_out = encode(eval_rows, "held-out", tokenizer, settings) if eval_rows else []
    marks = {"base": fingerprint(model), "data": _data_mark(examples)}

    torch.manual_seed(settings.seed)
    apply_lora_to_model(model, settings.lora_r, settings.lora_alpha, settings.target_modules, settings.lora_dropout)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = list(lora_parameters(model))
    rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    total = settings.max_steps or max(1, math.ceil(settings.num_train_epochs * len(examples) / rows_a_step))
    optimizer = AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = cosine_with_warmup(optimizer, total, settings.warmup_ratio)
    scaler = GradScaler(enabled=dtype == torch.float16)
    answers = AnswerModel(model, torch.from_numpy(examples[0].input_ids[None, :8]).long().to(device))

    print(telling.plan(settings, model, len(examples), len(held_out), total, device, dtype))
    print(data.describe_example(examples[0], tokenizer))
    _need_disk(directory, sum(p.numel() for p in parameters) * 4 * 3 * (settings.save_total_limit + 2))
    directory.mkdir(parents=True, exist_ok=True)
    _begin_or_recognize(directory, settings, marks)

    results_file = directory / "results.json"
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.exists() else {}
    shown = eval_rows[:SHOWN_PROMPTS]
    prompts = [chat[:-1] for chat in shown]
    if "before" not in results:
        results["before"] = telling.score(answers, held_out, "held-out, before")
        results["answers"] = [
            {"prompt": prompt[-1]["content"], "expected": chat[-1]["content"], "before": answer}
            for prompt, chat, answer in zip(prompts, shown, write_answers(model, tokenizer, prompts), strict=True)
        ]
        write_json(results_file, results)

    first = 0
    if saved := runstate.checkpoints(directory):
        first = runstate.load_checkpoint(saved[-1], model, optimizer, schedule, scaler)
        print(f"going on after step {first} of {total}")
    metrics = records.Metrics(directory / "metrics.jsonl")
    metrics.keep_until(first)

    def save(step: int) -> Path:
        return runstate.save_checkpoint(
            directory, step, model, optimizer, schedule, scaler, settings.save_total_limit, settings.model
        )

    reporter = records.Reporter(settings.report_to, directory, settings.to_json())
    with telling.progress_bar(first, total) as bar, _CtrlC() as ctrl_c:

        def on_step(row: dict) -> None:
            step = row["step"]
            bar.show(row)
            if step % settings.logging_steps == 0 or step == total:
                metrics.append(row)
                reporter.log(row)
            if step % settings.save_steps == 0 and step < total:
                save(step)
            if ctrl_c.pressed and step < total:
                raise Interrupted(f"stopped after step {step} of {total}; saved in {save(step)}")

        train(answers, examples, settings, optimizer, schedule, scaler, first, total, on_step)
    reporter.close()

    save(total)
    save_adapter(model, directory, base_model=settings.model)
    write_json(directory / TRAINING_RECORD, {
        "model": settings.model,
        "method": settings.method,
        "fingerprint": marks["base"],
        "system_prompt": data.shared_system_prompt(train_rows),
        "eval_data": _eval_source(settings),
        "versions": records.versions(),
    })  # fmt: skip
    results["after"] = telling.score(answers, held_out, "held-out, after ")
    for entry, answer in zip(results["answers"], write_answers(model, tokenizer, prompts), strict=True):
        entry["after"] = answer
    results["peak_memory_bytes"] = peak_memory(device)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(results_file, results)
    records.draw_loss(metrics.rows(), directory / "loss.png", f"{Path(settings.model).name}, {settings.method}")
    print(telling.outcome(results, directory))
    return results


def load_rows(settings: FinetuneSettings) -> tuple[list, list]:
    """(training chats, held-out chats); says how many bad rows were skipped."""
    train_rows = _read(settings.data or data.shipped_dataset()[0], settings)
    source = _eval_source(settings)
    if source:
        eval_rows = _read(source, settings)
    else:
        train_rows, eval_rows = data.split(train_rows, settings.eval_fraction, settings.seed)
    return train_rows, eval_rows[: settings.eval_samples]


def _eval_source(settings: FinetuneSettings) -> str | None:
    if settings.eval_data or settings.data:
        return settings.eval_data
    return str(data.shipped_dataset()[1])


def _read(path, settings: FinetuneSettings) -> list:
    loaded = data.load_rows(path, skip_bad_rows=settings.skip_bad_rows)
    for note in loaded.notes():
        print(f"{path}: {note}")
    return loaded.rows


def encode(rows: list, what: str, tokenizer, settings: FinetuneSettings) -> list:
    """Rows as token ids and labels; says what was cut or dropped."""
    encoded = data.encode_rows(rows, tokenizer, settings.max_seq_length)
    for note in encoded.notes():
        print(f"{what} rows: {note}")
    return encoded.examples


def _data_mark(examples: list) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.tobytes() + example.labels.tobytes())
    return digest.hexdigest()


def _begin_or_recognize(directory: Path, settings: FinetuneSettings, marks: dict[str, str]) -> None:
    """Write `run.json`, or check that the one that is there speaks of the same base model and data."""
    record = directory / "run.json"
    if not record.exists():
        records.write_run(directory, settings.to_json(), marks)
        return
    known = json.loads(record.read_text(encoding="utf-8"))["marks"]
    for what, name in (("base", f"base model ({settings.model})"), ("data", "training data")):
        if known[what] != marks[what]:
            raise ValueError(f"{directory}: the {name} is not what it was when this run began")


def _need_disk(directory: Path, needed: int) -> None:
    """Refuse to start a run that cannot be saved."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"no disk space for {directory}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed")


class _CtrlC:
    """Turns the first Ctrl-C into a wish to stop after this step; the second stops at once."""

    def __enter__(self):
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame):
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)
