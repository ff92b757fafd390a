"""The lessons' machinery, and the proof of every exercise: solution passes, stub and wrong answers fail and say why."""

import functools
import math
import re

import lesson_answers as answers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from handtuned.lessons import canaries
from handtuned.lessons.exercise import verdict
from handtuned.nn import checkpoint

from handtuned import lessons

LESSONS = [f"{number:02d}" for number in range(13)]
ALL = [(key, exercise) for lesson in LESSONS for key, exercise in lessons.exercises_of(lesson).items()]
IDS = [key for key, _ in ALL]


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_has_exercises_named_after_it(lesson):
    exercises = lessons.exercises_of(lesson)
    assert list(exercises) == [f"{lesson}.{number}" for number in range(1, len(exercises) + 1)]
    assert 2 <= len(exercises) <= 8


@pytest.mark.parametrize("key, exercise", ALL, ids=IDS)
def test_exercise_is_complete(key, exercise):
    assert exercise.title and exercise.specification and exercise.hints
    assert len(exercise.wrong) >= 3, "three typical wrong answers"


@pytest.mark.parametrize("key, exercise", ALL, ids=IDS)
def test_solution_passes(key, exercise):
    right, message = verdict(exercise, exercise.solution)
    assert right, message
    assert len(message) > len("right. ") + 10 and "None" not in message, "it says what was tried"


@functools.cache
def stub_message(key):
    exercise = lessons.exercises_of(key[:2])[key]
    return verdict(exercise, exercise.stub)[1]


@pytest.mark.parametrize("key, exercise", ALL, ids=IDS)
def test_stub_fails(key, exercise):
    right, message = verdict(exercise, exercise.stub)
    assert not right and message.startswith("not yet.")


@pytest.mark.parametrize(
    "key, exercise, name",
    [pytest.param(key, exercise, name, id=f"{key}-{name}") for key, exercise in ALL for name in exercise.wrong],
)
def test_wrong_answer_fails_and_its_message_points_at_the_mistake(key, exercise, name):
    candidate, phrase = exercise.wrong[name]
    right, message = verdict(exercise, candidate)
    assert not right, "the checker lets it pass"
    assert phrase in message
    assert message != stub_message(key)


UNUSUAL = {
    "02.1": answers.axpy(True),
    "03.2": answers.step(1),
    "04.3": answers.chunked_in_fp64,
    "05.1": answers.least_groups,  # a numpy integer
    "06.2": answers.train_epoch(True),
    "06.3": answers.rate,
    "08.2": answers.Merged,
    "09.1": answers.codes(np.uint8),
    "10.1": lambda x, q: checkpoint(lambda x: F.linear(x, q.dequantize()), x),
}


UNUSUAL |= {
    "01.2": answers.fate_by_torch,
    "03.2, cleared afterwards": answers.step_clearing_afterwards,
    "05.1, the most groups": answers.most_groups,
    "11.3": answers.zero_step_in_place,
    "11.3, updates": answers.zero_step_of_updates,
    "12.4": answers.capstone_by_the_library(),
    "12.4, on a copy": answers.capstone_on_a_copy,
    "12.4, own rows": answers.capstone_on_own_rows,
}


@pytest.mark.parametrize("key", UNUSUAL)
def test_an_unusual_right_answer_passes(key):
    right, message = verdict(lessons.exercises_of(key[:2])[key.split(",")[0]], UNUSUAL[key])
    assert right, message


