"""Files of training rows → chats.

Three forms of row are read, as JSON Lines or as one JSON list:

    {"messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …]}
    {"instruction": "…", "input": "… or empty", "output": "…"}          Alpaca
    {"prompt": "…", "completion": "…"}

All become a chat: an optional system message, then user and assistant in turn, the last
word the assistant's. Nothing is dropped in silence: a bad row is an error that names file,
line and reason, and skipped rows and unread columns are listed for the caller to announce.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Chat = list[dict[str, str]]

_SPACE = re.compile(r"\s*")


class DataError(ValueError):
    """Data that cannot be learnt from. The message is one line and names the place."""


@dataclass(frozen=True)
class LoadedRows:
    """Chats, one "FILE:LINE: reason" for each skipped row, and the columns that were not read."""

    rows: list[Chat]
    skipped: list[str]
    ignored_columns: list[str]

    def notes(self) -> list[str]:
        """What the user must be told, a line each; empty when every row and column was used."""
        notes = []
        if self.skipped:
            total = len(self.skipped) + len(self.rows)
            notes.append(f"bad rows skipped: {len(self.skipped)} of {total}, the first: {'; '.join(self.skipped[:3])}")
        if self.ignored_columns:
            notes.append(f"ignored columns: {', '.join(self.ignored_columns)}")
        return notes


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
            reason = error if isinstance(error, DataError) else f"not valid JSON: {error}"
            if not skip_bad_rows:
                raise DataError(f"{where}: {reason}") from None
            skipped.append(f"{where}: {reason}")
        else:
            rows.append(chat)
            ignored |= unread
    if not rows:
        reason = f"no usable row among {len(skipped)}; {skipped[0]}" if skipped else "holds no rows"
        raise DataError(f"{path}: {reason}")
    return LoadedRows(rows, skipped, sorted(ignored))


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
            # Where one row is broken nobody can tell where the next begins, so this is never skipped.
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
    return _SPACE.match(text, position).end()


def _as_chat(row: object) -> tuple[Chat, set[str]]:
    """A row as a chat, and the columns that were not read."""
    if not isinstance(row, dict):
        raise DataError(f"a row must be a JSON object, got {type(row).__name__}")
    if row.get("tools"):
        raise DataError("tool calls are not supported, got a column 'tools'")
    if "messages" in row:
        chat = _messages(row["messages"])
        fields = {f"messages.{key}" for message in row["messages"] for key, value in message.items() if value}
        return chat, (set(row) | fields) - {"messages", "messages.role", "messages.content"}
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
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}], unread


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


def _messages(messages: object) -> Chat:
    """Check that a chat is an optional system message, then user and assistant in turn."""
    if not isinstance(messages, list) or not messages:
        raise DataError("field 'messages' must be a list with at least one message")
    chat = []
    for number, message in enumerate(messages, start=1):
        try:
            chat.append(_message(message, before=chat[-1]["role"] if chat else None))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    if chat[-1]["role"] != "assistant":
        raise DataError(f"the last message must be the assistant's answer, got role {chat[-1]['role']!r}")
    return chat


def _message(message: object, before: str | None) -> dict[str, str]:
    """One message of a chat; `before` is the role of the message before it."""
    if not isinstance(message, dict):
        raise DataError(f"must be a JSON object, got {type(message).__name__}")
    if message.get("tool_calls"):
        raise DataError("tool calls are not supported")
    role = message.get("role")
    if role not in ("system", "user", "assistant"):
        raise DataError(f"unknown role {role!r}, expected system, user or assistant")
    expected = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
    if role not in expected:
        raise DataError(f"role {role!r} out of order, expected {' or '.join(expected)}")
    # An empty system message is meant: it switches off the one that some templates add.
    if role == "system" and message.get("content") == "":
        return {"role": role, "content": ""}
    return {"role": role, "content": _text(message, "content")}
