"""Files of rows, in the forms that people keep them in → rows, each with the place that it stands at.

JSON Lines; one JSON document (a list of rows, an object that holds such a list, or objects over several lines each);
CSV and TSV; Parquet and Arrow (by pyarrow); plain text, a row per line. Any of them in gzip or zstd; a directory of
them; `-`, standard input; the name of a data set on the Hugging Face hub (by `datasets`, its offline cache included).
Text is UTF-8, UTF-16 or UTF-32, lines end in LF, CR or both.

A file may be hostile: no row is longer than `MOST_ROW` characters, no JSON document than `MOST_DOCUMENT`, and nothing
unpacks to a hundred times its size, so that reading it stays within 2 GB.
"""

import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MOST_ROW = 2**24  # characters
MOST_DOCUMENT = 2**28
WINDOW = 2**20  # bytes that show what a file is
BOMB = 2**22, 100  # unpacked bytes from which on the ratio of unpacked to packed ones is looked at, and its limit
TABLES = {".csv": ",", ".tsv": "\t"}
UNREAD = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\3\4": "zip", b"7z\xbc\xaf": "7-Zip"}
SUFFIXES = {".json", ".jsonl", ".ndjson", ".txt", ".parquet", ".arrow", *TABLES}
ABOUT = ("dataset_info.json", "state.json", "dataset_dict.json")
# An object that is not a row itself but holds a list of rows, and no messages, behind numbers and texts at most.
WRAPPED = re.compile(
    r'\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,)*'
    r'\s*"(?!(?:messages|conversations|prompt|completion|tools|chosen|rejected)")[^"\\]*"\s*:\s*'
    r'(?=\[\s*\{(?!\s*"(?:role|from)"))'
)
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte
Place = tuple[str, object]  # "FILE:LINE" or the like, and a row, or the DataError that stands for it


class DataError(ValueError):
    """Data that cannot be learnt from. The message is one line and names the place."""

    def __init__(self, text: str):
        super().__init__(" ".join(text.splitlines()))


def read_places(source: str | Path) -> Iterator[Place]:
    """(place, row) of every row of a file, directory, data set or standard input.

    Raises:
        DataError: what cannot be read at all, or from here on.
    """
    path, name = Path(os.path.expanduser(source)), str(source)
    try:
        if name == "-":
            yield from _read(sys.stdin.buffer, "standard input", "")
        elif path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES
                     and not any(part.startswith(".") for part in file.relative_to(path).parts)]  # fmt: skip
            if any(file.suffix == ".arrow" for file in files):  # `datasets` tells there of its rows
                files = [file for file in files if file.name not in ABOUT]
            if not files:
                raise DataError(f"{name}: cannot be read: no file in it ends in {', '.join(sorted(SUFFIXES))}")
            for file in sorted(files, key=lambda file: file.relative_to(path).as_posix()):
                yield from read_places(file)
        elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and _suffix(path) not in SUFFIXES:
            yield from _hub(name)
        else:
            with open(path, "rb", WINDOW) as file:
                yield from _read(file, name, _suffix(path))
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(f"{name}: cannot be read: {reason}") from None


def _suffix(path: Path) -> str:
    return Path(re.sub(r"\.(gz|zst|zstd)$", "", path.name.lower())).suffix


def _hub(name: str) -> Iterator[Place]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # whatever it raises without a network or such a data set
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: no such file, nor can it be had from the hub: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", _without_null(row)


class _Counted(io.RawIOBase):
    """What is read of a pipe, or unpacked from the stream `packed` unless that is a bomb; neither counts it itself."""

    def __init__(self, stream, packed=None, name: str = ""):
        self.stream, self.packed, self.name, self.count = stream, packed, name, 0

    def readable(self):
        return True

    def tell(self) -> int:
        return self.count

    def readinto(self, buffer) -> int:
        size = self.stream.readinto(buffer)
        self.count += size
        if self.packed is not None and self.count > max(BOMB[0], BOMB[1] * self.packed.tell()):
            raise DataError(f"{self.name}: unpacks to more than {BOMB[1]} times its size")
        return size


