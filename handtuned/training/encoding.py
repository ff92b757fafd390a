"""Chats → token ids, with labels on the answers alone.

A chat is written out with the model's own chat template. The loss looks only at what the
model has to write itself: every assistant turn, up to and with the token that ends it; labels
are -100 everywhere else. The mask follows from positions in the text, never from token ids:
where padding and end of turn share an id (SmolLM2 has 2 for both), masking "the padding"
would hide the end of every answer and the model would never learn to stop.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..nn.loss import IGNORE_INDEX
from .formats import Chat, DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks the answers itself
_STAND_IN = "\ufdd0"  # a code point that is reserved never to be a character

# For a tokenizer without a chat template. `bos` is empty where the tokenizer itself writes none.
PLAIN_TEMPLATE = (
    "{{ bos }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% else %}{{ '### Instruction:\n' + message.content + '\n\n### Response:\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Example:
    """One chat as two int32 arrays of equal length; the label at position t is predicted from the ids before it."""

    input_ids: np.ndarray
    labels: np.ndarray  # the id itself where it is learnt, else -100
    cut: int = 0  # tokens beyond max_seq_length that were left off at the end

    @property
    def answer_tokens(self) -> int:
        """How many tokens are learnt."""
        return int((self.labels != IGNORE_INDEX).sum())


def encode_prompt(chat: Chat, tokenizer) -> list[int]:
    """Token ids of a chat that ends with the user's turn, ready for the model to answer."""
    text = _render(chat, tokenizer, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer) -> int | None:
    """The special token that training teaches to end an answer with, which need not be the model's own end of text."""
    try:
        turn = encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], tokenizer)
    except DataError:
        return None
    last = int(turn.input_ids[turn.labels != IGNORE_INDEX][-1])
    return last if _is_special(last, tokenizer) else None


def encode(chat: Chat, tokenizer, max_seq_length: int | None = None) -> Example:
    """A chat as token ids and labels, the rest cut off beyond `max_seq_length` tokens.

    The ids are those of `tokenizer.apply_chat_template(chat)`; where the template ends the last
    answer with no special token, the end-of-sequence token follows.

    Raises:
        DataError: the template refuses the chat, or rewrites it so that an answer cannot be found in it.
    """
    ids, spans = _tokenize(chat, tokenizer)
    kept = np.array(ids[:max_seq_length], dtype=np.int32)
    labels = np.full_like(kept, IGNORE_INDEX)
    for start, stop in spans:
        labels[start:stop] = kept[start:stop]
    labels[:1] = IGNORE_INDEX  # nothing precedes the first token, so nothing can predict it
    return Example(kept, labels, cut=len(ids) - len(kept))


def describe_example(example: Example, tokenizer) -> str:
    """The text of an example as the model sees it, with what is learnt between >> and <<."""
    learnt = example.labels != IGNORE_INDEX
    text = ""
    for start, stop in _runs(learnt):
        text_of_run = tokenizer.decode(example.input_ids[start:stop].tolist(), skip_special_tokens=False)
        text += f">>{text_of_run}<<" if learnt[start] else text_of_run
    return f"{len(learnt)} tokens, {example.answer_tokens} of them learnt, between >> and <<:\n{text}"


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of equal flags."""
    edges = [0, *(np.flatnonzero(np.diff(np.asarray(flags, dtype=np.int8))) + 1).tolist(), len(flags)]
    return pairwise(edges)


def _tools_of(chat) -> list[dict] | None:
    return getattr(chat, "tools", None)


def _render(chat: Chat, tokenizer, **options) -> str:
    """The chat as text, by the tokenizer's template or the plain one."""
    from jinja2 import TemplateError

    if _tools_of(chat):
        options["tools"] = chat.tools
    if not tokenizer.chat_template:
        if not tokenizer.eos_token:
            raise DataError("the tokenizer has neither a chat template nor an end-of-sequence token")
        writes_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        options |= {"chat_template": PLAIN_TEMPLATE, "bos": tokenizer.bos_token if writes_bos else ""}
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except (TemplateError, ValueError) as error:
        raise DataError(f"the chat template refuses this chat: {error}") from None


