"""Chats → token ids, with labels on the answers alone.

A chat is written out with the model's own chat template. The loss looks only at what the model has to write itself:
every assistant turn, up to and with the token that ends it; labels are -100 everywhere else. The mask follows from
positions in the text, never from token ids: where padding and end of turn share an id (SmolLM2 has 2 for both),
masking "the padding" would hide the end of every answer and the model would never learn to stop.

Where an answer stands in the text is found by writing the chat again with marks in place of messages, so that
templates may trim answers, or show, rewrite and leave out thinking, as they like:

    chat             … <user> hi <end> <assistant> <think></think> hello <end> <user> …
    marks            … <user> ▸  <end> <assistant> <think></think> ▪     <end> <user> …
    prompt, marked   … <user> ▸  <end> <assistant>

The answer begins where the marked chat and the marked prompt part, and ends with what the template writes behind ▪ in
the whole chat and in the chat up to this turn alike.
"""

import contextlib
import datetime
import functools
import json
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..nn.loss import IGNORE_INDEX
from .files import DataError
from .formats import Chat

SHOWN, ANSWER, CALL = "\ufdd0", "\ufdd1", "\ufdd2"  # ▸, ▪, and a call's name: reserved never to be characters
TODAY = datetime.date(2024, 7, 26)  # for templates that write the date: runs must not depend on the clock
NOW = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")

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
    text, answers = _prompt(chat, tokenizer)[0], []
    with contextlib.suppress(DataError):
        answered = _render(chat, tokenizer)
        turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
        answers = [_answer(chat, turn, answered, tokenizer)[:2] for turn in turns]
    return _tokenize(text, answers, tokenizer)[0]


