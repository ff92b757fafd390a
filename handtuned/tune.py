"""`handtuned tune`: a budgeted, seeded search for LoRA's settings, by Optuna.

Each trial is a short fine-tuning run with settings of its own. The first has the settings that `finetune` would take,
so the search ends no worse than it began. Successive halving (Jamieson & Talwalkar 2016; asynchronous: Li et al. 2020)
stops a trial after 1/8, 1/4 or 1/2 of its steps unless it is among the better half of those that came as far.

Half of the held-out rows choose; the other half are scored once per finished trial and decide nothing, so that
their score of the winner is not flattered by the choice.
"""

import argparse
import contextlib
import dataclasses
import gc
import math
import shlex
import time
import warnings
from pathlib import Path

import torch

from .nn.files import in_use, write_json
from .nn.merge import unload
from .nn.peft_rules import all_linear_parameters
from .nn.targets import select
from .training import logging, loop
from .training import trials as reports
from .training.checkpoints import changed_marks
from .training.loading import is_out_of_memory
from .training.models import add_adapters, choose_device, load_base_and_rows
from .training.saving import save_with_record
from .training.settings import FinetuneSettings, absolute, add_flags, resumed
from .training.trials import SEARCHED

TAKEN = "--output-dir {} is not empty; name a new one, or go on with --resume"
TARGETS = ("q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj", "all-linear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.add_argument("--trials", type=int, default=16, help="settings to try (default: 16)")
    parser.add_argument("--minutes", type=float, help="begin no new trial after this time (default: no limit)")
    parser.add_argument("--search", nargs="+", choices=SEARCHED, metavar="NAME",
                        type=lambda name: name.replace("-", "_"),
                        help=f"what to search over (default: {' '.join(SEARCHED)})")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the study in --output-dir")


def run(args) -> int:
    own = ("trials", "minutes", "search", "resume")
    typed = {name: value for name, value in vars(args).items() if name not in own}
    if args.trials < 1:
        raise ValueError(f"--trials must be at least 1, got {args.trials}")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes must be a finite number above 0, got {args.minutes}")
    settings = FinetuneSettings(**typed)
    if settings.memory_budget:
        raise ValueError("--memory-budget is for finetune; tune takes --gradient-checkpointing and --batch-size")
    if settings.parallel != "none":
        raise ValueError("--parallel must be none: trials run in one process")
    if settings.init_adapter:
        raise ValueError("--init-adapter goes on from one adapter; tune compares new ones")
    if settings.method == "full":
        raise ValueError("--method must be qlora or lora: what is searched are settings of LoRA")
    directory = Path(settings.output_dir or "handtuned-out/tune")
    settings.output_dir, record = str(directory), directory / "tune.json"
    if args.resume:
        if not record.exists():
            raise ValueError(f"--resume: {directory} holds no study (no tune.json)")
        saved = logging.read_json(record, "settings", "marks")
        settings = resumed("study", typed, saved, output_dir=str(directory))
        search = saved["marks"]["search"]
        if args.search not in (None, search):
            raise ValueError(f"--resume goes on with the study's own --search {' '.join(search)}")
        args.search = search
    elif in_use(directory):
        raise ValueError(TAKEN.format(directory))
    try:
        tune(settings, args.trials, args.minutes, tuple(args.search or SEARCHED), new=not args.resume)
    except KeyboardInterrupt:
        again = shlex.join(["--output-dir", settings.output_dir, "--trials", str(args.trials), "--resume"])
        print(f"\nstopped; go on with: handtuned tune {again}")
        return 130
    return 0


def tune(settings: FinetuneSettings, trials: int, minutes: float | None = None, search=SEARCHED,
         new: bool = False) -> dict:  # fmt: skip
    """Search; everything lands in `settings.output_dir`, and a study that is there already is continued.

    Args:
        settings: of every trial, but for what is searched. `max_steps` (40 if None) is the length of a trial.
        trials: how many there shall be in the end, stopped ones included.
        minutes: no trial begins later than this.
        search: names out of `SEARCHED`.
        new: refuse a directory that holds anything: another study may have come first while the model was loaded.

    Returns:
        {"best": trial, "first": trial, "trials": [...]}; a trial is {"number", "state", "settings", "loss",
        "exact_match", "untouched", "bytes", "seconds_a_step", "steps"}. `best` and `first` are finished ones.

    ValueError: settings, data or model that cannot be used; nothing is written then.
    """
    import optuna

    steps = settings.max_steps or 40
    settings = dataclasses.replace(settings.with_defaults(), max_steps=steps)
    runner = TrialRunner(settings, search)
    directory = Path(settings.output_dir)
    if new and in_use(directory):
        raise ValueError(TAKEN.format(directory))
    directory.mkdir(parents=True, exist_ok=True)
    plain = settings.to_json()
    record = {"settings": plain, "paths": absolute(plain), "versions": logging.versions(),
              "marks": runner.base.marks | {"search": list(search)}}  # fmt: skip
    known = directory / "tune.json"
    if known.exists() and changed_marks(logging.read_json(known, "marks")["marks"], record["marks"]):
        raise ValueError(f"{directory}: base model, data or search are not what they were when this study began")
    write_json(known, record)

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial is told by `print_trial`, in a line
    backend = optuna.storages.journal.JournalFileBackend(str(directory / "study.log"))
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 8), reduction_factor=2)
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(study_name="lora", storage=storage, load_if_exists=True, pruner=pruner)
    for name, known in (pair for trial in study.trials for pair in trial.distributions.items()):
        if list(getattr(known, "choices", ())) not in ([], runner.space.choices.get(name)):
            raise ValueError(f"{directory}: what {name} is chosen from is not what it was when this study began")
    if not study.trials:
        study.enqueue_trial({name: runner.space.start[name] for name in search}, user_attrs={"first": True})
    _try_again(study)
    done = sum(t.state.is_finished() and (t.state.name != "FAIL" or "failed" in t.user_attrs) for t in study.trials)
    # The seed depends on how many there are: a resumed study goes its own way, but the same one each time.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + done, n_startup_trials=5)
    print(f"{max(0, trials - done)} trials of up to {steps} steps, judged after {', '.join(map(str, runner.rungs))}; "
          f"{len(runner.choosing)} held-out rows choose, {len(runner.untouched)} are kept for the verdict")  # fmt: skip
    if trials > done:
        study.optimize(runner.run, n_trials=trials - done, timeout=None if minutes is None else 60 * minutes,
                       catch=loop.Diverged, callbacks=[reports.print_trial])  # fmt: skip
    result = reports.summary(study)
    write_json(directory / "trials.json", result)
    reports.draw_pareto(result, directory / "pareto.png")
    print(reports.table(result, settings, directory))
    return result


