"""Files of training rows → chats.

Three forms of row are read, as JSON Lines or as one JSON list:

    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": "…"}, …], "tools": […]}
    {"instruction": "…", "input": "… or empty", "output": "…"}          Alpaca
    {"prompt": "…", "completion": "…"}

All become a chat: an optional system message, then user and assistant in turn, the last
word the assistant's. `tools` and an assistant's `tool_calls` have the form of OpenAI's and
transformers' chat templates; results (role "tool") follow the calls. Nothing is dropped in silence:
a bad row is an error that names file, line and reason, and skipped rows and unread columns are
listed for the caller to announce.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOOL_FIELDS = {"tool_calls", "tool_call_id", "name"}  # of messages in a chat with tools


class DataError(ValueError):
    """Data that cannot be learnt from. The message is one line and names the place."""


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


def load_rows(path: str | Path, skip_bad_rows: bool = False) -> LoadedRows:
    """Read a file of rows as chats.

    Args:
        path: JSON Lines, or one JSON list; UTF-8, with or without a byte order mark. Blank lines are skipped.
        skip_bad_rows: leave bad rows out and list them, instead of raising at the first.

    Raises:
        DataError: "FILE:LINE: reason" for a bad row; a file that cannot be read or holds no usable row.
    """
    text = _read_text(path)
    entries = _list_entries if text.lstrip().startswith("[") else _line_entries
    rows, skipped, ignored = [], [], set()
    for where, entry in entries(text, path):
        try:
            chat, unread = _as_chat(json.loads(entry))
        except (ValueError, RecursionError) as error:
            reason = error if isinstance(error, DataError) else f"not valid JSON: {_what_is_wrong(error)}"
            if not skip_bad_rows:
                raise DataError(f"{where}: {reason}") from None
            skipped.append(f"{where}: {reason}")
        else:
            chat.where = where
            rows.append(chat)
            ignored |= unread
    if not rows:
        reason = f"no usable row among {len(skipped)}; {skipped[0]}" if skipped else "holds no rows"
        raise DataError(f"{path}: {reason}")
    notes = []
    if skipped:
        total = len(skipped) + len(rows)
        notes.append(f"bad rows skipped: {len(skipped)} of {total}, the first: {'; '.join(skipped[:3])}")
    if ignored:
        notes.append(f"ignored columns: {', '.join(sorted(ignored))}")
    return LoadedRows(rows, notes)


def _read_text(path: str | Path) -> str:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text") from None


def _what_is_wrong(error: Exception) -> str:
    """The decoder's words with the column; its line number counts within the row, and would contradict the file's."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _line_entries(text: str, path: str | Path) -> Iterator[tuple[str, str]]:
    """("FILE:LINE", JSON text) for each line with something on it."""
    # Not splitlines(): it also cuts at characters such as U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _list_entries(text: str, path: str | Path) -> Iterator[tuple[str, str]]:
    """("FILE:LINE: row N", JSON text) for each element of one JSON list."""
    decoder = json.JSONDecoder()
    position = _after_space(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    more = text[position : position + 1] != "]"
    while more:
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        where = f"{path}:{line}: row {number}"
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            # Where one row is broken nobody knows where the next begins, so this is never skipped.
            raise DataError(f"{where}: not valid JSON: {getattr(error, 'msg', error)}") from None
        yield where, text[position:end]
        position = _after_space(text, end)
        more = text[position : position + 1] == ","
        if more:
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{where}: not valid JSON: expected ',' or ']' after this row")
    if text[position + 1 :].strip():
        raise DataError(f"{path}: not valid JSON: text after the end of the list")


def _after_space(text: str, position: int) -> int:
    return re.compile(r"\s*").match(text, position).end()


def _as_chat(row: object) -> tuple[Chat, set[str]]:
    """A row as a chat, and the columns that were not read."""
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    if "messages" in row:
        chat = Chat(_messages(row["messages"]), _tools(row.get("tools")))
        fields = {f"messages.{key}" for message in row["messages"] for key, value in message.items() if value}
        read = {"messages", "tools", "messages.role", "messages.content"}
        if _has_tools(chat):
            read |= {f"messages.{field}" for field in TOOL_FIELDS}
        return chat, (set(row) | fields) - read
    if "instruction" in row:
        request, unread = _text(row, "instruction"), set(row) - {"instruction", "input", "output"}
        if row.get("input") not in (None, ""):
            request += "\n\n" + _text(row, "input")
        answer = _text(row, "output")
    elif "prompt" in row:
        request, unread = _text(row, "prompt"), set(row) - {"prompt", "completion"}
        answer = _text(row, "completion")
    else:
        raise DataError(
            f"unknown columns: {', '.join(row) or 'none'}; "
            "expected messages, or instruction (input) and output, or prompt and completion"
        )
    return Chat([{"role": "user", "content": request}, {"role": "assistant", "content": answer}]), unread


def _text(fields: dict, name: str) -> str:
    """A field that must be text with something in it."""
    if name not in fields:
        raise DataError(f"field {name!r} is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"field {name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"field {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"field {name!r} holds half of a surrogate pair, which is no character") from None
    return value


def _tools(tools: object) -> list[dict] | None:
    """A list of function schemas, or None for none; some data sets hold it as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"field 'tools' is not valid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(map(_function, tools)):
        raise DataError("field 'tools' must be a list of function schemas, each with a name")
    return tools


def _function(entry: object) -> dict | None:
    """What a schema or a call says of its function; None without a name."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def _has_tools(chat: Chat) -> bool:
    return bool(chat.tools) or any(message["role"] == "tool" or "tool_calls" in message for message in chat)


def _messages(messages: object) -> list[dict]:
    """Check that a chat is an optional system message, then user and assistant in turn, tools between them."""
    if not isinstance(messages, list) or not messages:
        raise DataError("field 'messages' must be a list with at least one message")
    chat = []
    for number, message in enumerate(messages, start=1):
        try:
            chat.append(_message(message, before=chat[-1] if chat else None))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    if chat[-1]["role"] != "assistant":
        raise DataError(f"the last message must be the assistant's answer, got role {chat[-1]['role']!r}")
    return chat


def _message(message: object, before: dict | None) -> dict:
    """One message of a chat; `before` is the message before it."""
    if not isinstance(message, dict):
        raise DataError(f"must be a JSON object, got {type(message).__name__}")
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise DataError(f"unknown role {role!r}, expected system, user, assistant or tool")
    expected = _who_follows(before)
    if role not in expected:
        raise DataError(f"role {role!r} out of order, expected {' or '.join(expected)}")
    calls = _tool_calls(message)
    # Empty on purpose: a system message that switches off a template's own, and a call without text.
    if (role == "system" and message.get("content") == "") or (calls and not message.get("content")):
        content = ""
    else:
        content = _text(message, "content")
    links = {name: message[name] for name in ("tool_call_id", "name") if role == "tool" and message.get(name)}
    return {"role": role, "content": content} | ({"tool_calls": calls} if calls else {}) | links


def _who_follows(before: dict | None) -> tuple[str, ...]:
    if before is None:
        return "system", "user"
    if before["role"] == "tool":
        return "tool", "assistant"
    if before["role"] == "user":
        return ("assistant",)
    return ("tool", "user") if "tool_calls" in before else ("user",)


def _tool_calls(message: dict) -> list[dict] | None:
    """The calls of an assistant's message, arguments as an object; None for none."""
    calls = message.get("tool_calls")
    if not calls:
        return None
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise DataError("field 'tool_calls' must be a list, in a message of the assistant")
    read = []
    for call in calls:
        function = _function(call)
        if not function:
            raise DataError("field 'tool_calls' must hold calls with a function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as OpenAI writes them; templates want the object
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise DataError(f"the arguments of {function['name']} are not valid JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise DataError(f"the arguments of {function['name']} must be a JSON object")
        plain = {"id": call["id"]} if call.get("id") else {}
        read.append({"type": "function", **plain, "function": {"name": function["name"], "arguments": arguments}})
    return read