@pytest.mark.parametrize(
    "key, candidate, phrase",
    [
        ("00.1", lambda count: None, "does your function return it"),
        ("00.2", lambda *sizes: None, "one number of bytes"),
        ("01.1", lambda bits: abs(lessons.exercises_of("01")["01.1"].solution(bits)), "highest bit is the sign"),
        ("01.2", lambda x: "zero" if x < 0 else lessons.exercises_of("01")["01.2"].solution(x), "abs(x)"),
        ("02.1", answers.axpy(False), "read past its end"),
        ("03.2", answers.step(-1), "against the gradient"),
        ("03.3", answers.unscale_clearing, "leave it as it is"),
        ("05.3", answers.groups(lambda layers, groups: -(-layers // groups)), "groups of [3, 3, 1] layers"),
        ("05.3", answers.groups(lambda layers, groups: layers // groups), "groups of [2, 2, 4] layers"),
        ("06.2", answers.train_epoch(False), "cleared before the first backward"),
        ("07.1", answers.product_of_factors, "not their product"),
        ("08.2", answers.NeverMerged, "belongs into the weight"),
        ("09.1", answers.codes(np.int64), "must be uint8"),
        ("10.2", lambda *counts: None, "one number of bytes"),
        ("01.2", lambda x: "subnormal" if 2**-25 < abs(x) < 2**-14 else answers.fate_by_torch(x), "6.102e-05"),
        ("03.2", answers.step(1, lambda g: not g.isinf().any()), "held nan"),
        ("05.1", lambda n, b, i: max(1, min(n, math.floor((n * i / b) ** 0.5))), "compare all numbers"),
        ("05.1", lambda n, b, i: max(1, min(n, math.ceil((n * i / b) ** 0.5))), "compare all numbers"),
        ("11.3", answers.momenta_stacked, "gathered into one tensor"),
        ("11.3", answers.momenta_gathered_late, "gathered into one tensor"),
        ("11.2", lambda elements, ranks: [elements] * ranks, "is a pair"),
        ("12.4", lambda model, tokenizer, rows, *_: [answer for _, answer in rows], "Return two lists"),
        ("12.4", lambda model, tokenizer, rows, *_: [["?"] * len(rows)] * 2, "before training the base answers"),
        ("12.4", answers.capstone_by_the_library(saved=False), "there is no adapter_config.json"),
        ("12.4", answers.capstone_made_up, "loaded by PEFT, answers"),
        ("12.4", answers.capstone_on_no_rows, "four or more pairs"),
    ],
)
def test_a_further_wrong_answer_is_refused(key, candidate, phrase):
    right, message = verdict(lessons.exercises_of(key[:2])[key], candidate)
    assert not right and phrase in message, message


def test_check_tells_what_it_tried(capsys):
    assert lessons.check("00.1", lambda count: count / 2**30) is True
    assert capsys.readouterr().out.startswith("00.1 GB and GiB: right. tried")


def test_check_tells_the_mistake_and_the_first_hint(capsys):
    assert lessons.check("00.1", lambda count: count / 1e9) is False
    told = capsys.readouterr().out
    assert "not yet." in told and "Hint 1 of 2" in told


def test_check_survives_an_answer_that_crashes(capsys):
    def answer(count):
        return count.missing

    assert lessons.check("00.1", answer) is False
    told = capsys.readouterr().out
    assert "AttributeError" in told and "return count.missing" in told


def test_check_of_something_that_cannot_be_called(capsys):
    assert lessons.check("00.1", 3.0) is False
    assert "Pass the function itself, not float" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["00.9", "77.1", "nonsense"])
def test_unknown_exercise(key):
    with pytest.raises(ValueError, match=r"must be (one of|a lesson and a number)"):
        lessons.check(key, lambda: None)


def test_hint(capsys):
    lessons.hint("00.1", 2)
    assert capsys.readouterr().out == "Hint 2 of 2: Divide by 2**30.\n"
    with pytest.raises(ValueError, match="1…2"):
        lessons.hint("00.1", 3)


@pytest.mark.parametrize(
    "got, want, told",
    [
        (torch.zeros(3), torch.zeros(2), "has the shape (3,), expected (2,)"),
        (torch.zeros(2), torch.zeros(2).half(), "has dtype torch.float32, expected torch.float16"),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), "is 1 at [0, 1], expected 2 (1 of 2 values differ)"),
        (None, 1.0, "is None"),
        ("text", 1.0, "should be a number or tensor, got str"),
        (float("nan"), 1.0, "is nan, expected 1"),
    ],
)
def test_expect_close_names_the_difference(got, want, told):
    with pytest.raises(lessons.WrongAnswer) as caught:
        lessons.expect_close(got, want, "x")
    assert told in str(caught.value)


def test_expect_close_lets_equal_things_pass():
    lessons.expect_close(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), "x")
    lessons.expect_close(1.0 + 1e-9, 1.0, "x", rtol=1e-8)
    lessons.expect_close([1, 2], torch.tensor([1.0, 2.0]).long(), "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8], ids=str)
def test_canaries_notice_a_write_on_either_side(dtype):
    tensor = canaries.guarded(10, dtype, device="cpu")
    canaries.check_canaries("out", tensor)
    whole = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())
    whole[canaries.PAD + 12] = 1
    with pytest.raises(lessons.WrongAnswer, match="past its end: 1 elements, as far as element 12 of 10"):
        canaries.check_canaries("out", tensor)
    tensor = canaries.guarded(10, dtype, device="cpu")
    whole = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())
    whole[canaries.PAD - 3] = 1
    with pytest.raises(lessons.WrongAnswer, match="before its beginning: 1 elements, as far as element -3"):
        canaries.check_canaries("out", tensor)


