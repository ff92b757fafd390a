"""Chats → token ids, with labels on the answers alone.

A chat is written out with the model's own chat template. The loss looks only at what the model has to write itself:
every assistant turn, up to and with the token that ends it; labels are -100 everywhere else. The mask follows from
positions in the text, never from token ids: where padding and end of turn share an id (SmolLM2 has 2 for both),
masking "the padding" would hide the end of every answer and the model would never learn to stop.
"""

import contextlib
import functools
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..nn.loss import IGNORE_INDEX
from .files import DataError
from .formats import Chat
from .templates import check_all_is_shown, find_answer, prompt_of, render


@dataclass(frozen=True)
class Example:
    """One chat as two int32 arrays of equal length; the label at position t is predicted from the ids before it."""

    input_ids: np.ndarray
    labels: np.ndarray  # the id itself where it is learnt, else -100
    cut: int = 0  # tokens beyond max_seq_length that were left off at the end
    follows_prompt: bool = True  # answers follow, token by token, the prompts that `encode_prompt` gives
    hides_reasoning: bool = False  # the template leaves out the thinking of a turn

    @property
    def answer_tokens(self) -> int:
        """How many tokens are learnt."""
        return int((self.labels != IGNORE_INDEX).sum())


def encode_prompt(chat: Chat, tokenizer) -> list[int]:
    """Token ids of a chat that ends with the user's turn, ready for the model to answer.

    The template's own generation prompt, but for what it opens and no answer shows: thinking that was not learnt.
    """
    text, answers = prompt_of(chat, tokenizer)[0], []
    with contextlib.suppress(DataError):
        answered = render(chat, tokenizer)
        turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
        answers = [find_answer(chat, turn, answered, tokenizer)[:2] for turn in turns]
    return _tokenize(text, answers, tokenizer)[0]


def decode_answer(ids: list[int], chat: Chat, tokenizer) -> str:
    """What a model has answered to a chat, without special tokens and what the template itself adds: white space, a
    channel, empty thinking."""
    _, before, behind = prompt_of(chat, tokenizer)
    if before.strip():  # it may hold special tokens
        heads = range(1, min(len(ids), len(before)) + 1)
        written = (at for at in heads if tokenizer.decode(ids[:at], skip_special_tokens=False) == before)
        ids, before = ids[next(written, 0) :], ""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    tokens = filter(None, tokenizer.convert_ids_to_tokens(ids))  # an embedding may have more rows than there are tokens
    first = next((token for token in tokens if token not in tokenizer.all_special_tokens), "")
    if first.startswith("▁") and not text.startswith(" "):  # sentencepiece shows no space before a whole text
        text = f" {text}"
    return text.removeprefix(before).removesuffix(behind)


def end_of_turn(tokenizer) -> int | None:
    """The special token that training teaches to end an answer with, which need not be the model's own end of text."""
    try:
        turn = encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], tokenizer)
    except DataError:
        return None
    last = int(turn.input_ids[turn.labels != IGNORE_INDEX][-1])
    return last if _is_special(last, tokenizer) else None