def _read(file: io.BufferedReader, name: str, suffix: str) -> Iterator[Place]:
    packed = file if file.seekable() else _Counted(file)
    file = file if packed is file else io.BufferedReader(packed, WINDOW)
    start = file.peek()
    if start[:2] == b"\x1f\x8b":
        file = io.BufferedReader(_Counted(gzip.GzipFile(fileobj=file), packed, name), WINDOW)
    elif start[:4] == b"\x28\xb5\x2f\xfd":
        import pyarrow

        file = io.BufferedReader(_Counted(pyarrow.CompressedInputStream(file, "zstd"), packed, name), WINDOW)
    start = file.peek()
    if packer := next((packer for mark, packer in UNREAD.items() if start.startswith(mark)), None):
        raise DataError(f"{name}: packed by {packer}, which is not read; unpack it, or use gzip or zstd")
    if start[:4] == b"PAR1" or start[:6] == b"ARROW1" or suffix in (".parquet", ".arrow"):
        yield from _columns(file, name, parquet=start[:4] == b"PAR1" or suffix == ".parquet")
        return
    encoding = json.detect_encoding(start)
    text = io.TextIOWrapper(file, encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    if suffix == ".txt":
        for number, line in _lines(text, name):
            if line.strip():
                yield f"{name}:{number}", _bad_character(line, name, number) or {"text": line.rstrip("\n")}
    elif suffix in TABLES:
        yield from _table(text, name, TABLES[suffix])
    else:
        start = start.decode(encoding, "ignore").lstrip("\ufeff \t\r\n").replace("\r", "\n")
        yield from _form(start)(text, name)


def _columns(file: io.BufferedReader, name: str, parquet: bool) -> Iterator[Place]:
    import pyarrow
    import pyarrow.parquet

    file = file if file.seekable() else io.BytesIO(file.read())
    # One thread: on a damaged file others may still be at work when the process ends.
    if parquet:
        batches = pyarrow.parquet.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=256, use_threads=False)
    else:
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        try:
            reader = pyarrow.ipc.open_file(file, options=options)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:  # as `datasets` writes them
            file.seek(0)
            batches = pyarrow.ipc.open_stream(file, options=options)
    number = 0
    for batch in batches:
        batch.validate(full=True)  # else a damaged file may be read beyond its end
        if twice := _twice(batch.schema.names):
            raise DataError(f"{name}: the column {twice!r} stands twice")
        for row in batch.to_pylist():
            number += 1
            yield f"{name}: row {number}", _without_null(row)


def _without_null(value: object) -> object:
    """A row, or a value in it. Arrow gives each object the fields of all, null where it has none."""
    if isinstance(value, dict):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value


def _lines(text: io.TextIOWrapper, name: str) -> Iterator[tuple[int, str]]:
    """(number, line). A string may hold U+2028 and the like, which `splitlines` would cut at."""
    for number, line in enumerate(iter(lambda: text.readline(MOST_ROW + 1), ""), start=1):
        if len(line) > MOST_ROW:
            raise DataError(f"{name}:{number}: a line of more than {MOST_ROW:,} characters")
        yield number, line


def _document(text: io.TextIOWrapper, name: str) -> str:
    content = text.read(MOST_DOCUMENT)
    if len(content) >= MOST_DOCUMENT:
        raise DataError(f"{name}: a JSON document of more than {MOST_DOCUMENT:,} characters; JSON Lines may be longer")
    if bad := _bad_character(content, name):
        raise bad
    return content


def _bad_character(text: str, name: str, line: int = 1) -> DataError | None:
    if text.isascii() or not (bad := NOT_UTF8.search(text)):
        return None
    column = bad.start() - text.rfind("\n", 0, bad.start())
    return DataError(f"{name}:{line + text.count(chr(10), 0, bad.start())}: not UTF-8 text, column {column}")


def _table(text: io.TextIOWrapper, name: str, delimiter: str) -> Iterator[Place]:
    csv.field_size_limit(MOST_ROW)
    lines = (line for _, line in _lines(text, name))
    header = next(lines, "")
    if delimiter == ",":  # spreadsheets write others, too
        delimiter = next((mark for mark in ",;\t|" if mark in header), ",")
    table = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    try:
        columns = next(table, [])
        if twice := _twice(filter(None, columns)):  # a table may end in several that are empty and have no name
            raise DataError(f"{name}:1: the column {twice!r} stands twice in the header")
        for cells in filter(None, table):
            row = dict(zip(columns, cells, strict=False))
            bad = [column for column, cell in row.items() if NOT_UTF8.search(cell)]
            if bad:
                row = DataError(f"field {bad[0]!r} is not UTF-8 text")
            if len(cells) != len(columns):
                row = DataError(f"{len(cells)} fields, the header has {len(columns)}")
            yield f"{name}:{table.line_num - sum(cell.count(chr(10)) for cell in cells)}", row
    except csv.Error as error:
        raise DataError(f"{name}:{table.line_num}: not a valid table: {error}") from None


def _twice(names: Iterable[str]) -> str | None:
    """The first name that has stood before."""
    before = set()
    return next((name for name in names if name in before or before.add(name)), None)


