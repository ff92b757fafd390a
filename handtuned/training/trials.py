"""The trials of a study of `handtuned tune`: as data, the Pareto front, a picture, a table."""

import dataclasses
import math
import shlex
from pathlib import Path

from ..nn.files import whole_file
from .logging import megabytes
from .settings import FinetuneSettings, flag

SEARCHED = ("lora_r", "lora_alpha", "learning_rate", "target_modules", "lora_dropout")


def print_trial(study, trial) -> None:
    """A line when a trial ends."""
    last = max(trial.intermediate_values, default=0)
    why = f"failed: {trial.user_attrs.get('failed', '')}"
    state = {"COMPLETE": "finished", "FAIL": why}.get(trial.state.name, f"stopped after {last} steps")
    loss = trial.intermediate_values.get(last, math.nan)
    print(f"trial {trial.number:3}  loss {loss:.4f}  {state:22} {_short(trial.user_attrs.get('settings', {}))}")


def summary(study) -> dict:
    """A study of Optuna's as plain data: see `tune.tune`."""
    rows = []
    for trial in study.trials:
        failed = trial.user_attrs.get("failed")
        if not (trial.intermediate_values or failed):
            continue
        last = max(trial.intermediate_values, default=0)
        row = {"number": trial.number, "state": trial.state.name.lower(), "steps": last,
               "loss": trial.intermediate_values.get(last)}  # fmt: skip
        known = ("first", "settings", "exact_match", "untouched", "bytes", "seconds_a_step")
        row |= {name: trial.user_attrs.get(name) for name in known}
        rows.append(row | ({"failed": failed} if failed else {}))
    finished = [row for row in rows if row["state"] == "complete"]
    if not finished:
        failed = [f"trial {row['number']} failed: {row['failed']}" for row in rows if "failed" in row]
        raise ValueError(f"no trial was finished; {failed[0] if failed else 'give the search more --minutes'}")
    best = min(finished, key=lambda row: row["loss"])
    first = next((row for row in finished if row["first"]), best)
    return {"best": best, "first": first, "trials": rows}


def pareto_front(rows: list[dict], cost: str) -> list[dict]:
    """The finished trials that no other beats in both `cost` and loss, cheapest first."""
    front: list[dict] = []
    for row in sorted((row for row in rows if row["state"] == "complete"), key=lambda row: (row[cost], row["loss"])):
        if not front or row["loss"] < front[-1]["loss"]:
            front.append(row)
    return front


def draw_pareto(result: dict, path: Path) -> None:
    """Held-out loss against bytes and against time, with the front that nothing beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    costs = (("bytes", 1e6, "adapter, gradients and optimizer state (MB)"), ("seconds_a_step", 1, "time (s per step)"))
    of_state = {state: [row for row in result["trials"] if row["state"] == state] for state in ("pruned", "complete")}
    groups = (("stopped early", of_state["pruned"], "o", "none"), ("finished", of_state["complete"], "o", "0.6"),
              ("first: finetune's own settings", [result["first"]], "^", "black"))  # fmt: skip
    for axes, (cost, unit, label) in zip(figure.subplots(1, 2, sharey=True), costs, strict=True):
        for name, rows, marker, color in groups:
            at = [row[cost] / unit for row in rows], [row["loss"] for row in rows]
            axes.scatter(*at, marker=marker, facecolors=color, edgecolors="black", label=name, zorder=3)
        front = pareto_front(result["trials"], cost)
        axes.plot([row[cost] / unit for row in front], [row["loss"] for row in front], color="tab:orange",
                  drawstyle="steps-post", label="front")  # fmt: skip
        for row in front:
            axes.annotate(str(row["number"]), (row[cost] / unit, row["loss"]), (5, 5), textcoords="offset points")
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.axes[1].legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def table(result: dict, settings: FinetuneSettings, directory: Path) -> str:
    """First and best trial side by side, the front, and the command for a whole run."""
    lines = ["", f"{'':8} {'loss':>8} {'exact':>7} {'untouched rows':>17} {'state':>10} {'s/step':>7}  settings"]
    front = {f"trial {row['number']}": row for row in pareto_front(result["trials"], "bytes")}
    for name, row in ({"first": result["first"], "best": result["best"]} | front).items():
        untouched = math.nan if row["untouched"]["loss"] is None else row["untouched"]["loss"]
        kept = f"{untouched:.4f} {row['untouched']['exact_match']:.1%}"
        cost = f"{megabytes(row['bytes']):>10} {row['seconds_a_step']:7.2f}"
        lines.append(f"{name:8} {row['loss']:8.4f} {row['exact_match']:7.1%} {kept:>17} {cost}  "
                     f"{_short(row['settings'])}")  # fmt: skip
    words, usual = ["handtuned", "finetune"], dataclasses.asdict(FinetuneSettings().with_defaults())
    for name, default in usual.items():
        value = result["best"]["settings"].get(name, getattr(settings, name))
        if name in SEARCHED or (value not in (default, None) and name not in ("output_dir", "max_steps")):
            values = value if isinstance(value, (list, tuple)) else [value]
            plain = [str(value).removesuffix(".0") for value in values]
            words += [flag(name)] if value is True else [flag(name), *plain]
    lines += ["", f"study    {directory} (study.log, trials.json, pareto.png, the best adapter in best/)",
              f"whole run: {shlex.join(words)}"]  # fmt: skip
    return "\n".join(lines)


def _short(settings: dict) -> str:
    if not settings:
        return ""
    target = settings["target_modules"]
    target = target if isinstance(target, str) else ",".join(name.removesuffix("_proj") for name in target)
    return (f"r {settings['lora_r']}, alpha {settings['lora_alpha']:g}, lr {settings['learning_rate']:.1e}, "
            f"dropout {settings['lora_dropout']:g}, {target}")  # fmt: skip
