"""Rows of training files → chats.

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "…"}, …], "tools": […]}
    {"conversations": [{"from": "human" | "gpt" | …, "value": "…"}, …]}                     ShareGPT
    {"instruction": "…", "input": "… or empty", "output": "…", "system": "…", "history": […]}   Alpaca
    {"prompt": "…" or messages, "completion": "…" or messages}
    {"text": "…"}                                                               to be learnt whole

All become a chat: an optional system message, then user and assistant in turn, the last word the assistant's.
`tools` and an assistant's `tool_calls` have the form of OpenAI's and transformers' chat templates; results (role
"tool") follow the calls. Nothing is dropped in silence: a bad row is an error that names file, line and reason, and
skipped rows and unread columns are listed for the caller to announce.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .files import DataError, decode_json, read_places

ROLES = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bot model bing bard function_call",
    "tool": "tool function function_response observation ipython",
}
ROLE = {name: role for role, names in ROLES.items() for name in names.split()}
# Of a message; those of a call and its result in a chat with tools.
FIELDS = {"role", "content", "from", "value", "weight", "reasoning_content"}
TOOL_FIELDS = {"tool_calls", "function_call", "tool_call_id", "name"}
# Results behind an assistant's turn without calls, too: one may stand in its text, as in Hermes' and ToolACE's sets.
FOLLOWING = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("tool", "user"),
             "tool": ("tool", "assistant")}  # fmt: skip
FORMS = ("messages", "conversations", "instruction", "prompt", "text")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Half of a pair, NUL, and what Unicode reserves never to be a character (templates.py marks places with some of them).
NO_CHARACTER = re.compile("[\ud800-\udfff\0\ufdd0-\ufdef]")
EXPECTED = ("expected messages, conversations, instruction (input) and output, prompt and completion, or text; "
            "--columns prompt=NAME,completion=NAME names others")  # fmt: skip


class Chat(list):
    """Messages ({"role", "content", …}) and, if it has any, the tools that the model may call; slices keep them.

    `where` is the place that it was read from, "FILE:LINE".
    """

    def __init__(self, messages=(), tools: list[dict] | None = None, where: str | None = None):
        super().__init__(messages)
        self.tools, self.where = tools, where

    def __getitem__(self, index):
        part = super().__getitem__(index)
        return Chat(part, self.tools) if isinstance(index, slice) else part


def as_text(message: dict) -> str:
    """What a message says, its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


@dataclass(frozen=True)
class LoadedRows:
    """Chats, and what the user must hear of: skipped rows and columns that were not read, a line each."""

    rows: list[Chat]
    notes: list[str]


def load_rows(
    path: str | Path, skip_bad_rows: bool = False, columns: Mapping[str, str] | None = None, train_on: str = "answers"
) -> LoadedRows:
    """Read rows as chats.

    Args:
        path: what `files.read_places` reads.
        skip_bad_rows: leave bad rows out and list them, instead of raising at the first.
        columns: column of a form above → name that it has in the file.
        train_on: "all" lets `text` be learnt, too.

    Raises:
        DataError: "FILE:LINE: reason" for a bad row; a file that cannot be read or holds no usable row.
    """
    rows, skipped, ignored, unlearnt = [], [], set(), 0
    for where, row in read_places(path):
        try:
            if isinstance(row, DataError):
                raise row
            chat, unread = _as_chat(row, columns or {}, train_on)
        except (DataError, RecursionError) as error:
            skipped.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
            if not skip_bad_rows:
                raise DataError(skipped[0]) from None
            continue
        ignored |= unread
        answers = [message for message in chat if message["role"] in ("assistant", "text")]
        if all(answer.get("weight") == 0 for answer in answers[-1 if train_on == "last" else 0 :]):
            unlearnt += 1
            continue
        chat.where = where
        rows.append(chat)
    if not rows:
        reason = f"no usable row among {len(skipped)}; {skipped[0]}" if skipped else "holds no rows"
        raise DataError(f"{path}: {reason}")
    first = f"{len(skipped)} of {len(skipped) + len(rows)}, the first: {'; '.join(skipped[:3])}" if skipped else ""
    told = {"bad rows skipped": first, "ignored columns": ", ".join(name or "(no name)" for name in sorted(ignored)),
            "rows left out, as their label is false or their answers have weight 0": unlearnt}  # fmt: skip
    return LoadedRows(rows, [f"{what}: {found}" for what, found in told.items() if found])


