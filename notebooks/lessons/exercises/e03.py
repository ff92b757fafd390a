"""Lesson 03: the rule of the scale, the order of a step, and a kernel that unscales and looks for overflow."""

import torch

from ...kernels.runtime import tl, triton
from ..canaries import guarded
from ..emulated import seen_there, without_faults
from ..exercise import Exercise, expect, expect_close, number
from ..watch import launched
from . import e03_product

BLOCK = 64


# 03.1


def _next_scale(scale, run, overflow, interval):
    if overflow:
        return scale / 2, 0
    if run + 1 == interval:
        return scale * 2, 0
    return scale, run + 1


def _forgets_nothing(scale, run, overflow, interval):
    if overflow:
        return scale / 2, run
    return (scale * 2, 0) if run + 1 == interval else (scale, run + 1)


def _never_restarts(scale, run, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale * 2 if (run + 1) >= interval else scale), run + 1


def _one_late(scale, run, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if run == interval else (scale, run + 1)


def _check_next_scale(next_scale):
    for interval in (4, 1, 3):
        scale, run = 1024.0, 0
        for overflow in [False] * 3 + [True] + [False] * 9 + [True, True] + [False] * 5:
            want = _next_scale(scale, run, overflow, interval)
            got = next_scale(scale, run, overflow, interval)
            two = isinstance(got, (tuple, list)) and len(got) == 2
            expect(two, f"Return two numbers, (scale, run), got {got!r}.")
            got = number(got[0], "scale"), number(got[1], "run")
            if overflow:
                told = ("An overflow halves the scale.", "An overflow sets the run to 0: steps count only in a row.")
            elif run + 1 == interval:
                told = (
                    "The scale doubles with the step that makes the run as long as the interval.",
                    "After the scale has grown the run starts again at 0.",
                )
            else:
                told = ("A good step in the middle of a run leaves the scale.", "A good step makes the run one longer.")
            expect(
                got == want,
                f"next_scale({scale:g}, {run}, {overflow}, {interval}) is {got}, expected {want}. "
                + told[got[0] == want[0]],
            )
            scale, run = want
    return "tried intervals of 4, 1 and 3, with overflows in between"


# 03.2


def _step(w, loss, scale, max_norm, lr, clip_first=False, bad=lambda g: not g.isfinite().all(), unscale=True, clear=1):
    if clear:
        w.grad = None
    (loss * scale).backward()
    grad = w.grad
    if bad(grad):
        return False
    if clip_first:
        grad = grad * torch.clamp(max_norm / (grad.norm() + 1e-6), max=1.0)
    if unscale:
        grad = grad / scale
    if not clip_first:
        grad = grad * torch.clamp(max_norm / (grad.norm() + 1e-6), max=1.0)
    with torch.no_grad():
        w -= lr * grad
    return True


def _check_step(step):
    for norm, scale, max_norm, lr in ((0.5, 1024.0, 1.0, 0.1), (3.0, 1024.0, 1.0, 0.1), (3.0, 64.0, 2.0, 0.02)):
        torch.manual_seed(1)
        direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
        w = torch.zeros(8, requires_grad=True)
        done = step(w, (w * direction).sum() * norm, scale, max_norm, lr)
        moved = (w.detach().norm() / lr).item()
        want = min(norm, max_norm)
        told = "Unscale, then clip, then step." if moved else "w has not moved: change it in place."
        if scale == 64:
            told = "Only now scale is 64, max_norm 2 and lr 0.02: are other numbers written into your function?"
        elif abs(moved - 1 / 1024) < 1e-4:
            told = "The gradient was clipped while it was still scaled: unscale first."
        elif abs(moved - 1.0) < 1e-3 and want != 1.0:
            told = (
                "A gradient of norm 0.5 must not be clipped at 1: either it is still scaled, or every gradient is "
                "brought to max_norm. Clipping shortens only what is longer."
            )
        elif abs(moved - norm) < 1e-3:
            told = "It was not clipped."
        what = f"the length of the step over lr, for a gradient of norm {norm}"
        expect_close(moved, want, what, atol=1e-3, hint=told)
        downhill = -lr * want * direction
        told = "Its length is right, its direction is not: go against the gradient, w -= lr * gradient."
        expect_close(w.detach(), downhill, f"w after the step, for a gradient of norm {norm}", atol=1e-4, hint=told)
        expect(bool(done), "step returns False (or None) although it moved the weights.")
        step(w, (w * direction).sum() * norm, scale, max_norm, lr)
        told = "backward adds to w.grad, where the last step's gradient still lay: clear it."
        expect_close(w.detach(), 2 * downhill, f"w after a second step, norm {norm}", atol=2e-4, hint=told)
    for bad in (float("inf"), float("-inf"), float("nan"), 1e37):  # 1e37 · 1024 is infinite
        w = torch.ones(4, requires_grad=True)
        done = step(w, (w * torch.tensor([1.0, bad, 1.0, 1.0])).sum(), 1024.0, 1.0, 0.1)
        told = "Scale the loss before backward: then it is infinite. " if bad == 1e37 else ""
        expect(
            torch.equal(w.detach(), torch.ones(4)) and not done,
            f"A gradient held {bad}, to be scaled by 1024; the weights became {w.detach().tolist()}, the answer was "
            f"{done}. {told}Skip the step and return False: inf, -inf and NaN are all not finite.",
        )
        done = step(w, (w * torch.tensor([0.5, 0.0, 0.0, 0.0])).sum(), 1024.0, 1.0, 0.1)
        expect(
            bool(done) and torch.allclose(w.detach(), torch.tensor([0.95, 1.0, 1.0, 1.0]), atol=1e-4),
            f"The step after a skipped one must be an ordinary one; w became {w.detach().tolist()}. w.grad still holds "
            f"the {bad}: clear it.",
        )
    return "tried a short gradient and a long one, two steps each; inf, -inf, NaN, an overflow, a good step after each"


# 03.3


@triton.jit
def _unscale_kernel(grad_ptr, inv_scale, flag_ptr, N, BLOCK: tl.constexpr, FORM: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    if FORM == 1:
        grad = tl.load(grad_ptr + offs)
    else:
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    tl.store(grad_ptr + offs, grad * inv_scale, mask=mask)
    if FORM == 2:
        bad = tl.max(tl.where(tl.abs(grad) == float("inf"), 1, 0), axis=0)
    else:
        bad = tl.max(tl.where(tl.abs(grad) < float("inf"), 0, 1), axis=0)
    if FORM == 3:
        tl.store(flag_ptr, bad.to(tl.float32))
    elif FORM == 4:
        tl.store(flag_ptr, tl.maximum(tl.load(flag_ptr), bad.to(tl.float32)))
    else:
        tl.store(flag_ptr, 1.0, mask=bad != 0)


def _unscale(form=0):
    def unscale(grad, scale, found_inf):
        grid = (triton.cdiv(grad.numel(), BLOCK),)
        _unscale_kernel[grid](grad, 1.0 / scale, found_inf, grad.numel(), BLOCK=BLOCK, FORM=form)

    return unscale


def _check_unscale(unscale):
    cases = (
        (64, None, "nothing"),
        (100, None, "nothing"),
        (130, (3, float("inf")), "an infinity in the first block"),
        (130, (129, float("inf")), "an infinity in the last block"),
        (130, (3, float("-inf")), "minus infinity"),
        (70, (69, float("nan")), "a NaN"),
        (100, (0, 3e38), "two of the largest finite numbers"),
        (5000, (4777, float("inf")), "an infinity"),
        (130, (2, float("inf")), "several infinities"),
        (1, None, "nothing"),
        (65, None, "nothing new"),
    )
    told = {
        "nothing": "No gradient is bad here. Does your program look at elements beyond the end? Mask the load, with a "
        "harmless value for other.",
        "a NaN": "NaN counts as well. A comparison with NaN is always false: ask whether |g| < inf holds.",
        "an infinity in the first block": "A later program must not write 0 over the 1 of an earlier one: store 1 only "
        "where something bad was seen, and nothing otherwise.",
        "an infinity in the last block": "Every program looks at its block, and may store.",
        "minus infinity": "Minus infinity counts as well.",
        "two of the largest finite numbers": "They are finite, though their sum is not: look at each by itself.",
        "an infinity": "Does the grid have enough programs for all of grad?",
        "several infinities": "The flag is 1, however many there are and however many programs see one.",
        "nothing new": "It was 1 before, from another tensor. If nothing is bad here, leave it as it is.",
    }
    for n, bad, what in cases:
        values = torch.randn(n)
        if bad is not None:
            values[bad[0]] = bad[1]
        if what in ("two of the largest finite numbers", "several infinities"):
            values[bad[0] + 1] = bad[1]
        before = float(what == "nothing new")
        grad, flag = guarded(n, values=values), guarded(1, values=torch.tensor([before]))
        scale = 3.0 if n % 2 else 8.0
        launched(unscale, grad, scale, flag, changed={"grad": grad, "found_inf": flag}, what=f"N = {n}")
        found, want = flag.item(), max(before, float(not values.isfinite().all()))
        expect(found == want, f"N = {n} with {what} to find: found_inf is {found:g}, expected {want:g}. {told[what]}")
        what = f"grad for N = {n}, scale = {scale:g}"
        expect_close(grad.cpu(), values / scale, what, rtol=1e-6, hint="Multiply by 1 / scale, in place.")

    def call():
        grad = torch.randn(1000)
        grad[3] = float("inf")
        unscale(grad, 8.0, torch.zeros(1))

    gpu = without_faults(call)
    return f"tried {len(cases)} gradients, with infinities and NaN in several places{seen_there(gpu)}"


EXERCISES = {
    "03.1": Exercise(
        title="The rule of the scale",
        specification="next_scale(scale, run, overflow, interval) → (scale, run): one move of the search.",
        checker=_check_next_scale,
        solution=_next_scale,
        wrong={
            "an overflow keeps the run": (_forgets_nothing, "only in a row"),
            "the run never restarts": (_never_restarts, "starts again at 0"),
            "one step late": (_one_late, "as long as the interval"),
        },
        hints=(
            "There are three cases: an overflow, the step that completes the run, and any other step.",
            "In the first two the new run is 0.",
        ),
    ),
    "03.2": Exercise(
        title="The order of a step",
        specification="step(w, loss, scale, max_norm, lr): backward, unscale, clip, move w; skip if not finite.",
        checker=_check_step,
        solution=_step,
        wrong={
            "clips scaled gradients": (lambda *a: _step(*a, clip_first=True), "unscale first"),
            "never scales": (lambda w, loss, scale, *a: _step(w, loss, 1.0, *a), "Scale the loss"),
            "never unscales": (lambda *a: _step(*a, unscale=False), "still scaled"),
            "never skips": (lambda *a: _step(*a, bad=lambda g: False), "Skip the step"),
            "looks for infinity alone": (lambda *a: _step(*a, bad=lambda g: g.isinf().any()), "held nan"),
            "never clears": (lambda *a: _step(*a, clear=0), "clear it"),
        },
        hints=(
            "(loss * scale).backward() fills w.grad. Look at it before you use it.",
            "Divide by scale, then multiply by min(1, max_norm / norm), then w -= lr * gradient under torch.no_grad().",
        ),
    ),
    "03.3": Exercise(
        title="A kernel that unscales and looks",
        specification="unscale(grad, scale, found_inf): grad /= scale in place; found_inf becomes 1 for inf or NaN.",
        checker=_check_unscale,
        solution=_unscale(),
        wrong={
            "unmasked load": (_unscale(1), "read past its end"),
            "forgets NaN": (_unscale(2), "NaN counts as well"),
            "later programs overwrite": (_unscale(3), "must not write 0"),
            "reads the flag and writes it back": (_unscale(4), "a GPU need not. race"),
        },
        hints=(
            "Start from the SiLU kernel of lesson 02; load and store the same pointer.",
            "bad = tl.max(tl.where(tl.abs(g) < float('inf'), 0, 1), axis=0) is 1 if any element is inf or NaN.",
            "tl.store(flag_ptr, 1.0, mask=bad != 0) writes only if it must.",
        ),
    ),
    **e03_product.EXERCISES,
}
