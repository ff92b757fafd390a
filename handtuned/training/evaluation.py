"""A causal language model seen through its answers: their loss, their score, and new ones written."""

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F

from ..nn.loss import IGNORE_INDEX, linear_cross_entropy
from . import data
from .formats import as_text
from .logging import finite

SHOWN_PROMPTS = 3
ROWS = 8  # in one forward pass without gradients
LARGE = 256.0  # a logit that no soft cap lets pass


@contextlib.contextmanager
def evaluating(model):
    """Within, the model is in eval mode and records no gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


class HeadLoss(torch.nn.Module):
    """The output head and the loss in one: a module, as what cuts weights makes them whole for a module's call."""

    reads_submodules = True  # asked for by ZeRO-3

    def __init__(self, head: torch.nn.Linear | None):
        super().__init__()
        self.head = head

    def forward(self, hidden, target, **scaling):
        return linear_cross_entropy(hidden, self.head.weight, target, self.head.bias, **scaling)


def base_of(model) -> torch.nn.Module | None:
    """What makes the hidden states, also where the class gives its checkpoints another prefix (Llama 4)."""
    return model.base_model if model.base_model is not model else getattr(model, "model", None)


class CausalLM:
    """Runs a transformers causal LM so that only answer tokens meet the vocabulary.

    Most models are a body and a plain linear head, logits = head(body(tokens)); then the head is applied to the answer
    positions alone (`nn/loss.py`). A model that does more (soft-capped or scaled logits) is found out by comparing both
    ways on `sample`, (1, T) token ids, once, and gets its full logits. The head's output is made large for that, as a
    soft cap leaves the small logits of a young model as they are.

    Under loss scaling in fp16 the head's gradients are rounded with the scale in them: the loop sets `loss_scale` and
    `found_inf` (see `linear_cross_entropy`).

    Batches are right-padded and carry no attention mask: with causal attention nothing to the left of a pad token can
    see it, and pad positions have label −100.
    """

    def __init__(self, model, sample):
        self.model, self.device = model, next(model.parameters()).device
        self.loss_scale = self.found_inf = None
        head = model.get_output_embeddings()
        plain = isinstance(head, torch.nn.Linear) and base_of(model) is not None
        self.head = head if plain and self._only_applies(head, torch.as_tensor(sample).long().to(self.device)) else None
        self.head_loss = HeadLoss(self.head)

    def _only_applies(self, head: torch.nn.Linear, sample: torch.Tensor) -> bool:
        with evaluating(self.model):
            hidden = self._body(sample)
            split = head(hidden) if hidden.shape[-1] == head.in_features else hidden
            largest = split.abs().max().item()
            more = 2.0 ** max(0, round(math.log2(LARGE / largest))) if 0 < largest < LARGE else 1.0
            handle = head.register_forward_hook(lambda module, inputs, output: output * more)
            try:
                logits = self.model(input_ids=sample, use_cache=False).logits
            finally:
                handle.remove()
        if logits.shape != split.shape:
            return False
        return torch.allclose(logits.float(), split.float() * more, rtol=1e-3, atol=1e-3 * min(more, LARGE))

    def _body(self, input_ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        hidden = base_of(self.model)(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
        if torch.is_autocast_enabled(hidden.device.type):
            return hidden
        return hidden.to(self.model.get_output_embeddings().weight.dtype)  # residuals may be in fp32 (Mamba 2)

    def _logits(self, kept: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """(kept positions, vocabulary), fp32; `kept` is (B, T−1) bool."""
        if self.head is None:
            return self.model(use_cache=False, **inputs).logits[:, :-1][kept].float()
        return self.head(self._body(**inputs)[:, :-1][kept]).float()

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of cross-entropies over the answer tokens of one batch of `data.collate`, a scalar in fp32."""
        target = batch["labels"][:, 1:]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if self.head is None:
            kept = target != IGNORE_INDEX
            return F.cross_entropy(self._logits(kept, **inputs), target[kept], reduction="sum")
        hidden = self._body(**inputs)[:, :-1]
        return self.head_loss(hidden, target, loss_scale=self.loss_scale, found_inf=self.found_inf)

    def sums(self, examples: list[data.Example], bar=None) -> list[float]:
        """[loss, answer tokens, right tokens, right rows, rows], summed over examples; what `rates` divides. Rows of
        like length go together, `ROWS` in one forward pass; a progress `bar` is advanced by rows."""
        by_length = sorted(examples, key=lambda example: len(example.input_ids))
        totals = [0, 0, 0, 0, len(examples)]
        for at in range(0, len(by_length), ROWS):
            # any token may fill short rows: nothing looks at it
            batch = data.collate(by_length[at : at + ROWS], pad_id=0, device=self.device)
            target = batch["labels"][:, 1:]
            kept = target != IGNORE_INDEX
            with evaluating(self.model):
                logits = self._logits(kept, input_ids=batch["input_ids"])
            right = ~kept
            right[kept] = logits.argmax(dim=1) == target[kept]
            loss = F.cross_entropy(logits, target[kept], reduction="sum")
            counts = loss, kept.sum(), (right & kept).sum(), right.all(dim=1).sum(), 0
            totals = [total + float(count) for total, count in zip(totals, counts, strict=True)]
            if bar is not None:
                bar.update(len(target))
        return totals

    def score(self, examples: list[data.Example]) -> dict[str, float]:
        """`rates` of these examples."""
        return rates(*self.sums(examples))


def rates(loss: float, tokens: float, correct: float, exact: float, rows: float) -> dict[str, float]:
    """Nats per answer token, token accuracy and exact match.

    Exact match counts the rows in which every answer token, the end of turn included, is the model's likeliest after
    the right ones before it: just those rows that greedy decoding answers letter by letter.
    """
    return {"loss": loss / tokens, "token_accuracy": correct / tokens, "exact_match": exact / rows, "rows": int(rows)}


def generate(model, tokenizer, chats: list[list[dict]], max_new_tokens: int = 48, **sampling) -> list[str]:
    """Answer chats, greedily unless `sampling` says otherwise; all of them in one left-padded batch.

    Args:
        chats: each a list of {"role", "content"} that ends with the user's turn.
        max_new_tokens: longest answer; also none beyond the model's context.
        sampling: further arguments of transformers' `generate`, such as `do_sample`, `temperature`.

    Returns the new text of each chat, without special tokens.
    ValueError: a prompt that fills the model's context.
    """
    device = next(model.parameters()).device
    prompts = [data.encode_prompt(chat, tokenizer) for chat in chats]
    width, context = max(map(len, prompts)), data.context_length(model) or math.inf
    if width >= context:
        raise ValueError(f"a prompt of {width} tokens leaves no room for an answer in the model's context of {context}")
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    options = {"do_sample": False, "eos_token_id": end_tokens(model, tokenizer), **sampling}
    if not options["do_sample"]:
        options.update(temperature=None, top_p=None, top_k=None)
    options.update(pad_token_id=pad, max_new_tokens=min(max_new_tokens, context - width))
    with evaluating(model):
        try:
            out = model.generate(input_ids=ids, attention_mask=mask, **options)
        except (AttributeError, LookupError, TypeError, ValueError):  # some models have no cache that works
            out = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    return [data.decode_answer(row[width:].tolist(), chat, tokenizer) for chat, row in zip(chats, out, strict=True)]


def end_tokens(model, tokenizer) -> list[int] | None:
    """All tokens that end an answer: a base model's own, and the one that its chat template ends a turn with."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), data.end_of_turn(tokenizer)} - {None}
    return sorted(found) or None


def evaluate(training, results: dict, when: str) -> None:
    """Score the held-out rows of a `loop.Training` and answer the first of them, `when` "before" or "after" it.
    `results` gets `when`: scores or None, and in "answers" one dict per prompt with `when`: the model's answer."""
    from tqdm import tqdm

    lm, world, held_out = training.lm, training.world, training.base.held_out
    if not held_out.examples:
        results.update({when: None, "answers": []})
        return
    mine, extra, counted = share_out(held_out.examples, world.rank, world.size)
    with tqdm(total=len(mine), desc=f"held-out, {when:6}", unit="row", dynamic_ncols=True, leave=False) as bar:
        totals = world.evaluate(lambda: lm.sums(mine, bar)) if mine else [0] * 5
    if extra:
        more = world.evaluate(lambda: lm.sums(extra))
        totals = [total + counted * value for total, value in zip(totals, more, strict=True)]
    results[when] = finite(rates(*map(world.sum, totals)))
    whole = (chat for chat, example in zip(held_out.rows, held_out.examples, strict=True)
             if not example.cut and len(chat) > 1)  # fmt: skip
    shown = list(itertools.islice(whole, SHOWN_PROMPTS))
    texts = [{"prompt": as_text(chat[-2]), "expected": as_text(chat[-1])} for chat in shown]
    answers = results.setdefault("answers", texts)
    if shown:
        # Ranks that share a model must make the same forward passes, even where one has answered already.
        in_step = {"synced_gpus": True} if world.cuts_weights and world.size > 1 else {}
        prompts = [chat[:-1] for chat in shown]
        written = world.evaluate(lambda: generate(lm.model, training.base.tokenizer, prompts, **in_step))
        for entry, answer in zip(answers, written, strict=True):
            entry[when] = answer


def share_out(rows: list, rank: int, size: int) -> tuple[list, list, bool]:
    """Share out rows so that all ranks make equally many forward passes, as FSDP needs.

    Returns this rank's rows, the same number for each rank; one row more, where they do not come out even; and whether
    that row counts here (else another rank counts it, and this one only runs it in step).
    """
    even = len(rows) - len(rows) % size
    rest = rows[even:]
    return rows[rank:even:size], rest[rank : rank + 1] or rest[:1], rank < len(rest)
