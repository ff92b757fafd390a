"""`handtuned finetune`: put low-rank adapters on a (4-bit) model and train them on your rows.

Read it downward: `finetune` prepares, says what it is going to do, trains and reports.
The loop itself is `training.train`; what is printed is in `telling`.
"""

import hashlib
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from . import data, evaluation, parallel, records, runstate, telling
from .adapted import TRAINING_RECORD
from .amp import GradScaler
from .answers import AnswerModel
from .faults import Fault
from .models import choose_dtype, fingerprint, load_base, resolve
from .nn import apply_lora_to_model
from .nn.adapters import save_adapter
from .nn.files import write_json
from .optim import AdamW, cosine_with_warmup
from .settings import FinetuneSettings, add_flags, differences, flag, next_output_dir
from .shards import weight_bytes, whole_adapter
from .training import peak_memory, train

SHOWN_PROMPTS = 3


class Interrupted(Exception):
    """Ctrl-C, on any rank; the state has been saved."""


def add_arguments(parser) -> None:
    add_flags(parser)
    parser.add_argument("--resume", "--resume-from-checkpoint", nargs="?", const="", default=None, metavar="DIR",
                        help="go on with a run that was stopped: its directory (default: --output-dir)")  # fmt: skip


def run(args) -> int:
    typed = {name: value for name, value in vars(args).items() if name != "resume"}
    again = ""
    try:
        with parallel.start(typed.get("parallel", "none"), typed.get("device", "auto")) as team, team.quiet():
            with team.together():
                settings = FinetuneSettings(**typed)
            team.agree({flag(name): value for name, value in settings.to_json().items()} | {"--resume": args.resume})
            with team.together():
                if team.main:
                    settings = _settings(args.resume, typed, settings, team.size)
            settings = team.from_main(settings)
            again = f"\ngo on with: {team.command()} --resume {settings.output_dir}"
            finetune(settings, team)
    except Interrupted as stop:
        if team.main:
            print(f"\n{stop}{again}")
        return 130
    except Fault as fault:
        if fault.tell:
            print(f"handtuned finetune: error: {fault}{again}", file=sys.stderr)
        return 1
    return 0


def _settings(resume: str | None, typed: dict, fresh: FinetuneSettings, ranks: int) -> FinetuneSettings:
    """With a directory that is free, or that of the run to be resumed and its settings."""
    if resume is not None:
        return _settings_to_resume(resume or fresh.output_dir, typed, fresh, ranks)
    fresh.output_dir = fresh.output_dir or next_output_dir()
    directory = Path(fresh.output_dir)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"--output-dir {directory} holds another run; name a new one, or go on with --resume")
    return fresh


def _settings_to_resume(place: str | None, typed: dict, fresh: FinetuneSettings, ranks: int) -> FinetuneSettings:
    """The settings of the run at `place`; what was typed again must agree. A run that never began starts afresh.

    Another number of ranks than before shares out the same rows a step.
    """
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
    run = json.loads(record.read_text(encoding="utf-8"))
    saved = run["settings"]
    free = ("output_dir", "parallel")
    changed = differences({name: getattr(fresh, name) for name in typed if name not in free}, saved)
    if changed:
        raise ValueError("--resume goes on with the run's own settings: " + "; ".join(changed))
    micro, accumulate = saved["per_device_train_batch_size"], saved["gradient_accumulation_steps"]
    rows, odd = divmod(micro * accumulate * run["marks"].get("ranks", 1), ranks)
    if odd:
        raise ValueError(f"--resume: {ranks} ranks cannot evenly share the {rows * ranks + odd} rows of a step")
    micro = max(size for size in range(1, micro + 1) if rows % size == 0)
    shares = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    return FinetuneSettings(**saved | shares | {"output_dir": str(directory), "parallel": fresh.parallel})