def _tokenize(chat: Chat, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of the whole chat and, for each assistant turn, the (start, stop) of the tokens to learn."""
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    if tokenizer.chat_template and _GENERATION_MARK.search(tokenizer.get_chat_template()):
        marked = tokenizer.apply_chat_template(
            chat, tools=_tools_of(chat), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, inside = marked["input_ids"], marked["assistant_masks"]
        spans = [(start, stop) for start, stop in _runs(inside) if inside[start]]
    else:
        text = _render(chat, tokenizer)
        _check_tools_are_shown(chat, text, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"])
        spans = []
        for start, stop in _answers(chat, text, tokenizer):
            inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
            if inside.size:
                spans.append((int(inside[0]), int(inside[-1]) + 1))
    if not spans:
        raise DataError("the chat template leaves no answer to learn")
    ends = [_end_of_turn(ids, stop, tokenizer) for _, stop in spans]
    if ends[-1] is None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
        ends[-1] = len(ids)
    return ids, [(start, end or stop) for (start, stop), end in zip(spans, ends, strict=True)]


def _answers(chat: Chat, text: str, tokenizer) -> Iterator[tuple[int, int]]:
    """Where each assistant turn stands in the rendered chat: from the end of its prompt to its own last character."""
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = _render(chat[:turn], tokenizer, add_generation_prompt=True)
        if "tool_calls" in message:
            # The template writes them as it likes, so the turn ends where the chat up to it does.
            upto = _render(chat[: turn + 1], tokenizer).rstrip()
            stop, in_place = len(upto), text.startswith(upto) and upto.startswith(prompt)
            if in_place and not all(call["function"]["name"] in upto[len(prompt) :] for call in message["tool_calls"]):
                raise DataError(f"message {turn + 1}: the chat template does not show its tool calls")
        else:
            # The template decides where the answer ends: what it writes around a stand-in for it.
            stand_in = _with(chat, turn, {"role": "assistant", "content": _STAND_IN})
            before, found, after = _render(stand_in, tokenizer).partition(_STAND_IN)
            stop = len(text) - len(after)
            in_place = found and before.startswith(prompt) and text.endswith(after)
        if not (in_place and text.startswith(prompt) and stop > len(prompt)):
            raise DataError(f"message {turn + 1}: the chat template rewrites this chat, so its answer cannot be found")
        yield len(prompt), stop


def _with(chat: Chat, turn: int, message: dict) -> Chat:
    return Chat([*chat[:turn], message, *chat[turn + 1 :]], _tools_of(chat))


def _check_tools_are_shown(chat: Chat, text: str, tokenizer) -> None:
    """Many templates leave tools out in silence; then the model would learn to call what it never saw."""
    if _tools_of(chat) and _render(list(chat), tokenizer) == text:
        raise DataError("the chat template does not show the tools")
    for turn, message in enumerate(chat):
        if message["role"] == "tool":
            hidden = _with(chat, turn, {**message, "content": _STAND_IN})
            if _STAND_IN not in _render(hidden, tokenizer):
                raise DataError(f"message {turn + 1}: the chat template does not show the tool's result")


def _end_of_turn(ids: list[int], stop: int, tokenizer) -> int | None:
    """The position behind the special token that ends the turn: the answer's last, or the next but for white space."""
    for position in range(stop - 1, len(ids)):
        text = tokenizer.decode([ids[position]], skip_special_tokens=False)
        if text.strip() and _is_special(ids[position], tokenizer):
            return position + 1
        if position >= stop and text.strip():
            return None
    return None


def _is_special(token: int, tokenizer) -> bool:
    """Whether a token stands for no text. One for unknown words does, and may well be an answer's last."""
    if token == tokenizer.unk_token_id != tokenizer.eos_token_id:
        return False
    return not tokenizer.decode([token], skip_special_tokens=True)