def _as_chat(row: object, columns: Mapping[str, str], train_on: str) -> tuple[Chat, set[str]]:
    """A row as a chat, and the columns that were not read."""
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    for column, name in columns.items():
        if name not in row:
            raise DataError(f"field {name!r} is missing, which --columns takes for {column}")
    hidden = (row.keys() & columns.keys()) - set(columns.values())  # a column of the name that another one takes
    row = {name: None if value != value else value for name, value in row.items()}  # pandas writes NaN for none
    others = {name: value for name, value in row.items() if name not in {*columns, *columns.values()}}
    row = others | {column: row[name] for column, name in columns.items()}
    for name in MEDIA:
        if row.get(name):
            raise DataError(f"field {name!r} is not empty; only text can be learnt")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise DataError("a preference row (chosen, rejected); what is learnt here are answers, not preferences")
    form = next((name for name in FORMS if row.get(name) is not None), None)
    if form == "text":
        if train_on != "all":
            raise DataError("a text in which no answer is marked can be learnt with --train-on all only")
        return Chat([{"role": "text", "content": _text(row, "text")}]), set(row) - {"text"}
    turns, read = [], {form, "system", "tools"}
    if _said(row, "system"):
        turns.append({"role": "system", "content": _text(row, "system")})
    if form in ("messages", "conversations"):
        turns += _turns(row, form)
    elif form == "instruction":
        read |= {"input", "output", "history"}
        history = _parsed(row.get("history") or [], "field 'history' is") or []
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise DataError("field 'history' must be a list of [request, answer] pairs")
        turns += [{"role": role, "content": text} for pair in history
                  for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        asked = [_text(row, name) for name in ("instruction", "input") if _said(row, name)]
        request = "\n\n".join(asked or [_text(row, "instruction")])
        turns += [{"role": "user", "content": request}, {"role": "assistant", "content": _text(row, "output")}]
    elif form == "prompt":
        read |= {"completion"} | ({"label"} if str(row.get("label")).lower() in ("true", "false") else set())
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            many = isinstance(row.get(name), list)
            turns += _turns(row, name) if many else [{"role": role, "content": _text(row, name)}]
    else:
        empty = next((name for name in FORMS if name in row), None)
        unknown = f"unknown columns: {', '.join(map(str, row)) or 'none'}; {EXPECTED}"
        raise DataError(f"field {empty!r} is empty" if empty else unknown)
    chat = Chat(_messages(turns), _tools(row.get("tools")))
    if form == "prompt" and str(row.get("label")).lower() == "false":
        chat = Chat([message | {"weight": 0} for message in chat])
    with_tools = chat.tools or any(message["role"] == "tool" or "tool_calls" in message for message in chat)
    if with_tools:
        whole = json.dumps([chat, chat.tools], ensure_ascii=False, default=str)
        _check_characters(whole, "the JSON of messages and tools holds")
    known = FIELDS | (TOOL_FIELDS if with_tools else set())
    fields = {f"{form}.{key}" for turn in turns for key, value in turn.items() if value and key not in known}
    return chat, ((set(row) | fields) - read) | hidden


def _turns(row: dict, name: str) -> list[dict]:
    """A list of messages; some data sets hold it as JSON text."""
    turns = row[name]
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _parsed(turns, f"field {name!r} is")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"field {name!r} must be a list with at least one message")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise DataError(f"message {number}: must be a JSON object, got {type(turn).__name__}")
    return turns


def _said(fields: dict, name: str) -> bool:
    """Whether a field holds more than white space."""
    return fields.get(name) not in (None, []) and bool(str(fields[name]).strip())