def test_a_canary_copied_from_another_buffer_is_noticed():
    """A careless copy kernel carries NaNs from the edge of its input to the edge of its output."""
    first, second = canaries.guarded(10, device="cpu"), canaries.guarded(10, device="cpu")
    source = torch.empty(0).set_(first.untyped_storage())
    torch.empty(0).set_(second.untyped_storage())[:] = source
    with pytest.raises(lessons.WrongAnswer):
        canaries.check_canaries("out", second)


def test_outputs_begin_as_nan():
    with pytest.raises(lessons.WrongAnswer, match=r"out holds NaN at \[0\]"):
        canaries.no_holes("out", canaries.guarded(4, device="cpu"))


def test_claims_are_70_and_each_has_one_lesson():
    assert list(lessons.CLAIMS) == list(range(1, 71))
    for number, entry in lessons.CLAIMS.items():
        assert entry.number == number and entry.notebook in LESSONS[1:] and entry.says.endswith((".", "?"))
        assert entry.verdict in ("right", "imprecise", "wrong", "undecidable here")
        assert set(entry.documents) <= {"000", "001", "002", "003", "004"} and entry.documents


def test_each_claim_has_the_words_of_each_of_its_documents():
    for entry in lessons.CLAIMS.values():
        said = re.fullmatch(r"(00\d(「[^「」]+」)+ ?)+", entry.original)
        assert said and tuple(re.findall(r"(00\d)「", entry.original)) == entry.documents, entry.number


def test_claim_shows_both_sides_and_fails_if_it_does_not_hold(capsys):
    lessons.claim(2, "70000 becomes inf", holds=True)
    told = capsys.readouterr().out
    assert "The notes say (000 CS224N lecture 12)" in told and "We measure: 70000" in told and "imprecise" in told
    assert "In their words: 000「" in told and "就会变成 NAN" in told
    with pytest.raises(AssertionError, match="does not bear this out"):
        lessons.claim(2, "70000 becomes NaN", holds=False)


def test_pictures_need_alt_text_and_stay_small():
    fig, ax = lessons.figure(2, 1)
    with pytest.raises(ValueError, match="alt"):
        lessons.show(fig, alt=" ")
    ax.imshow(torch.rand(300, 300).numpy())
    fig.set_size_inches(8, 8)
    with pytest.raises(ValueError, match="bytes"):
        lessons.show(fig, alt="noise")


def test_a_picture_outside_of_a_notebook_prints_its_alt_text(capsys):
    fig, ax = lessons.figure(3, 1)
    lessons.bars(ax, ["a", "b"], [1, 2], "GB", accent=1)
    lessons.show(fig, alt="Two bars.")
    assert capsys.readouterr().out == "[picture: Two bars.]\n"


def test_source_shows_a_part(capsys):
    lessons.source(lessons.gpu, "return", "return")
    assert capsys.readouterr().out == "return torch.cuda.is_available()\n"
    with pytest.raises(ValueError, match="no line"):
        lessons.source(lessons.gpu, "absent")


def test_source_of_an_autotuned_kernel(capsys):
    import triton
    from handtuned.kernels.matmul import _matmul_kernel

    tuned = triton.autotune([triton.Config({})], key=["M"])(_matmul_kernel)
    lessons.source(tuned, "acc = tl.zeros", "acc = tl.zeros")
    assert capsys.readouterr().out.startswith("acc = tl.zeros(")


def test_small_model_is_one_that_transformers_loads(tmp_path):
    from handtuned.lessons.small import small_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = small_model(tmp_path / "small", hidden=64, layers=2, vocab=512)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    text = "Dim the lamps to 40 percent."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == text
    assert model(tokens).logits.shape == (1, tokens.shape[1], 512)