def _once(pairs: list[tuple[str, object]]) -> dict | DataError:
    """An object; where a key stands twice, in it or further inside, the error instead."""
    found = dict(pairs)
    if len(found) < len(pairs):
        return DataError(f"the key {_twice(key for key, _ in pairs)!r} stands twice in an object")
    return next(filter(None, map(_fault, found.values())), found)


def _fault(value: object) -> DataError | None:
    """The error that stands in a value for an object, in lists too."""
    if isinstance(value, list):
        return next(filter(None, map(_fault, value)), None)
    return value if isinstance(value, DataError) else None


def decode_json(text: str) -> object:
    """The value that JSON text holds. DataError for a key that stands twice in an object, ValueError for bad JSON."""
    value = DECODER.decode(text)
    if fault := _fault(value):
        raise fault
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _form(start: str) -> Callable[[io.TextIOWrapper, str], Iterator[Place]]:
    """What reads JSON text of this beginning: a list, or one object that holds a list of rows; objects over several
    lines each; or JSON Lines."""
    wrapped, line = WRAPPED.match(start), len(start.partition("\n")[0])
    try:
        _, end = DECODER.raw_decode(start)
        wrapped, over = wrapped and not start[end:].strip(), end > line
    except (ValueError, RecursionError) as error:  # broken, or longer than what is seen of it
        over = getattr(error, "pos", 0) > line and start[line:].lstrip()[:1] not in ("", "{")
    return _list if wrapped or start[:1] == "[" else _objects if over else _json_lines


def _json_lines(text: io.TextIOWrapper, name: str) -> Iterator[Place]:
    for number, line in _lines(text, name):
        place = f"{name}:{number}"
        try:
            if line.strip():
                yield place, _bad_character(line, name, number) or DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            # The decoder's line counts within the row, and would contradict the file's.
            column = f", column {error.colno}" if hasattr(error, "colno") else ""
            yield place, DataError(f"not valid JSON: {_why(error)}{column}")


def _list(file: io.TextIOWrapper, name: str) -> Iterator[Place]:
    text = _document(file, name)
    position = _after_space(text, 0)
    wrapper = WRAPPED.match(text, position)
    position = yield from _elements(text, wrapper.end() if wrapper else position, name)
    if wrapper:  # what else the object holds must be valid too
        text = "{" + text[position:].lstrip(" \r\n\t,")
        others, position = _decode(text, 0, name)
        for key in others if isinstance(others, dict) else ():
            if isinstance(others[key], list) and others[key] and isinstance(others[key][0], dict):
                raise DataError(f"{name}: a second list of rows, {key!r}; give each a file of its own")
    if text[position:].strip():
        raise DataError(f"{name}: not valid JSON: text after the end of the list")


def _objects(file: io.TextIOWrapper, name: str) -> Iterator[Place]:
    text = _document(file, name)
    line, counted, position = 1, 0, _after_space(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        row, end = _decode(text, position, f"{name}:{line}")
        yield f"{name}:{line}", row
        position = _after_space(text, end)


def _elements(text: str, position: int, name: str) -> Iterator[Place]:
    """("FILE:LINE: row N", row) for each element of the JSON list at `position`; returns where it ends."""
    line, counted, number = 1, 0, 0
    position = _after_space(text, position + 1)
    more = text[position : position + 1] != "]"
    while more:
        line, counted, number = line + text.count("\n", counted, position), position, number + 1
        place = f"{name}:{line}: row {number}"
        row, end = _decode(text, position, place)
        yield place, row
        position = _after_space(text, end)
        more = text[position : position + 1] == ","
        if more:
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{place}: not valid JSON: expected ',' or ']' after this row")
    return position + 1


def _decode(text: str, position: int, place: str) -> tuple[object, int]:
    """The JSON value at `position` and where it ends; tried on ever longer pieces, as most rows are short."""
    size = 2**12
    while True:
        piece = text[position : position + size]
        try:
            row, end = DECODER.raw_decode(piece)
            if end < len(piece) or len(piece) < size:  # a number may go on behind the piece
                return row, position + end
        except (ValueError, RecursionError) as error:
            if size >= MOST_ROW or len(piece) < size or isinstance(error, RecursionError):
                at = position + getattr(error, "pos", 0)
                reason = f"{_why(error)}, column {at - text.rfind(chr(10), 0, at)}"
                # Where one row is broken nobody knows where the next begins, so this is never skipped.
                raise DataError(f"{place}: not valid JSON: {reason}") from None
        size *= 2


def _why(error: Exception) -> str:
    """What stops the decoder: bad JSON, depth, or a number of thousands of digits."""
    deep = isinstance(error, RecursionError)
    return "nested too deeply" if deep else getattr(error, "msg", str(error).partition(";")[0])


def _after_space(text: str, position: int) -> int:
    return re.compile(r"\s*").match(text, position).end()