def _try_again(study) -> None:
    """Put trials that were stopped in the middle, by a kill or Ctrl-C, back in the queue, each once; not those that
    failed for a reason of their own, which is "failed" among their attributes."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
    queued = {trial.user_attrs.get("again") for trial in study.trials}
    for trial in study.get_trials(states=[TrialState.FAIL]):
        if trial.number not in queued and "failed" not in trial.user_attrs:
            known = {"first": trial.user_attrs.get("first", False), "again": trial.number}
            study.enqueue_trial(trial.params, user_attrs=known)


def _states_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of adapter, gradients and moments."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values() if tensor.dim()]
    return 2 * sum(parameter.nbytes for parameter in parameters) + sum(tensor.nbytes for tensor in state)


class Space:
    """What may be searched, around the settings that a study starts from."""

    def __init__(self, settings: FinetuneSettings, search, model):
        target, rate = settings.target_modules, settings.learning_rate
        self.settings, self.search, self.rates = settings, search, (rate / 10, rate * 10)
        # lora_alpha is searched as a multiple of the rank: the scale of the update.
        self.start = {"lora_r": settings.lora_r, "lora_alpha": settings.lora_alpha / settings.lora_r,
                      "learning_rate": rate, "target_modules": target if isinstance(target, str) else ",".join(target),
                      "lora_dropout": settings.lora_dropout}  # fmt: skip
        around = {
            "lora_r": {2, 4, 8, 16, 32},
            "lora_alpha": {0.5, 1.0, 2.0, 4.0},
            "target_modules": {targets for targets in TARGETS if _fits(model, targets, settings)},
            "lora_dropout": {0.0} if settings.target_parameters or all_linear_parameters(model) else {0.0, 0.05, 0.1},
        }
        self.choices = {name: sorted({self.start[name], *values}) for name, values in around.items()}

    def suggest(self, trial) -> FinetuneSettings:
        """The settings of a trial."""
        picked = self.start | {
            name: trial.suggest_float(name, *self.rates, log=True) if name == "learning_rate"
            else trial.suggest_categorical(name, self.choices[name]) for name in self.search}  # fmt: skip
        picked["lora_alpha"] *= picked["lora_r"]
        return dataclasses.replace(self.settings, **picked | {"target_modules": (picked["target_modules"],)})


def _fits(model, targets: str, settings: FinetuneSettings) -> bool:
    """Whether a model has these targets, and they go with what else is chosen (layers left out, ranks by pattern)."""
    words = targets if targets == "all-linear" else targets.split(",")
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(select(model, words, settings.lora_r, settings.lora_alpha, settings.choices()))
    return False


class TrialRunner:
    """The base model and the rows, loaded once for all trials of `settings.max_steps` steps."""

    def __init__(self, settings: FinetuneSettings, search):
        device = choose_device(settings.device)
        self.rungs = sorted({max(1, settings.max_steps >> k) for k in range(4)})
        self.base = load_base_and_rows(settings, device, device)
        rows = self.base.held_out.examples
        if len(rows) < 2:
            raise ValueError(f"tune needs at least 2 held-out rows to choose by, got {len(rows)}: "
                             "--eval-data, or --eval-fraction above 0")  # fmt: skip
        self.choosing, self.untouched = rows[0::2], rows[1::2]
        add_adapters(self.base.model, settings)  # does it fit?
        unload(self.base.model)
        self.space = Space(settings, search, self.base.model)

    def run(self, trial) -> float:
        """One trial: its loss on the choosing rows. optuna.TrialPruned: it is stopped early; Diverged: it ran out of
        memory, its loss is not finite, or its settings do not go together."""
        settings, model = self.space.suggest(trial), self.base.model
        trial.set_user_attr("settings", {name: getattr(settings, name) for name in SEARCHED})
        try:
            add_adapters(model, settings)
            training = loop.prepare(self.base, settings, settings.max_steps)
            loss = self._train(trial, training)
            trial.set_user_attr("untouched", logging.finite(training.lm.score(self.untouched)))
            if all(loss < other.value for other in trial.study.trials if other.state.name == "COMPLETE"):
                save_with_record(self.base, Path(settings.output_dir) / "best")
            return loss
        except (ValueError, RuntimeError, MemoryError) as error:
            if not isinstance(error, ValueError) and not is_out_of_memory(error):
                raise
            failed = loop.Diverged("out of memory" if is_out_of_memory(error) else str(error))
            trial.set_user_attr("failed", str(failed))
            raise failed from None
        finally:
            unload(model)
            gc.collect()  # what an error still held
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _train(self, trial, training: loop.Training) -> float:
        """All steps, with the choosing rows scored at each rung; returns the last loss on them."""
        import optuna
        from tqdm import tqdm

        seconds, began = 0.0, time.perf_counter()
        with tqdm(loop.train(training), total=training.total, desc=f"trial {trial.number}", unit="step",
                  dynamic_ncols=True, leave=False) as bar:  # fmt: skip
            for row in bar:
                seconds, step = seconds + time.perf_counter() - began, row["step"]
                bar.set_postfix_str(f"loss {row['loss']:.4f}")
                if step in self.rungs:
                    scores = training.lm.score(self.choosing)
                    if not math.isfinite(loss := scores["loss"]):
                        raise loop.Diverged(f"step {step}: the loss on held-out rows is {loss:g}")
                    trial.report(loss, step)
                    trial.set_user_attr("exact_match", scores["exact_match"])
                    trial.set_user_attr("bytes", _states_bytes(training.optimizer))
                    trial.set_user_attr("seconds_a_step", seconds / step)
                    spared = trial.user_attrs.get("first") or step == training.total
                    if not spared and trial.should_prune():
                        raise optuna.TrialPruned
                began = time.perf_counter()
        return loss
