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
from .adapted import save_with_record
from .amp import GradScaler
from .answers import AnswerModel
from .faults import Fault
from .models import choose_dtype, fingerprint, load_base, resolve
from .nn import apply_lora_to_model
from .nn.files import write_json
from .optim import AdamW, cosine_with_warmup
from .resume import begin_or_recognize, settings_and_checkpoint
from .settings import FinetuneSettings, add_flags, flag
from .shards import weight_bytes, whole_adapter
from .training import peak_memory, train

SHOWN_PROMPTS = 3


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, on any rank; the state has been saved."""


def add_arguments(parser) -> None:
    add_flags(parser)
    parser.add_argument("--resume", "--resume-from-checkpoint", nargs="?", const="", default=None, metavar="DIR",
                        help="go on with a run that was stopped: its directory, or one of the checkpoints in it "
                        "(default: --output-dir)")  # fmt: skip


def run(args) -> int:
    typed = {name: value for name, value in vars(args).items() if name != "resume"}
    again = ""
    try:
        with parallel.start(typed.get("parallel", "none"), typed.get("device", "auto")) as team, team.quiet():
            with team.together():
                settings = FinetuneSettings(**typed)
            team.agree({flag(name): value for name, value in settings.to_json().items()} | {"--resume": args.resume})
            with team.together():
                checkpoint = None
                if team.main:
                    settings, checkpoint = settings_and_checkpoint(args.resume, typed, settings, team.size)
            settings, checkpoint = team.from_main((settings, checkpoint))
            again = f"\ngo on with: {team.command()} --resume {settings.output_dir}"
            finetune(settings, team, checkpoint)
    except Interrupted as stop:
        if team.main:
            print(f"\n{stop}{again}")
        return 130
    except Fault as fault:
        if fault.tell:
            print(f"handtuned finetune: error: {fault}{again}", file=sys.stderr)
        return 1
    return 0


def finetune(settings: FinetuneSettings, team: parallel.Team | None = None, checkpoint: Path | None = None) -> dict:
    """Fine-tune as `settings` say; everything lands in `settings.output_dir`.

    A directory that holds a checkpoint of the same run is gone on with from there, to
    the bit where an unbroken run would be.

    Args:
        team: the ranks that share the work (default: this process alone).
        checkpoint: the one to go on from, newer ones are deleted (default: the newest).

    Returns:
        what `results.json` holds: {"before": scores, "after": scores, "answers": …, …}.

    Raises:
        ValueError: settings, data or model that cannot be used; nothing is written then.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
        Diverged: the loss is no number any more; the newest checkpoint is from before that.
    """
    started = time.perf_counter()
    team = team or parallel.Team()
    settings = settings.with_defaults()
    directory = Path(settings.output_dir)

    with team.together():
        records.check_reporter(settings.report_to)
        if team.local_rank == 0:
            resolve(settings.model)  # fetched once a machine
    with team.together():
        device = team.device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        train_rows, eval_rows = load_rows(settings)
        # FSDP moves block after block to its GPU, which need not hold the whole model at any moment.
        model, tokenizer = load_base(settings.model, settings.method, dtype, "cpu" if team.mode == "fsdp" else device)
        data.check_max_seq_length(settings.max_seq_length, getattr(model.config, "max_position_embeddings", None))
        examples = encode(train_rows, "training", tokenizer, settings).examples
        encoded = encode(eval_rows, "held-out", tokenizer, settings) if eval_rows else None
        held_out = encoded.examples if encoded else []
        marks = {"base": fingerprint(model), "codes": fingerprint(model, scales=False), "data": data_mark(examples)}
        record = adapter_record(settings, marks["base"], train_rows)

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
            begin_or_recognize(directory, settings, marks | {"ranks": team.size})

    results_file = directory / "results.json"
    results = team.from_main(_read_results(results_file) if team.main else None)
    shown = [row for row, example in zip(encoded.rows, held_out, strict=True) if not example.cut] if encoded else []
    shown = shown[:SHOWN_PROMPTS]
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
            first = runstate.load_checkpoint(checkpoint or saved[-1], model, optimizer, schedule, scaler, team)
        print(f"going on after step {first} of {total}")
    if team.main:
        runstate.drop_after(directory, first)
    metrics = records.Metrics(directory / "metrics.jsonl")
    if team.main:
        metrics.keep_until(first)

    def save(step: int) -> Path:
        return runstate.save_checkpoint(
            directory, step, model, optimizer, schedule, scaler, settings.save_total_limit, record, team
        )

    reporter = records.Reporter(settings.report_to if team.main else "none", directory, settings.to_json())
    with telling.progress_bar(first, total) as bar, _Stop(team) as stop:

        def on_step(row: dict) -> None:
            step = row["step"]
            bar.show(row)
            if team.main and (step % settings.logging_steps == 0 or step == total):
                metrics.append(row)
                reporter.log(row)
            if step % settings.save_steps == 0 and step < total:
                save(step)
            if team.sum(stop.wished or team.stopping) and step < total:
                raise Interrupted(f"stopped after step {step} of {total}; saved in {save(step)}")

        train(answers, examples, settings, optimizer, schedule, scaler, first, total, on_step, team)
    reporter.close()

    save(total)
    with whole_adapter(model):
        if team.main:
            save_with_record(model, directory, record)
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


def encode(rows: list, what: str, tokenizer, settings: FinetuneSettings) -> data.EncodedRows:
    """Rows as token ids and labels; says what was cut or dropped."""
    try:
        encoded = data.encode_rows(rows, tokenizer, settings.max_seq_length, skip_bad_rows=settings.skip_bad_rows)
    except data.DataError as error:
        raise data.DataError(f"{what} rows: {error}") from None
    for note in encoded.notes():
        print(f"{what} rows: {note}")
    return encoded


def adapter_record(settings: FinetuneSettings, base: str, train_rows: list) -> dict:
    """What `generate` and `merge` must know of an adapter: its base, how that is loaded, how it is spoken to."""
    return {
        "model": settings.model,
        "method": settings.method,
        "fingerprint": base,
        "system_prompt": data.shared_system_prompt(train_rows),
        "eval_data": _eval_source(settings),
        "versions": records.versions(),
    }


def data_mark(examples: list) -> str:
    """A hash of what is learnt from, by which a run or a study that is resumed knows its data again."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.tobytes() + example.labels.tobytes())
    return digest.hexdigest()


def _need_disk(directory: Path, needed: int) -> None:
    """Refuse to start a run that cannot be saved."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(f"no disk space for {directory}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed")


class _Stop:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after this step; the second stops at once.

    Not so under torchrun, which passes on a Ctrl-C that has reached its processes already, and where
    SIGTERM is the team's affair.
    """

    def __init__(self, team: parallel.Team):
        self.patient = team.mode != "none"
        self.signals = [signal.SIGINT] if self.patient else [signal.SIGINT, signal.SIGTERM]

    def __enter__(self):
        self.wished = False
        self.before = [signal.signal(number, self._note) for number in self.signals]
        return self

    def _note(self, number, frame):
        if self.wished and not self.patient:
            raise KeyboardInterrupt
        if not self.wished:
            print("\nstopping after this step", file=sys.stderr)
        self.wished = True

    def __exit__(self, *error):
        for number, before in zip(self.signals, self.before, strict=True):
            signal.signal(number, before)
