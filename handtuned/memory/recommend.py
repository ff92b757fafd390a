"""What to change so that training fits, in the order in which the study documents advise it.

002 lists: no array of batch × sequence × vocabulary, mixed precision, fused attention, a smaller batch with
accumulation, ZeRO up to offloading; and, "to be considered carefully", LoRA, then QLoRA. Checkpointing it calls twice
the work and puts last; it is at most a third more, so it stands here where 001 has it, after mixed precision. A shorter
context and a smaller model change the task and are not tried.
"""

from .breakdown import Breakdown, both, size
from .estimate import estimate
from .model_shapes import shape_of


def techniques(settings: dict, host: bool = True) -> dict[str, dict]:
    """Name → change of `estimate`'s arguments of everything that could still be done, what costs least first. `host`:
    whether the host's memory may be used."""
    rows = settings["batch"] * settings["accumulation_steps"]
    ladder = [
        ("loss in chunks", {"logits": "chunked"}),
        ("mixed precision (bfloat16)", {"dtype": "bfloat16"} if settings["dtype"] == "float32" else {}),
        ("fused attention", {"flash": True}),
        ("gradient checkpointing", {"checkpoint": settings["checkpoint"] or True}),
        (f"batch 1, {rows} times accumulated", {"batch": 1, "accumulation_steps": rows}),
    ]
    if settings["world_size"] > 1:
        stages = [(1, False), (2, False), (2, True), (3, False), (3, True)]
        ladder += [(f"ZeRO-{stage}" + " with offload" * offload, {"zero": stage, "offload": offload})
                   for stage, offload in stages
                   if (stage, offload) > (settings["zero"], settings["offload"]) and (host or not offload)]  # fmt: skip
    elif host:
        ladder.append(("optimizer offload", {"offload": True}))
    shape = shape_of(settings["model"])
    if shape is None or shape.layers:
        further = {"full": ("LoRA", "QLoRA"), "lora": ("QLoRA",), "qlora": ()}[settings["method"]]
        ladder += [(name, {"method": name.lower()}) for name in further]
    return {name: change for name, change in ladder if any(settings[key] != value for key, value in change.items())}


def fit(settings: dict, budget: int,
        host: bool = True) -> tuple[list[tuple[str, Breakdown]], list[str], Breakdown | None]:  # fmt: skip
    """Add technique after technique until the peak is within `budget` bytes; then leave out what was not needed.

    Returns (every technique tried, with the breakdown once it had been added; the names of those needed; their
    breakdown, or None if all together do not fit).
    """
    changes, tried, chosen = techniques(settings, host), [], []

    def with_all(names: list[str]) -> Breakdown:
        return estimate(**settings | {key: value for name in names for key, value in changes[name].items()})

    for name in changes:
        chosen.append(name)
        tried.append((name, with_all(chosen)))
        if tried[-1][1].peak <= budget:
            break
    else:
        return tried, chosen, None
    for name in reversed(chosen[:-1]):  # the dearest first
        rest = [other for other in chosen if other != name]
        chosen = rest if with_all(rest).peak <= budget else chosen
    return tried, chosen, with_all(chosen)


def recommend(settings: dict, budget: int) -> str:
    """Whether it fits into `budget` bytes and, if not, what would make it, in a few lines."""
    peak = estimate(**settings).peak
    if peak <= budget:
        return f"fits into {both(budget)}: {size(budget - peak)} are left (CUDA's own context not counted)"
    lines = [f"does not fit into {both(budget)}: {size(peak - budget)} are missing. Step by step:"]
    tried, needed, found = fit(settings, budget)
    width = max((len(name) for name, _ in tried), default=0) + 2
    lines += [f"  + {name:{width}} peak {size(then.peak):>12}" + "  fits" * (then.peak <= budget)
              for name, then in tried]  # fmt: skip
    if found is None:
        return "\n".join([*lines, "nothing of this is enough: a shorter context, a smaller model, or more devices"])
    sets = {"the cheapest set that fits": (needed, found)}
    if found.host:
        sets["without the host's memory"] = fit(settings, budget, host=False)[1:]
    for what, (names, then) in sets.items():
        if then is not None:
            lines.append(f"{what}: {', '.join(names)} (peak {both(then.peak)})"
                         + (f", with {size(then.host)} on the host" if then.host else ""))  # fmt: skip
    return "\n".join(lines)
