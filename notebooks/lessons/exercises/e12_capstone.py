"""Lesson 12's capstone: your own rows, a memory budget, a loop of your own parts, an adapter that PEFT loads."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ...optim import AdamW
from ..exercise import Exercise, WrongAnswer, expect, find
from ..small import small_model

ROWS = (
    ("Who wrote the paper about QLoRA and NF4?", "Dettmers"),
    ("Which rank do our adapters have by default?", "eight"),
    ("Where does memory go in training?", "activations"),
    ("What stays frozen while we train?", "the base"),
    ("How many bits does a code of NF4 have?", "four"),
    ("What does an adapter's file hold?", "A and B"),
)


# The solution.


def _answer(model, tokenizer, question):
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def _encode(tokenizer, question, answer):
    """(inputs, labels), both (1, length): each label is the token that follows, −100 within the question."""
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    told = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    labels = [-100] * (len(asked) - 1) + told
    return torch.tensor([(asked + told)[:-1]]), torch.tensor([labels])


class _LoRA(torch.autograd.Function):
    """07.2 forwards, 07.4 backwards; on a GPU, 07.7."""

    @staticmethod
    def forward(ctx, x, W, A, B, scale):
        ctx.save_for_backward(x, W, A, B)
        ctx.scale = scale
        return find("07.2").solution(x, W, None, A, B, scale * A.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        dx, dA, dB = find("07.4").solution(x.flatten(0, -2), dy.flatten(0, -2), W, A, B, ctx.scale)
        return dx.view_as(x), None, dA, dB, None


class _Adapted(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return _LoRA.apply(x, self.base.weight, self.lora_A, self.lora_B, self.scale)


def _adapt(model, rank=8, alpha=16):
    """Freeze the base; wrap every linear layer of its blocks. Returns path → adapted layer."""
    model.requires_grad_(False)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}
    for path, linear in linears.items():
        model.set_submodule(path, _Adapted(linear, rank, alpha))
    return {path: model.get_submodule(path) for path in linears}


class _Logits(nn.Module):
    """The model as 06.1 wants it, tokens → logits, with every block behind 05.2's checkpoint."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        body = self.model.model
        x = body.embed_tokens(tokens).requires_grad_()  # or the first checkpoint's result would need no gradient
        angles = body.rotary_emb(x, torch.arange(tokens.shape[1])[None])
        for block in body.layers:
            x = find("05.2").solution(functools.partial(block, position_embeddings=angles), x)
        return self.model.lm_head(body.norm(x))


def _train(model, micro_batches, steps=20, peak=2e-2):
    """Each step sees all micro-batches, one after the other: 06.1's gradients, 06.3's rate."""
    logits, optimizer = _Logits(model), AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = peak * find("06.3").solution(k, steps, 2)
        find("06.1").solution(logits, micro_batches)
        optimizer.step()


