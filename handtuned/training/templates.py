"""Chats → text, by the model's own chat template, and where in it each answer stands.

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
from collections.abc import Callable

from .files import DataError
from .formats import Chat

SHOWN, ANSWER, CALL = "\ufdd0", "\ufdd1", "\ufdd2"  # ▸, ▪, and behind a call's name: no characters
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


def render(chat: Chat, tokenizer, **options) -> str:
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

    parts = bool(tokenizer.chat_template) and _in_parts(options["chat_template"], tokenizer)

    def write(given: Callable) -> str:
        calls = [[_call(call, arguments=given(call["function"]["arguments"])) for call in message.get("tool_calls", ())]
                 for message in chat]  # fmt: skip
        messages = [message | {"tool_calls": made} if made else message
                    for message, made in zip(chat, calls, strict=True)]  # fmt: skip
        if parts:
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # whatever a template raises, of jinja2's or Python's own
            raise DataError(f"the chat template refuses this chat: {' '.join(str(error).split())}") from None

    arguments = [call["function"]["arguments"] for message in chat for call in message.get("tool_calls", ())]
    try:
        text = write(lambda given: given)
        # An object as Python writes it? What stands there may be said elsewhere in the chat, but for a mark.
        suspect = any(value and str(value) in text for value in arguments)
        if not suspect or repr(CALL) not in write(lambda given: given | {CALL: 0}):
            return text
    except DataError:
        if not arguments:
            raise
    return write(functools.partial(json.dumps, ensure_ascii=False))


@functools.lru_cache(maxsize=16)
def _in_parts(template: str, tokenizer) -> bool:
    """Whether a template shows a text only where it is a part beside pictures."""

    def shows(content: str | list) -> bool:
        with contextlib.suppress(Exception):  # whatever it raises, `render` will see it
            chat = [{"role": "user", "content": content}]
            return SHOWN in tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
        return False

    return not shows(SHOWN) and shows([{"type": "text", "text": SHOWN}])


def _call(call: dict, **changed) -> dict:
    """A tool call of another name or other arguments."""
    return call | {"function": call["function"] | changed}


def _changed(chat: Chat, turn: int, **fields) -> Chat:
    """The chat with other fields in one message."""
    return Chat([*chat[:turn], chat[turn] | fields, *chat[turn + 1 :]], getattr(chat, "tools", None))


def _marked(chat: Chat, turn: int, mark: str) -> Chat:
    """The chat with a mark in place of what a message says, and CALL behind the names of its calls."""
    fields = {"content": mark if chat[turn]["content"] or mark == SHOWN else ""}
    if "tool_calls" in chat[turn]:
        fields["tool_calls"] = [_call(call, name=call["function"]["name"] + CALL) for call in chat[turn]["tool_calls"]]
    return _changed(chat, turn, **fields)


def _behind(marks: str, text: str, what: str, count: int = 0) -> str:
    """What follows the last mark in a text, or its mark number `count`; a result may name its call once more."""
    found = re.split(f"[{marks}]", text, maxsplit=count)
    if len(found) <= max(count, 1):
        raise DataError(what)
    return found[-1].replace(CALL, "")


def _prompt_end(chat: Chat, tokenizer) -> str:
    """What the template writes behind the last message when the model is to answer."""
    text = render(_marked(chat, len(chat) - 1, SHOWN), tokenizer, add_generation_prompt=True)
    return _behind(SHOWN, text, _hidden(chat, len(chat) - 1))


def _shared(text: str, asked: Chat, opening: str, tokenizer) -> tuple[str, int, int]:
    """Of a text with ▸ for the last message of `asked` and with marks for its answer: what stands between them, how
    much of that no answer has to write, and how much of `opening`, the end of the prompt, that is."""
    head = re.split(f"[{ANSWER}{CALL}]", text, maxsplit=1)[0]
    between = head.rpartition(SHOWN)[2] if SHOWN in head else ""
    shared, closing = _common(between, opening, tokenizer), opening
    if shared < len(opening):
        with contextlib.suppress(DataError):
            closing = render(_marked(asked, len(asked) - 1, SHOWN), tokenizer).rpartition(SHOWN)[2]
    header = opening.removeprefix(closing)
    if shared < len(closing) and header not in ("", opening) and (at := between.find(header)) >= 0:
        return between, at + len(header), len(opening)  # the last message of a prompt is closed otherwise
    return between, shared, shared


def prompt_of(chat: Chat, tokenizer) -> tuple[str, str, str]:
    """The text of the prompt that is to be answered, as far as an answer without thinking shares it; what the template
    itself writes before an answer, and the white space behind it."""
    text = render(chat, tokenizer, add_generation_prompt=True)
    try:
        opening = _prompt_end(chat, tokenizer)
        answered = Chat([*chat, {"role": "assistant", "content": ANSWER}], getattr(chat, "tools", None))
        marked = render(_marked(answered, len(chat) - 1, SHOWN), tokenizer)
    except DataError:
        return text, "", ""
    between, shared, asked_for = _shared(marked, chat, opening, tokenizer)
    prompt, behind = text[: len(text) - len(opening) + asked_for], marked.partition(ANSWER)[2]
    return prompt, between[shared:], behind[: len(behind) - len(behind.lstrip())]


def find_answer(chat: Chat, turn: int, text: str, tokenizer) -> tuple[int, int, int, str]:
    """Where an assistant turn stands in the text: its start, its stop, how far its closing reaches; and its prompt, if
    it is the last."""
    lost = f"message {turn + 1}: the chat template rewrites this chat, so its answer cannot be found"
    if turn < len(chat) - 1:
        lost += "; --train-on last learns the last answer alone"
    marked = _marked(chat, turn, ANSWER)
    whole, calls = render(marked, tokenizer), len(chat[turn].get("tool_calls", ()))
    if calls and chat[turn]["content"] and ANSWER not in whole:
        raise DataError(f"{_hidden(chat, turn)} beside its tool calls: leave it out")
    last = turn == len(chat) - 1
    written = whole if last else render(marked[: turn + 1], tokenizer)
    count = len(re.findall(f"[{ANSWER}{CALL}]", written))
    behind, alone = (_behind(ANSWER + CALL, part, lost, count) for part in (whole, written))
    opening = _prompt_end(chat[:turn], tokenizer)
    answered = render(_marked(marked, turn - 1, SHOWN), tokenizer)
    between, shared, asked_for = _shared(answered, chat[:turn], opening, tokenizer)
    if chat[turn].keys() & {"reasoning_content", "tool_calls"}:  # the prompt cannot know of them
        plain = Chat([*chat[:turn], {"role": "assistant", "content": ANSWER}], getattr(chat, "tools", None))
        with contextlib.suppress(DataError):
            plain = render(_marked(plain, turn - 1, SHOWN), tokenizer)
            _, plainly, asked_for = _shared(plain, chat[:turn], opening, tokenizer)
            shared = min(shared, plainly)
    head = re.search(f"[{ANSWER}{CALL}]", whole).start()
    start = head - len(between) + shared
    if not text.startswith(whole[:start]):  # the answer's own text says what the template writes before it
        start = max(_common(text, whole[:start], tokenizer), head - len(between))
    stop = len(text) - len(behind)
    if len(_whole(tokenizer).findall(alone)) > 1:
        alone = alone.removesuffix(_written_on(chat[:turn], opening, tokenizer))
    end = stop + _common(behind, alone, tokenizer)
    if not (0 < start < max(stop, end) and text.startswith(whole[:start]) and text.endswith(behind)):
        raise DataError(lost)
    prompt = render(chat[:turn], tokenizer, add_generation_prompt=True) if last else ""
    return start, stop, end, prompt[: len(prompt) - len(opening) + asked_for]


def _written_on(asked: Chat, opening: str, tokenizer) -> str:
    """What a template writes behind every chat beyond the end of its last message: the beginning of the next answer, a
    reminder."""
    closing = render(_marked(asked, len(asked) - 1, SHOWN), tokenizer).rpartition(SHOWN)[2]
    _, end, more = closing.partition(tokenizer.eos_token or SHOWN)
    if end:
        return more if more.strip() else ""
    first = _whole(tokenizer).match(closing)
    return "" if closing != opening else closing[first.end() :] if first else closing


def _common(one: str, other: str, tokenizer) -> int:
    """How many characters two texts begin with alike, a tag or a token of the tokenizer's own being one: `<think>` and
    `<tool_call>` have nothing in common."""
    pairs = enumerate(zip(one, other, strict=False))
    common = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    before = max(0, common - 64)
    places = ((before + found.start(), before + found.end()) for text in (one, other)
              for found in _whole(tokenizer).finditer(text[before : before + 128]))  # fmt: skip
    parted = (start for start, end in places if start < common < end)
    return min(parted, default=common)


@functools.lru_cache(maxsize=16)
def _whole(tokenizer) -> re.Pattern:
    """Finds what no prompt may end within."""
    tag = r"</?[^<>\s]{1,60}>"
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    others = sorted((token for token in added if token.strip() and not re.fullmatch(tag, token)), key=len)
    return re.compile("|".join([tag, *map(re.escape, reversed(others))]))


def check_all_is_shown(chat: Chat, found: list[int], text: str, tokenizer) -> None:
    """Many templates hide something in silence. `find_answer` sees it of the turns in `found` and of their prompts."""
    if getattr(chat, "tools", None) and _tried(Chat(chat), tokenizer) == text:
        raise DataError("the chat template does not show the tools")
    for turn, message in enumerate(chat):
        calls = message.get("tool_calls", ())
        marked = _marked(chat, turn, ANSWER)  # without what follows, too: a result may name its call once more
        if calls and any(render(part, tokenizer).count(CALL) < len(calls) for part in (marked, marked[: turn + 1])):
            raise DataError(f"message {turn + 1}: the chat template does not show its tool calls")
        for at, call in enumerate(calls):
            if call["function"]["arguments"] and _without_arguments(chat, turn, at, tokenizer) == text:
                raise DataError(f"message {turn + 1}: the chat template does not show the arguments of its tool calls")
        if message["content"] and message["role"] != "assistant" and turn + 1 not in found:
            _behind(SHOWN, render(_marked(chat, turn, SHOWN), tokenizer), _hidden(chat, turn))


def _without_arguments(chat: Chat, turn: int, at: int, tokenizer) -> str:
    calls = [_call(c, arguments={}) if i == at else c for i, c in enumerate(chat[turn]["tool_calls"])]
    return _tried(_changed(chat, turn, tool_calls=calls), tokenizer)


def _tried(chat: Chat, tokenizer) -> str:
    """The chat without something, as text; empty where the template asks for it, and so shows it."""
    with contextlib.suppress(DataError):
        return render(chat, tokenizer)
    return ""


def _hidden(chat: Chat, turn: int) -> str:
    what = "the tool's result" if chat[turn]["role"] == "tool" else "it"
    remedy = "; put it at the beginning of the user's message" if chat[turn]["role"] == "system" else ""
    return f"message {turn + 1}: the chat template does not show {what}{remedy}"