def finetune(settings: FinetuneSettings, team: parallel.Team | None = None) -> dict:
    """Fine-tune as `settings` say; everything lands in `settings.output_dir`.

    A directory that holds a checkpoint of the same run is gone on with from there, to
    the bit where an unbroken run would be.

    Args:
        team: the ranks that share the work (default: this process alone).

    Returns:
        what `results.json` holds: {"before": scores, "after": scores, "answers": …, …}.

    Raises:
        ValueError: settings, data or model that cannot be used; nothing is written then.
        Interrupted: Ctrl-C; a checkpoint of the last whole step has been written.
    """
    started = time.perf_counter()
    team = team or parallel.Team()
    settings = settings.with_defaults()
    directory = Path(settings.output_dir)

    with team.together():
        if team.local_rank == 0:
            resolve(settings.model)  # fetched once a machine
    with team.together():
        device = team.device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        train_rows, eval_rows = load_rows(settings)
        # FSDP moves block after block to its GPU, which need not hold the whole model at any moment.
        model, tokenizer = load_base(settings.model, settings.method, dtype, "cpu" if team.mode == "fsdp" else device)
        data.check_max_seq_length(settings.max_seq_length, getattr(model.config, "max_position_embeddings", None))
        examples = encode(train_rows, "training", tokenizer, settings)
        held_out = encode(eval_rows, "held-out", tokenizer, settings) if eval_rows else []
        marks = {"base": fingerprint(model), "data": data_mark(examples)}

        torch.manual_seed(settings.seed)
        apply_lora_to_model(model, settings.lora_r, settings.lora_alpha, settings.target_modules, settings.lora_dropout)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * team.size
        total = settings.max_steps or max(1, math.ceil(settings.num_train_epochs * len(examples) / rows_a_step))
        print(telling.plan(settings, model, len(examples), len(held_out), total, device, dtype))
    team.agree({"base model (--model)": marks["base"][:12], "training data (--data)": marks["data"][:12]})

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = team.wrap(model, device)
    optimizer = AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = cosine_with_warmup(optimizer, total, settings.warmup_ratio)
    scaler = GradScaler(enabled=dtype == torch.float16)
    sample = torch.from_numpy(examples[0].input_ids[None, :8]).long().to(device)
    answers = team.evaluate(lambda: AnswerModel(model, sample))
    held = team.gather(weight_bytes(model))
    if team.mode != "none":
        print(f"ranks        {team.size}, {team.mode}: {telling.megabytes(max(held))} of weights and adapter on each")
    print(data.describe_example(examples[0], tokenizer))
    with team.together():
        if team.main:
            _need_disk(directory, trainable * 4 * 3 * (settings.save_total_limit + 2))
            directory.mkdir(parents=True, exist_ok=True)
            runstate.clear_unfinished(directory)
            _begin_or_recognize(directory, settings, marks | {"ranks": team.size})

    results_file = directory / "results.json"
    results = team.from_main(_read_results(results_file) if team.main else None)
    shown = eval_rows[:SHOWN_PROMPTS]
    prompts = [chat[:-1] for chat in shown]
    if "before" not in results:
        results["before"] = evaluation.score(team, answers, held_out, "held-out, before")
        written = evaluation.write_answers(team, model, tokenizer, prompts)
        results["answers"] = [
            {"prompt": data.said(prompt[-1]), "expected": data.said(chat[-1]), "before": answer}
            for prompt, chat, answer in zip(prompts, shown, written, strict=True)
        ]
        if team.main:
            write_json(results_file, results)

    first = 0
    saved = team.from_main(runstate.checkpoints(directory))
    if saved:
        with team.together():
            first = runstate.load_checkpoint(saved[-1], model, optimizer, schedule, scaler, team)
        print(f"going on after step {first} of {total}")
    metrics = records.Metrics(directory / "metrics.jsonl")
    if team.main:
        metrics.keep_until(first)

    def save(step: int) -> Path:
        return runstate.save_checkpoint(
            directory, step, model, optimizer, schedule, scaler, settings.save_total_limit, settings.model, team
        )

    reporter = records.Reporter(settings.report_to if team.main else "none", directory, settings.to_json())
    with telling.progress_bar(first, total) as bar, _CtrlC(team) as ctrl_c:

        def on_step(row: dict) -> None:
            step = row["step"]
            bar.show(row)
            if team.main and (step % settings.logging_steps == 0 or step == total):
                metrics.append(row)
                reporter.log(row)
            if step % settings.save_steps == 0 and step < total:
                save(step)
            if team.sum(ctrl_c.pressed or team.stopping) and step < total:
                raise Interrupted(f"stopped after step {step} of {total}; saved in {save(step)}")

        train(answers, examples, settings, optimizer, schedule, scaler, first, total, on_step, team)
    reporter.close()

    save(total)
    with whole_adapter(model):
        if team.main:
            save_adapter(model, directory, base_model=settings.model)
    if team.main:
        write_json(directory / TRAINING_RECORD, {
            "model": settings.model,
            "method": settings.method,
            "fingerprint": marks["base"],
            "system_prompt": data.shared_system_prompt(train_rows),
            "eval_data": _eval_source(settings),
            "versions": records.versions(),
        })  # fmt: skip
    results["after"] = evaluation.score(team, answers, held_out, "held-out, after ")
    written = evaluation.write_answers(team, model, tokenizer, prompts)
    for entry, answer in zip(results["answers"], written, strict=True):
        entry["after"] = answer
    results["weight_bytes_by_rank"] = held
    results["peak_memory_bytes"] = max(team.gather(peak_memory(device)))
    results["seconds"] = round(time.perf_counter() - started, 1)
    if team.main:
        write_json(results_file, results)
        records.draw_loss(metrics.rows(), directory / "loss.png", f"{Path(settings.model).name}, {settings.method}")
    print(telling.outcome(results, directory))
    return results


def _read_results(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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


def data_mark(examples: list) -> str:
    """A hash of what is learnt from, by which a run or a study that is resumed knows its data again."""
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
    """Turns the first Ctrl-C into a wish to stop after this step; the second stops at once.

    Not so under torchrun, which passes on a Ctrl-C that has reached its processes already.
    """

    def __init__(self, team: parallel.Team):
        self.patient = team.mode != "none"

    def __enter__(self):
        self.pressed = False
        self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame):
        if self.pressed and not self.patient:
            raise KeyboardInterrupt
        self.pressed = True

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)