def _text(fields: dict, name: str) -> str:
    """A field that must be text with something in it."""
    if name not in fields:
        raise DataError(f"field {name!r} is missing")
    value = fields[name]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):  # as OpenAI writes it
        for part in value:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"field {name!r} holds a part of type {part.get('type')!r}; only text can be learnt")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise DataError(f"field {name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"field {name!r} is empty")
    _check_characters(value, f"field {name!r} holds")
    return value


def _check_characters(text: str, what: str) -> None:
    if bad := NO_CHARACTER.search(text):
        kind = "half of a surrogate pair" if "\ud800" <= bad[0] <= "\udfff" else f"the code point {ord(bad[0]):#x}"
        raise DataError(f"{what} {kind}, which is not a character, at {bad.start() + 1}")


def _parsed(value: object, what: str) -> object:
    """What some data sets hold as JSON text."""
    try:
        value = decode_json(value) if isinstance(value, str) else value
        json.dumps(value, allow_nan=False)  # not so NaN, and dates of a Parquet file
        return value
    except DataError as error:
        raise DataError(f"{what} ambiguous: {error}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} not valid JSON: {error}") from None


def _tools(tools: object) -> list[dict] | None:
    """A list of function schemas, wrapped as OpenAI and servers write them, or None for none."""
    tools = _parsed(tools or None, "field 'tools' is")
    if tools and not (isinstance(tools, list) and all(map(_function, tools))):
        raise DataError("field 'tools' must be a list of function schemas, each with a name")
    return [tool if "function" in tool else
            {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
            for tool in tools or ()] or None  # fmt: skip


def _function(entry: object) -> dict | None:
    """What a schema or a call says of its function; None without a name."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _messages(messages: list[dict]) -> list[dict]:
    """Check that a chat is an optional system message, then user and assistant in turn, tools between them."""
    chat = []
    for number, message in enumerate(messages, start=1):
        try:
            chat.append(_message(message, FOLLOWING[chat[-1]["role"] if chat else None]))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    if chat[-1]["role"] != "assistant":
        raise DataError(f"the last message must be the assistant's answer, got role {chat[-1]['role']!r}")
    return chat


def _message(message: dict, expected: tuple[str, ...]) -> dict:
    """One message of a chat, of a role that is `expected` there."""
    name = message.get("role") or message.get("from")
    role = ROLE.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"unknown role {name!r}, expected system, user, assistant or tool")
    if role not in expected:
        raise DataError(f"role {role!r} out of order, expected {' or '.join(expected)}")
    if _said(message, "content") and _said(message, "value") and message["content"] != message["value"]:
        raise DataError("fields 'content' and 'value' both say something; one of them can be the message")
    field = "value" if not _said(message, "content") and message.get("value") is not None else "content"
    if name == "function_call":  # of ShareGPT: the call, or a list of them
        called = _parsed(message.get(field), f"field {field!r} of a function_call is")
        message = message | {"tool_calls": called if isinstance(called, list) else [called]}
    calls = _tool_calls(message, role)
    # Empty on purpose: a system message that switches off a template's own, a call without text, a result of nothing.
    may_be_empty = calls or (role in ("system", "tool") and isinstance(message.get(field), str))
    empty = name == "function_call" or (may_be_empty and not _said(message, field))
    content = "" if empty else _text(message, field)
    kept = {"tool_calls": calls} if calls else {}
    if _said(message, "reasoning_content") and role == "assistant":
        kept["reasoning_content"] = _text(message, "reasoning_content")
    if message.get("weight") is not None:
        if message["weight"] not in (0, 1):
            raise DataError(f"field 'weight' must be 0 or 1, got {message['weight']!r}")
        kept |= {} if message["weight"] else {"weight": 0}
    kept |= {name: message[name] for name in ("tool_call_id", "name") if role == "tool" and message.get(name)}
    return {"role": role, "content": content} | kept


def _tool_calls(message: dict, role: str) -> list[dict]:
    """The calls of an assistant's message, arguments as an object."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if calls and (role != "assistant" or not isinstance(calls, list)):
        raise DataError("field 'tool_calls' must be a list, in a message of the assistant")
    read = []
    for call in calls:
        function = _function(call)
        if not function:
            raise DataError("field 'tool_calls' must hold calls with a function name")
        others, arguments = function.keys() - {"name", "arguments", "type", "id", "index"}, function.get("arguments")
        if others and arguments is None:
            raise DataError(f"the call of {function['name']} has {min(others)!r}, expected 'arguments'")
        # OpenAI writes them as text, of nothing where a function takes none; templates want the object
        arguments = _parsed({} if arguments in (None, "") else arguments, f"the arguments of {function['name']} are")
        if not isinstance(arguments, dict):
            raise DataError(f"the arguments of {function['name']} must be a JSON object")
        plain = {"id": call["id"]} if call.get("id") else {}
        read.append({"type": "function", **plain, "function": {"name": function["name"], "arguments": arguments}})
    return read
