"""`handtuned finetune`: put low-rank adapters on a (4-bit) model and train them on your rows, or train it whole.

Read `finetune` downward: load rows, model and adapters, print the plan, evaluate, train, save,
evaluate again. Each step is one call into `training/`; the loop itself is `training.loop.train_step`.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

from .memory.fit import fit
from .nn.files import write_json
from .training import checkpoints, logging, loop
from .training.data import describe_example
from .training.distributed import start
from .training.evaluation import evaluate
from .training.loading import locate
from .training.models import add_adapters, load_base_and_rows
from .training.rank_failure import RankFailure
from .training.saving import save_with_record
from .training.settings import NOT_IN_ADAPTERS, OF_ADAPTERS, FinetuneSettings, add_flags, flag
from .training.world import World


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
                settings, checkpoint = FinetuneSettings(**typed), None
                brought = [flag(name) for name in OF_ADAPTERS if name in typed and name not in NOT_IN_ADAPTERS]
                if settings.init_adapter and brought:
                    raise ValueError(f"--init-adapter brings its own {brought[0]}; leave that out")
            world.check_equal({flag(name): value for name, value in settings.to_json().items()}
                              | {"--resume": args.resume})  # fmt: skip
            with world.shared_errors():
                if world.main:
                    settings, checkpoint = checkpoints.settings_and_checkpoint(args.resume, typed, settings, world.size)
            settings, checkpoint = world.broadcast((settings, checkpoint))
            again = f"\ngo on with: {world.command(settings.offload)} --resume {settings.output_dir}"
            finetune(settings, world, checkpoint, new=not (Path(settings.output_dir) / "run.json").exists())
    except Interrupted as stop:
        if world.main:
            print(f"\n{stop}{again}")
        return 130
    except RankFailure as failure:
        if failure.print_it:
            print(f"handtuned finetune: error: {failure}{again}", file=sys.stderr)
        return 1
    return 0


def finetune(settings: FinetuneSettings, world: World | None = None, checkpoint: Path | None = None,
             new: bool = False) -> dict:  # fmt: skip
    """Fine-tune as `settings` say; everything lands in `settings.output_dir`.

    A directory that holds a checkpoint of the same run is resumed from there, and ends with the bits of a run that was
    never stopped.

    Args:
        world: the ranks that share the work (default: this process alone).
        checkpoint: the one to go on from, newer ones are deleted (default: the newest).
        new: refuse a directory that holds anything.

    Returns what `results.json` holds: {"before": scores, "after": scores, "answers": …, …}.
    ValueError: settings, data or model that cannot be used; nothing is written then.
    Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    Diverged: the loss is not finite any more; the newest checkpoint is from before that.
    """
    started, world, settings = time.perf_counter(), world or World(), settings.with_defaults()
    directory = Path(settings.output_dir)
    with world.shared_errors():
        logging.check_reporter(settings.report_to)
        if world.local_rank == 0:
            locate(settings.model)  # fetched once per machine
    with world.shared_errors():
        device = world.device(settings.device)
        # FSDP and ZeRO-3 move part after part to the GPU, which need not hold the whole model at any moment.
        base = load_base_and_rows(settings, device, "cpu" if world.cuts_weights else device)
        add_adapters(base.model, settings)
        rows_per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world.size
        all_rows = settings.num_train_epochs * len(base.examples)
        total = settings.max_steps or max(1, math.ceil(all_rows / rows_per_step))
        print(logging.plan(settings, base, total))
    marks = base.marks
    world.check_equal({"base model (--model)": marks["base"][:12], "training data (--data)": marks["data"][:12]})
    training = loop.prepare(base, settings, total, world)
    held = world.gather(world.weight_bytes(base.model))
    if world.mode != "none":
        print(f"ranks        {world.size}, {world.mode}: {logging.megabytes(max(held))} of weights and adapter on each")
    print(describe_example(base.examples[0], base.tokenizer))
    with world.shared_errors():
        fitted, plan = fit(settings, base, training, total, directory)
    results = checkpoints.begin(directory, training, new)
    training.settings = fitted  # what was asked for stands in run.json
    results["memory"] = dataclasses.asdict(plan) if plan else None
    if "before" not in results:
        evaluate(training, results, "before")
        if world.main:
            write_json(directory / "results.json", results)

    first = checkpoints.go_on(directory, checkpoint, training)
    if first:
        print(f"going on after step {first} of {total}")
    with logging.RunLog(directory, training, first) as run_log, loop.stop_after_step(world):
        for row in loop.train(training, first):
            run_log.log(row)
            step, stopped = row["step"], world.sum(world.stopping)
            if step < total and (stopped or step % settings.save_steps == 0):
                saved = checkpoints.save_checkpoint(directory, step, training)
                if stopped:
                    raise Interrupted(f"stopped after step {step} of {total}; saved in {saved}")
    checkpoints.save_checkpoint(directory, total, training)
    with world.gathered(base.model):
        if world.main:
            save_with_record(base, directory)

    evaluate(training, results, "after")
    results["weight_bytes_by_rank"] = held
    if world.held:
        results["held_bytes_by_rank"] = world.gather(world.held)
    results["peak_memory_bytes"] = max(world.gather(logging.peak_memory(base.device)))
    results["seconds"] = round(time.perf_counter() - started, 1)
    if world.main:
        write_json(directory / "results.json", results)
        rows = logging.Metrics(directory / "metrics.jsonl").rows()
        logging.draw_loss(rows, directory / "loss.png", f"{Path(settings.model).name}, {settings.method}")
    print(logging.summary(results, directory))
    lost = [results[when] and results[when]["loss"] is None for when in ("before", "after")]
    if lost == [False, True]:  # by the last step: what each before it did was seen in the next
        raise loop.Diverged("the loss on held-out rows is not finite after the last step; a lower --learning-rate than "
                            f"{settings.learning_rate:g} is what most often helps")  # fmt: skip
    return results