def decode_answer(ids: list[int], chat: Chat, tokenizer) -> str:
    """What a model has answered to a chat, without special tokens and the white space that the template adds."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    tokens = filter(None, tokenizer.convert_ids_to_tokens(ids))  # an embedding may have more rows than there are tokens
    first = next((token for token in tokens if token not in tokenizer.all_special_tokens), "")
    if first.startswith("▁") and not text.startswith(" "):  # sentencepiece shows no space before a whole text
        text = f" {text}"
    _, before, behind = _prompt(chat, tokenizer)
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
        learnt, follows, text = np.ones(len(ids) + 1, dtype=bool), True, chat[0]["content"]
    else:
        text = _render(chat, tokenizer)
        turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
        found = turns[-1 if train_on == "last" else 0 :]
        _check_all_is_shown(chat, found, text, tokenizer)
        answers = {turn: _answer(chat, turn, text, tokenizer) for turn in found}
        ids, offsets, apart = _tokenize(text, [answer[:2] for answer in answers.values()], tokenizer)
        learnt = np.full(len(ids) + 1, train_on == "all")
        learnt[-1] = False
        for turn, (start, stop, end, _) in answers.items():
            first, last = np.searchsorted(offsets[:, 0], [start, stop])
            ends = [at + 1 for at in range(last, len(ids)) if offsets[at, 1] <= end and _is_special(ids[at], tokenizer)]
            if not ends and "tool_calls" in chat[turn]:  # what the template writes behind a call's name
                last = np.searchsorted(offsets[:, 0], len(text[:end].rstrip()))
            if not ends and turn == turns[-1]:
                last = len(ids) + 1  # with an end of sequence
            elif "tool_calls" not in chat[turn]:  # without what the template opens behind it
                ends = [at for number, at in enumerate(ends) if at == ends[0] + number]
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


def _render(chat: Chat, tokenizer, **options) -> str:
    """The chat as text, by the tokenizer's template or the plain one.

    Arguments of tool calls are given as an object, or as JSON text to a template that joins them to other text.
    """
    if getattr(chat, "tools", None):
        options["tools"] = chat.tools
    if not tokenizer.chat_template:
        if not tokenizer.eos_token:
            raise DataError("the tokenizer has neither a chat template nor an end-of-sequence token")
        writes_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        options |= {"chat_template": PLAIN_TEMPLATE, "bos": tokenizer.bos_token if writes_bos else ""}
    else:
        template = tokenizer.get_chat_template(tools=options.get("tools"))
        options["chat_template"] = NOW.sub(lambda call: repr(TODAY.strftime(call[2])), template)

    def write(messages: list[dict]) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # whatever a template raises, of jinja2's or Python's own
            raise DataError(f"the chat template refuses this chat: {' '.join(str(error).split())}") from None

    arguments = [call["function"]["arguments"] for message in chat for call in message.get("tool_calls", ())]
    try:
        text = write(list(chat))
    except DataError:
        if not arguments:
            raise
    else:
        if not any(value and str(value) in text for value in arguments):  # an object as Python writes it
            return text

    def with_text(call: dict) -> dict:
        return _call(call, arguments=json.dumps(call["function"]["arguments"], ensure_ascii=False))

    return write([message | {"tool_calls": [with_text(call) for call in message["tool_calls"]]}
                  if "tool_calls" in message else message for message in chat])  # fmt: skip


def _call(call: dict, **changed) -> dict:
    """A tool call of another name or other arguments."""
    return call | {"function": call["function"] | changed}


def _changed(chat: Chat, turn: int, **fields) -> Chat:
    """The chat with other fields in one message."""
    return Chat([*chat[:turn], chat[turn] | fields, *chat[turn + 1 :]], getattr(chat, "tools", None))


def _marked(chat: Chat, turn: int, mark: str) -> Chat:
    """The chat with a mark in place of what a message says, and CALL for the names of its calls."""
    fields = {"content": mark if chat[turn]["content"] or mark == SHOWN else ""}
    if "tool_calls" in chat[turn]:
        fields["tool_calls"] = [_call(call, name=CALL) for call in chat[turn]["tool_calls"]]
    return _changed(chat, turn, **fields)


def _behind(marks: str, text: str, what: str) -> str:
    """What follows the last mark in a text."""
    found = re.split(f"[{marks}]", text)
    if len(found) == 1:
        raise DataError(what)
    return found[-1]


def _prompt_end(chat: Chat, tokenizer) -> str:
    """What the template writes behind the last message when the model is to answer."""
    text = _render(_marked(chat, len(chat) - 1, SHOWN), tokenizer, add_generation_prompt=True)
    return _behind(SHOWN, text, _hidden(chat, len(chat) - 1))


def _shared(marked: Chat, prompt_end: str, tokenizer) -> tuple[int, int]:
    """Of `marked`, in which ▸ precedes an answer: (from ▸ to where the answer begins, from ▸ to its first mark)."""
    between = _render(marked, tokenizer).partition(SHOWN)[2]
    first = re.search(f"[{ANSWER}{CALL}]", between)
    return _common(between, prompt_end), first.start() if first else len(between)


def _prompt(chat: Chat, tokenizer) -> tuple[str, str, str]:
    """The text of the prompt that is to be answered, as far as an answer without thinking shares it, and the white
    space that the template itself writes before and behind an answer."""
    text = _render(chat, tokenizer, add_generation_prompt=True)
    try:
        end = _prompt_end(chat, tokenizer)
        answered = Chat([*chat, {"role": "assistant", "content": ANSWER}], getattr(chat, "tools", None))
        marked = _render(_marked(answered, len(chat) - 1, SHOWN), tokenizer)
    except DataError:
        return text, "", ""
    before, _, behind = marked.rpartition(SHOWN)[2].partition(ANSWER)
    shared = _common(before, end)
    before = before[shared:] if before[shared:].isspace() else ""
    return text[: len(text) - len(end) + shared], before, behind[: len(behind) - len(behind.lstrip())]


def _answer(chat: Chat, turn: int, text: str, tokenizer) -> tuple[int, int, int, str]:
    """Where an assistant turn stands in the text: its start, its stop, how far its closing reaches; and its prompt, if
    it is the last."""
    lost = f"message {turn + 1}: the chat template rewrites this chat, so its answer cannot be found"
    if turn < len(chat) - 1:
        lost += "; --train-on last learns the last answer alone"
    marked = _marked(chat, turn, ANSWER)
    whole, calls = _render(marked, tokenizer), len(chat[turn].get("tool_calls", ()))
    behind = _behind(ANSWER + CALL, whole, lost)
    if calls and chat[turn]["content"] and ANSWER not in whole:
        raise DataError(f"{_hidden(chat, turn)} beside its tool calls: leave it out")
    last = turn == len(chat) - 1
    alone = behind if last else _behind(ANSWER + CALL, _render(marked[: turn + 1], tokenizer), lost)
    opening = _prompt_end(chat[:turn], tokenizer)
    shared, first = _shared(_marked(marked, turn - 1, SHOWN), opening, tokenizer)
    start = re.search(f"[{ANSWER}{CALL}]", whole).start() - first + shared
    stop = len(text) - len(behind)
    end = stop + _common(behind, alone)
    if not (0 < start < max(stop, end) and text.startswith(whole[:start]) and text.endswith(behind)):
        raise DataError(lost)
    prompt = _render(chat[:turn], tokenizer, add_generation_prompt=True) if last else ""
    return start, stop, end, prompt[: len(prompt) - len(opening) + shared]


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _check_all_is_shown(chat: Chat, found: list[int], text: str, tokenizer) -> None:
    """Many templates leave something out in silence. `_answer` sees it of the turns in `found` and their prompts."""
    if getattr(chat, "tools", None) and _render(Chat(chat), tokenizer) == text:
        raise DataError("the chat template does not show the tools")
    for turn, message in enumerate(chat):
        calls = message.get("tool_calls", ())
        if calls and _render(_marked(chat, turn, ANSWER), tokenizer).count(CALL) < len(calls):
            raise DataError(f"message {turn + 1}: the chat template does not show its tool calls")
        for at, call in enumerate(calls):
            if call["function"]["arguments"] and _without_arguments(chat, turn, at, tokenizer) == text:
                raise DataError(f"message {turn + 1}: the chat template does not show the arguments of its tool calls")
        if message["content"] and message["role"] != "assistant" and turn + 1 not in found:
            _behind(SHOWN, _render(_marked(chat, turn, SHOWN), tokenizer), _hidden(chat, turn))


def _without_arguments(chat: Chat, turn: int, at: int, tokenizer) -> str:
    calls = [_call(c, arguments={}) if i == at else c for i, c in enumerate(chat[turn]["tool_calls"])]
    with contextlib.suppress(DataError):
        return _render(_changed(chat, turn, tool_calls=calls), tokenizer)
    return ""  # a template that asks for them shows them


def _hidden(chat: Chat, turn: int) -> str:
    what = "the tool's result" if chat[turn]["role"] == "tool" else "it"
    return f"message {turn + 1}: the chat template does not show {what}"


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
