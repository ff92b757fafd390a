"""Held-out scores and sample answers in `finetune`, shared out over the ranks that train together."""

from functools import partial

from . import answers as answering
from . import telling
from .parallel import Team


def write_answers(team: Team, model, tokenizer, prompts: list) -> list[str]:
    """The answers to some chats, written by every rank: those that share a model must make the same forward passes."""
    if not prompts:
        return []
    in_step = {"synced_gpus": True} if team.mode == "fsdp" else {}
    return team.evaluate(lambda: answering.write_answers(model, tokenizer, prompts, **in_step))


def score(team: Team, answers, held_out: list, what: str) -> dict | None:
    """`AnswerModel.score` of the held-out rows, each on one rank; None when there are none."""
    if not held_out:
        return None
    mine, extra, counted = deal(held_out, team.rank, team.size)
    scored = []
    for rows, counts in ((mine, True), (extra, counted)):
        if rows:
            result = team.evaluate(partial(telling.score, answers, rows, what))
            if counts:
                tokens = sum(row.answer_tokens for row in rows)
                scored.append((result, {"loss": tokens, "token_accuracy": tokens, "exact_match": len(rows)}))
    if team.size == 1:
        return scored[0][0]
    combined = {}
    for name in ("loss", "token_accuracy", "exact_match"):
        weight = team.sum(float(sum(weights[name] for _, weights in scored)))
        combined[name] = team.sum(float(sum(result[name] * weights[name] for result, weights in scored))) / weight
    return combined | {"rows": len(held_out)}


def deal(rows: list, rank: int, size: int) -> tuple[list, list, bool]:
    """Share out rows so that all ranks make equally many forward passes, as FSDP needs.

    Returns:
        this rank's rows, the same number for each rank; one row more, where they do not come out even;
        and whether that row is to be counted here (else it is scored for the company only).
    """
    even = len(rows) - len(rows) % size
    rest = rows[even:]
    return rows[rank:even:size], rest[rank : rank + 1] or rest[:1], rank < len(rest)
