"""Chats → token ids with labels on the answers alone → batches.

A chat is written out with the model's own chat template. The loss looks only at what the
model has to say itself: every assistant turn, up to and with the token that ends it; labels
are -100 everywhere else. The mask follows from positions in the text, never from token ids:
where padding and end of turn share an id (SmolLM2 has 2 for both), masking "the padding"
would hide the end of every answer and the model would never learn to stop.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from .batches import IGNORE_INDEX, Example, batch_indices, collate
from .rows import Chat, DataError, LoadedRows, load_rows, said

__all__ = [
    "IGNORE_INDEX",
    "Chat",
    "DataError",
    "EncodedRows",
    "Example",
    "LoadedRows",
    "batch_indices",
    "check_max_seq_length",
    "collate",
    "describe_example",
    "encode",
    "encode_prompt",
    "encode_rows",
    "end_of_turn",
    "load_rows",
    "said",
    "shared_system_prompt",
    "shipped_dataset",
    "split",
]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks the answers itself
_STAND_IN = "\ufdd0"  # a code point that is no character and never will be one

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
class EncodedRows:
    """Examples that all have something to learn, and how many rows were truncated or dropped on the way.

    `rows` are the chats that the examples come from; `refused` says of each skipped row where it stood, and why.
    """

    examples: list[Example]
    truncated: int
    dropped: int
    max_seq_length: int
    rows: Sequence[Chat] = ()
    refused: Sequence[str] = ()

    def notes(self) -> list[str]:
        """What the user must be told, a line each; empty when every row fits."""
        notes = []
        if self.truncated:
            notes.append(f"rows truncated to max_seq_length {self.max_seq_length} tokens: {self.truncated}")
        if self.dropped:
            notes.append(f"rows dropped, too long for max_seq_length {self.max_seq_length} tokens: {self.dropped}")
        if self.refused:
            notes.append(f"bad rows skipped: {len(self.refused)}, the first: {'; '.join(self.refused[:3])}")
        return notes


def shipped_dataset() -> tuple[Path, Path]:
    """Training and held-out file of the data set that comes with the package (see `make_dataset.py`)."""
    directory = Path(__file__).parent / "datasets"
    return directory / "home_train.jsonl", directory / "home_eval.jsonl"


def shared_system_prompt(rows: Sequence[Chat]) -> str | None:
    """The system message of every chat, if all have the same: prompts after training need it too."""
    first = {row[0]["content"] if row[0]["role"] == "system" else None for row in rows}
    return first.pop() if len(first) == 1 else None


def split(rows: Sequence[Chat], eval_fraction: float, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Training rows and held-out rows, each in the order of the file; the same seed gives the same split.

    A fraction above 0 holds out at least one row and leaves at least one; 0 holds out none.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction must be at least 0 and below 1, got {eval_fraction}")
    if eval_fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(f"holding out rows needs at least 2 rows, got {len(rows)}; --eval-fraction 0 holds out none")
    count = min(max(1, round(len(rows) * eval_fraction)), len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def check_max_seq_length(max_seq_length: int, context_length: int | None) -> None:
    """Raise ValueError unless rows of this many tokens fit the model's context (None: unlimited)."""
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length must be at least 2, got {max_seq_length}")
    if context_length is not None and max_seq_length > context_length:
        raise ValueError(f"max_seq_length must be within the model's context of {context_length}, got {max_seq_length}")


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


def encode_rows(
    rows: Sequence[Chat], tokenizer, max_seq_length: int, on_long: str = "truncate", skip_bad_rows: bool = False
) -> EncodedRows:
    """Encode chats; a row of more than `max_seq_length` tokens is truncated at its end, or dropped.

    Args:
        on_long: "truncate" or "drop". A row with no answer token left after truncation is dropped too.
        skip_bad_rows: leave out and list what `encode` refuses, instead of raising at the first.

    Raises:
        DataError: a row that `encode` refuses, named by its place in the file, or nothing left to learn from.
    """
    if on_long not in ("truncate", "drop"):
        raise ValueError(f"on_long must be 'truncate' or 'drop', got {on_long!r}")
    examples, kept, refused, truncated, dropped = [], [], [], 0, 0
    for number, row in enumerate(rows, start=1):
        try:
            example = encode(row, tokenizer, max_seq_length)
        except DataError as error:
            reason = f"{getattr(row, 'where', None) or f'row {number}'}: {error}"
            if not skip_bad_rows:
                raise DataError(reason) from None
            refused.append(reason)
            continue
        if example.answer_tokens == 0 or (example.cut and on_long == "drop"):
            dropped += 1
            continue
        examples.append(example)
        kept.append(row)
        truncated += example.cut > 0
    if not examples and refused:
        raise DataError(f"nothing to learn: no usable row among {len(rows)}; {refused[0]}")
    if not examples:
        raise DataError(
            f"nothing to learn: each of the {len(rows)} rows is too long for max_seq_length {max_seq_length} tokens"
            if rows
            else "nothing to learn: no rows"
        )
    return EncodedRows(examples, truncated, dropped, max_seq_length, kept, refused)


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
            # The template tells where the answer ends: what it writes around a stand-in for it.
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
    """Many templates leave tools out in silence; then the model would learn to call what it was never told of."""
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
    """Whether a token is no text; one for unknown words is, and may well be an answer's last."""
    if token == tokenizer.unk_token_id != tokenizer.eos_token_id:
        return False
    return not tokenizer.decode([token], skip_special_tokens=True)
