"""`handtuned finetune`: put low-rank adapters on a (4-bit) model and train them on your rows.

Read `finetune` downward: load rows, model and adapters, print the plan, evaluate, train, save,
evaluate again. Each step is one call into `training/`; the loop itself is `training.loop.train_step`.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch

from .nn import apply_lora_to_model
from .nn.files import write_json
from .training import checkpoints, data, logging, loop
from .training.distributed import World, start, weight_bytes, whole_adapter
from .training.evaluation import evaluate
from .training.models import adapter_record, choose_dtype, fingerprint, load_base, resolve, save_with_record
from .training.rank_failure import RankFailure
from .training.settings import FinetuneSettings, add_flags, flag


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
        with start(typed.get("parallel", "none"), typed.get("device", "auto")) as world, world.quiet():
            with world.shared_errors():
                settings = FinetuneSettings(**typed)
            world.check_equal({flag(name): value for name, value in settings.to_json().items()}
                              | {"--resume": args.resume})  # fmt: skip
            with world.shared_errors():
                checkpoint = None
                if world.main:
                    settings, checkpoint = checkpoints.settings_and_checkpoint(args.resume, typed, settings, world.size)
            settings, checkpoint = world.broadcast((settings, checkpoint))
            again = f"\ngo on with: {world.command()} --resume {settings.output_dir}"
            finetune(settings, world, checkpoint)
    except Interrupted as stop:
        if world.main:
            print(f"\n{stop}{again}")
        return 130
    except RankFailure as failure:
        if failure.print_it:
            print(f"handtuned finetune: error: {failure}{again}", file=sys.stderr)
        return 1
    return 0


def finetune(settings: FinetuneSettings, world: World | None = None, checkpoint: Path | None = None) -> dict:
    """Fine-tune as `settings` say; everything lands in `settings.output_dir`.

    A directory that holds a checkpoint of the same run is resumed from there, and ends with the
    bits of a run that was never stopped.

    Args:
        world: the ranks that share the work (default: this process alone).
        checkpoint: the one to go on from, newer ones are deleted (default: the newest).

    Returns:
        what `results.json` holds: {"before": scores, "after": scores, "answers": …, …}.

    Raises:
        ValueError: settings, data or model that cannot be used; nothing is written then.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
        Diverged: the loss is not finite any more; the newest checkpoint is from before that.
    """
    started = time.perf_counter()
    world = world or World()
    settings = settings.with_defaults()
    directory = Path(settings.output_dir)

    with world.shared_errors():
        logging.check_reporter(settings.report_to)
        if world.local_rank == 0:
            resolve(settings.model)  # fetched once per machine
    with world.shared_errors():
        device = world.device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        chats, eval_chats, eval_file = data.load_chats(
            settings.data, settings.eval_data, settings.eval_fraction, settings.eval_samples, settings.seed,
            settings.skip_bad_rows)  # fmt: skip
        # FSDP moves block after block to its GPU, which need not hold the whole model at any moment.
        model, tokenizer = load_base(settings.model, settings.method, dtype, "cpu" if world.mode == "fsdp" else device)
        data.check_max_seq_length(settings.max_seq_length, data.context_length(model))
        learnt, held_out = data.encode_chats(
            chats, eval_chats, tokenizer, settings.max_seq_length, settings.skip_bad_rows)  # fmt: skip
        examples = learnt.examples
        marks = {"base": fingerprint(model), "codes": fingerprint(model, scales=False), "data": data.digest(examples)}
        record = adapter_record(settings.model, settings.method, marks["base"], chats, eval_file)

        torch.manual_seed(settings.seed)
        apply_lora_to_model(model, settings.lora_r, settings.lora_alpha, settings.target_modules, settings.lora_dropout)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world.size
        total = settings.max_steps or max(1, math.ceil(settings.num_train_epochs * len(examples) / rows_per_step))
        print(logging.plan(settings, model, len(examples), len(held_out.examples), total, device, dtype))
    world.check_equal({"base model (--model)": marks["base"][:12], "training data (--data)": marks["data"][:12]})

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    training = loop.prepare(model, examples, total, settings.learning_rate, settings.weight_decay,
                            settings.warmup_ratio, dtype, device, world)  # fmt: skip
    held = world.gather(weight_bytes(model))
    if world.mode != "none":
        print(f"ranks        {world.size}, {world.mode}: {logging.megabytes(max(held))} of weights and adapter on each")
    print(data.describe_example(examples[0], tokenizer))
    with world.shared_errors():
        if world.main:
            needed = trainable * 4 * 3 * (settings.save_total_limit + 2)  # fp32: the adapter and two moments
            checkpoints.begin(directory, settings.to_json(), marks | {"ranks": world.size}, needed)

    results = world.broadcast(_read_results(directory) if world.main else None)
    if "before" not in results:
        evaluate(world, training.lm, tokenizer, held_out, results, "before")
        if world.main:
            write_json(directory / "results.json", results)

    first = checkpoints.go_on(directory, checkpoint, training)
    if first:
        print(f"going on after step {first} of {total}")

    def save(step: int) -> Path:
        return checkpoints.save_checkpoint(directory, step, training, settings.save_total_limit, record)

    with (logging.RunLog(directory, first, total, settings.to_json(), world.main) as run_log,
          loop.StopAfterStep(world) as stop):  # fmt: skip

        def on_step(row: dict) -> None:
            step = row["step"]
            run_log.log(row)
            if step % settings.save_steps == 0 and step < total:
                save(step)
            if world.sum(stop.wished or world.stopping) and step < total:
                raise Interrupted(f"stopped after step {step} of {total}; saved in {save(step)}")

        loop.train(
            training, examples, total, settings.per_device_train_batch_size, settings.gradient_accumulation_steps,
            settings.max_grad_norm, settings.seed, on_step, first)  # fmt: skip
    save(total)
    with whole_adapter(model):
        if world.main:
            save_with_record(model, directory, record)

    evaluate(world, training.lm, tokenizer, held_out, results, "after")
    results["weight_bytes_by_rank"] = held
    results["peak_memory_bytes"] = max(world.gather(logging.peak_memory(device)))
    results["seconds"] = round(time.perf_counter() - started, 1)
    if world.main:
        write_json(directory / "results.json", results)
        title = f"{Path(settings.model).name}, {settings.method}"
        logging.draw_loss(run_log.metrics.rows(), directory / "loss.png", title)
    print(logging.summary(results, directory))
    return results


def _read_results(directory: Path) -> dict:
    path = directory / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