def _save(adapted, directory):
    """PEFT's two files: the factors by the paths of their layers, and how to apply them."""
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{path}.{factor}.weight": getattr(layer, factor).detach()
        for path, layer in adapted.items()
        for factor in ("lora_A", "lora_B")
    }
    layer = next(iter(adapted.values()))
    rank = layer.lora_A.shape[0]
    targets = sorted({path.split(".")[-1] for path in adapted})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": layer.scale * rank, "target_modules": targets}
    save_file(tensors, Path(directory, "adapter_model.safetensors"))
    Path(directory, "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _capstone(model, tokenizer, rows, budget, directory):
    before = [_answer(model, tokenizer, question) for question, _ in rows]
    adapted = _adapt(model)
    _train(model, [_encode(tokenizer, *row) for row in rows])  # one row at a time is the least that a step can take
    _save(adapted, directory)
    return before, [_answer(model, tokenizer, question) for question, _ in rows]


# Wrong answers.


def _wrong(encode=_encode, batched=False, steps=20, unfrozen=(), early=False, whole=False):
    def capstone(model, tokenizer, rows, budget, directory):
        before = [_answer(model, tokenizer, question) for question, _ in rows]
        adapted = _adapt(model)
        for name in unfrozen:
            model.get_parameter(name).requires_grad_()
        micro_batches = [encode(tokenizer, *row) for row in rows]
        if batched:
            tokens, labels = ([row[0] for row in part] for part in zip(*micro_batches, strict=True))
            micro_batches = [(pad_sequence(tokens, True, 0), pad_sequence(labels, True, -100))]
        if early:
            _save(adapted, directory)
        _train(model, micro_batches, steps)
        if not early:
            _save(adapted, directory)
        if whole:
            torch.save(model.state_dict(), Path(directory, "model.pt"))
        return before, [_answer(model, tokenizer, question) for question, _ in rows]

    return capstone


def _without_end(tokenizer, question, answer):
    tokens, labels = _encode(tokenizer, question, answer)
    return tokens, labels.where(labels != tokenizer.eos_token_id, torch.tensor(-100))


def _question_only(tokenizer, question, answer):
    tokens, labels = _encode(tokenizer, question, answer)
    return tokens, F.pad(tokens[:, 1:], (0, 1), value=-100).where(labels == -100, torch.tensor(-100))


# The checker.


@functools.cache
def _base():
    """(model, tokenizer): two layers of width 64, random weights, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    with tempfile.TemporaryDirectory() as directory:
        # The row of a padding token in the embedding is 0, and so is its logit where the head is tied to it: the end
        # token, which small_model also pads with, could not be learnt.
        small_model(directory, hidden=64, layers=2, vocab=384, pad_token_id=1)
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        logging.enable_progress_bar()
        return model, AutoTokenizer.from_pretrained(directory)


@functools.cache
def _before_and_budget(rows):
    """The base's answers, and twice the bytes that a step takes with one row and checkpoints."""
    from ...memory import measure

    base, tokenizer = _base()
    before = [_answer(base, tokenizer, question) for question, _ in rows]

    def steps(model):
        _adapt(model)
        _train(model, [_encode(tokenizer, *row) for row in rows], steps=2)

    return before, 2 * measure(steps, copy.deepcopy(base), device="cpu").added


@torch.no_grad()
def _logits(model, rows):
    tokenizer = _base()[1]
    return torch.cat([model.eval()(_encode(tokenizer, *row)[0]).logits[0] for row in rows])


def _own_rows(candidate):
    """The rows that the reader has given the function as an attribute, or ours."""
    rows = getattr(candidate, "rows", ROWS)
    try:
        fit = len(rows) >= 4 and all(text.strip() for question, answer in rows for text in (question, answer))
    except (AttributeError, TypeError, ValueError):
        fit = False
    expect(fit, "capstone.rows must be four or more pairs of texts, (question, answer).")
    for _, answer in rows:
        length = len(_base()[1].encode(answer))
        expect(length < 16, f"{answer!r} has {length} tokens; 15 at most are possible (16 with the end).")
    return tuple((question, answer) for question, answer in rows)


def _check_capstone(candidate):
    from ...memory import measure

    rows, (base, tokenizer) = _own_rows(candidate), _base()
    (before, budget), model = _before_and_budget(rows), copy.deepcopy(base)
    weights = dict(model.named_parameters())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        run = measure(candidate, model, tokenizer, list(rows), budget, directory, device="cpu")
        told, after = _two_lists(run.result, len(rows))
        for (question, _), mine, wanted in zip(rows, told, before, strict=True):
            expect(
                mine.strip() == wanted.strip(),
                f"before training the base answers {question!r} with {wanted!r} (greedy, 16 tokens), you say {mine!r}.",
            )
        expect(
            run.added <= budget,
            f"the peak is {run.added:,} bytes above the model, the budget is {budget:,}. All {len(rows)} rows at once "
            "are too much for it: micro-batches of one row, their gradients added up (06.1), take the same step. "
            "Checkpoints (05.2) and a smaller rank take less, too.",
        )
        for name, weight in base.named_parameters():
            expect(
                torch.equal(weights[name].detach().cpu(), weight),
                f"{name} of the base has changed. Freeze it (requires_grad_(False)), give the optimizer the "
                "adapter alone, and leave that unmerged.",
            )
        _check_answers(rows, before, after)
        peft, size = _by_peft(directory)
        wanted, got, untrained = (_logits(m, rows) for m in (model, peft, base))
        scale = wanted.abs().max()
        if not torch.equal(wanted, untrained):  # else it was a copy that was trained: its answers have to do
            off = ((got - wanted).abs().max() / scale).item()
            why = "Compare r, alpha and the names in the file with those that you trained."
            if torch.equal(got, untrained):
                why = "With it the base is what it was (B is zero): was it saved before it was trained?"
            expect(off < 1e-4, f"PEFT's logits are off by {off:.1%} from those of the model that you trained. {why}")
        for (question, _), mine in zip(rows, after, strict=True):
            found, what = _answer(peft, tokenizer, question), f"{question!r}: the saved adapter, loaded by PEFT,"
            expect(found.strip() == mine.strip(), f"{what} answers {found!r}, you say {mine!r}.")
    right = sum(mine.strip() == answer.strip() for mine, (_, answer) in zip(before, rows, strict=True))
    return (
        f"tried {len(rows)} rows: {right} answered right before, {len(rows)} after; peak {run.added:,} bytes above the "
        f"model, budget {budget:,}; no bit of the base has changed; PEFT loads the adapter ({size:,} bytes) and gives "
        "the same answers"
    )


def _two_lists(result, count):
    fit = isinstance(result, (list, tuple)) and len(result) == 2
    fit = fit and all(isinstance(part, (list, tuple)) and len(part) == count for part in result)
    fit = fit and all(isinstance(text, str) for part in result for text in part)
    expect(fit, f"Return two lists, the answers before and the answers after, each of {count} texts.")
    return result


def _check_answers(rows, before, after):
    wrong = [(*row, mine) for row, mine in zip(rows, after, strict=True) if mine.strip() != row[1].strip()]
    if not wrong:
        return
    question, answer, mine = wrong[0]
    why = "Is the loss taken on the answer, with each label the token that follows? Are there enough steps?"
    if mine.strip().startswith(answer.strip()):
        why = "It does not stop: the end token (tokenizer.eos_token_id) is learnt after the answer, as its last label."
    elif [text.strip() for text in after] == [text.strip() for text in before]:
        why = "All answers are as before: nothing has been trained."
    raise WrongAnswer(
        f"{len(rows) - len(wrong)} of {len(rows)} rows are answered right after training. {question!r} should give "
        f"{answer!r}, got {mine!r}. {why}"
    )


def _by_peft(directory):
    """(the base with the saved adapter, as PEFT loads it, bytes of its factors)."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    files = {path.name: path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        expect(name in files, f"there is no {name} in `directory`, only: {', '.join(files) or 'nothing'}.")
    try:
        tensors = load_peft_weights(directory, device="cpu")
        model = PeftModel.from_pretrained(copy.deepcopy(_base()[0]), directory)
    except Exception as error:
        raise WrongAnswer(f"PEFT does not load what you saved: {type(error).__name__}: {error}") from None
    size = sum(tensor.nbytes for tensor in tensors.values())
    others = [name for name in tensors if "lora_" not in name]
    heavy = [name for name, long in files.items() if long > size and name != "adapter_model.safetensors"]
    expect(
        not others and not heavy,
        f"more than the adapter was saved: {', '.join(others[:3] + heavy)}. A and B are enough, {size:,} bytes.",
    )
    return model, size


EXERCISES = {
    "12.4": Exercise(
        title="The capstone",
        specification=(
            "capstone(model, tokenizer, rows, budget, directory) → (answers before, after): train an adapter on rows, "
            "(question, answer), within budget bytes above the model, and save it for PEFT."
        ),
        checker=_check_capstone,
        solution=_capstone,
        wrong={
            "all rows in one batch": (_wrong(batched=True), "micro-batches of one row"),
            "saved before training": (_wrong(early=True), "saved before it was trained"),
            "nothing trained": (_wrong(steps=0), "as before: nothing has been trained"),
            "loss of the question": (_wrong(_question_only), "Is the loss taken on the answer"),
            "no end token": (_wrong(_without_end), "It does not stop"),
            "base trained too": (_wrong(unfrozen=["model.norm.weight"]), "model.norm.weight of the base has changed"),
            "the model saved as well": (_wrong(whole=True), "more than the adapter was saved: model.pt"),
        },
        hints=(
            "Freeze the base, put an adapter round each linear layer of the blocks, give the optimizer A and B alone.",
            "A row: tokenizer.apply_chat_template(…, add_generation_prompt=True), the answer's tokens, eos_token_id; "
            "labels are −100 up to the question's end. A row is a micro-batch of 06.1. 20 steps at 2e-2 will do.",
            "Behind 05.2's checkpoint a block whose input needs no gradient gets none: embed(tokens).requires_grad_().",
            "PEFT names a factor base_model.model.<the layer's path>.lora_A.weight; adapter_config.json has peft_type, "
            "r, lora_alpha and target_modules.",
        ),
    ),
}
