"""Lesson 00: units, and the model states of a training step."""

from ..exercise import Exercise, expect, expect_close, number


def _check_gib(gib):
    for count, want in ((2**30, 1.0), (28_000_000_000, 28e9 / 2**30), (2**29, 0.5), (1234, 1234 / 2**30), (0, 0.0)):
        got = number(gib(count), f"gib({count:,})")
        expect_close(got, want, f"gib({count:,})", rtol=1e-9, hint=_gib_mistake(got, count))
    return "tried 28 GB, whole and half a GiB, 1,234 bytes and nothing"


def _gib_mistake(got, count):
    if got == count / 10**9:
        return "You divided by 10**9: that gives GB, and a GiB is larger."
    if got == count // 2**30:
        return "The fraction is lost: // rounds down."
    if got in [round(count / 2**30, digits) for digits in range(1, 13)]:
        return "Do not round."
    if got == count / 2**20:
        return "That is MiB: one more factor of 1024."
    return "A GiB has 2**30 bytes."


def _states(parameters, trainable, weight_bytes):
    return weight_bytes * parameters + weight_bytes * trainable + 8 * trainable


def _check_states(states):
    cases = (
        ("everything is trained, 2-byte weights", (7_000_000_000, 7_000_000_000, 2)),
        ("an adapter of 20 million on 7 billion frozen weights, fp32", (7_000_000_000, 20_000_000, 4)),
        ("nothing is trained", (1000, 0, 2)),
    )
    for name, (parameters, trainable, weight_bytes) in cases:
        want = _states(parameters, trainable, weight_bytes)
        got = number(states(parameters, trainable, weight_bytes), "What states returns", "number of bytes")
        if got == want:
            continue
        if got == weight_bytes * parameters + 8 * trainable:
            told = "The gradients are missing: one number for each trainable parameter."
        elif got == (2 * weight_bytes + 8) * parameters:
            told = "Frozen parameters have neither gradients nor moments."
        elif got == weight_bytes * (parameters + trainable) + 4 * trainable:
            told = "Adam keeps two numbers for each trainable parameter, in fp32."
        else:
            told = "Add weights, gradients and Adam's two moments."
        expect(False, f"{name}: {got:,} bytes, expected {want:,}. {told}")
    return "tried full training, an adapter, and no training"


EXERCISES = {
    "00.1": Exercise(
        title="GB and GiB",
        specification="gib(count): the number of GiB that `count` bytes are, as a float.",
        checker=_check_gib,
        solution=lambda count: count / 2**30,
        wrong={
            "decimal": (lambda count: count / 10**9, "divided by 10**9"),
            "floor": (lambda count: count // 2**30, "rounds down"),
            "mebi": (lambda count: count / 2**20, "That is MiB"),
        },
        hints=("1 KiB = 1024 bytes, 1 MiB = 1024 KiB, and so on.", "Divide by 2**30."),
    ),
    "00.2": Exercise(
        title="The states of a model in training",
        specification="states(parameters, trainable, weight_bytes): bytes of weights, gradients and Adam's moments.",
        checker=_check_states,
        solution=_states,
        wrong={
            "no gradients": (lambda n, t, b: b * n + 8 * t, "gradients are missing"),
            "frozen counted": (lambda n, t, b: (2 * b + 8) * n, "Frozen parameters"),
            "one moment": (lambda n, t, b: b * (n + t) + 4 * t, "two numbers"),
        },
        hints=(
            "Three terms: one over all parameters, two over the trainable ones.",
            "Weights and gradients take weight_bytes each, the two moments 4 bytes each.",
        ),
    ),
}