def encode(chat: Chat, tokenizer, max_seq_length: int | None = None, train_on: str = "answers") -> Example:
    """A chat as token ids and labels, the rest cut off beyond `max_seq_length` tokens.

    The ids are those of `tokenizer.apply_chat_template(chat)`, but where that would melt the end of a prompt and the
    beginning of its answer into one token, which no model could write; where the template ends the last answer with no
    special token, the end-of-sequence token follows.

    Args:
        train_on: "answers", all that have no weight 0; "last", the last of them; "all", every token of the chat.

    Raises:
        DataError: the template refuses the chat, hides a part of it, or rewrites it so that an answer cannot be found.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    if chat[0]["role"] == "text":
        ids = tokenizer(chat[0]["content"])["input_ids"]
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]  # the text brings its own, as a chat template writes it
        learnt, follows, text = np.ones(len(ids) + 1, dtype=bool), True, chat[0]["content"]
    else:
        text = render(chat, tokenizer)
        turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
        found = turns[-1 if train_on == "last" else 0 :]
        check_all_is_shown(chat, found, text, tokenizer)
        answers = {turn: find_answer(chat, turn, text, tokenizer) for turn in found}
        ids, offsets, apart = _tokenize(text, [answer[:2] for answer in answers.values()], tokenizer)
        learnt = np.full(len(ids) + 1, train_on == "all")
        learnt[-1] = False
        for turn, (start, stop, end, _) in answers.items():
            first, last = np.searchsorted(offsets[:, 0], [start, stop])
            ends = [at + 1 for at in range(last, len(ids)) if offsets[at, 1] <= end and _is_special(ids[at], tokenizer)]
            if not ends and "tool_calls" in chat[turn]:  # what the template writes behind a call's name
                last = np.searchsorted(offsets[:, 0], len(text[:end].rstrip()))
            if not ends and end == len(text):
                last = len(ids) + 1  # with an end of sequence
            learnt[first : ends[-1] if ends else last] = chat[turn].get("weight") != 0
        *before, (*_, prompt) = answers.values()
        follows = apart and ids[:first] == _tokenize(prompt, [answer[:2] for answer in before], tokenizer)[0]
    if learnt[-1] and tokenizer.eos_token_id is not None and not (ids and _is_special(ids[-1], tokenizer)):
        ids = [*ids, tokenizer.eos_token_id]
    learnt[0] = False  # nothing precedes the first token, so nothing can predict it
    if not learnt[: len(ids)].any():
        raise DataError("the chat template leaves no answer to learn")
    kept = np.array(ids[:max_seq_length], dtype=np.int32)
    labels = np.where(learnt[: len(kept)], kept, IGNORE_INDEX).astype(np.int32)
    thoughts = (turn.get("reasoning_content") or turn["content"].rpartition("</think>")[0].rpartition("<think>")[2]
                for turn in chat)  # fmt: skip
    hidden = any(thought.strip() not in text for thought in thoughts)
    return Example(kept, labels, len(ids) - len(kept), follows, hidden)


def describe_example(example: Example, tokenizer) -> str:
    """The text of an example as the model sees it, with what is learnt between >> and <<."""
    learnt, text = example.labels != IGNORE_INDEX, ""
    edges = np.flatnonzero(np.diff(learnt.astype(np.int8))) + 1
    for start, stop in pairwise([0, *edges.tolist(), len(learnt)]):
        text_of_run = tokenizer.decode(example.input_ids[start:stop].tolist(), skip_special_tokens=False)
        text += f">>{text_of_run}<<" if learnt[start] else text_of_run
    return f"{len(learnt)} tokens, {example.answer_tokens} of them learnt, between >> and <<:\n{text}"


def _tokenize(text: str, answers: list[tuple[int, int]], tokenizer) -> tuple[list[int], np.ndarray, bool]:
    """Token ids, their (tokens, 2) character offsets, and whether no token holds both sides of an answer's start or
    stop. One does where a tokenizer writes a piece of text otherwise than within a text (a space before each); it is
    no part of the answer.
    """

    def piece(at: int, to: int, guard: str = ""):
        ids, places = _tokens(guard + text[at:to], tokenizer)
        return ids[bool(guard) :], places[bool(guard) :] + at - len(guard)

    ids, offsets = piece(0, len(text))
    cuts = []
    for start, stop in answers:
        if piece(0, start)[0] != ids[: np.searchsorted(offsets[:, 0], start)]:
            cuts.append(start)
        if ((offsets[:, 0] < stop) & (offsets[:, 1] > stop)).any():
            cuts.append(stop)
    if not cuts:
        return ids, offsets, True
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    for guard in ("", tokenizer.eos_token or ""):  # some write a space before a text, but not behind a special token
        pieces = [piece(at, to, guard * (at > 0)) for at, to in pairwise([0, *cuts, len(text)])]
        joined = [token for tokens, _ in pieces for token in tokens]
        if tokenizer.decode(joined, skip_special_tokens=False) == whole:
            return joined, np.concatenate([offsets for _, offsets in pieces]), True
    return ids, offsets, False


@functools.lru_cache(maxsize=16)  # a row's prompts are met twice: as its beginning, and as what `generate` will see
def _tokens(text: str, tokenizer) -> tuple[list[int], np.ndarray]:
    """Token ids, and (tokens, 2) character offsets."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return encoded["input_ids"], np.array(encoded["offset_mapping"], dtype=int).reshape(-1, 2)


def _is_special(token: int, tokenizer) -> bool:
    """Whether a token stands for no text. One for unknown words does, and the lone "▁" of sentencepiece."""
    unknown = token == tokenizer.unk_token_id != tokenizer.eos_token_id
    return not unknown and bool(tokenizer.decode([token])) and not tokenizer.decode([token], skip_special_tokens=True)
