"""Files as people have them, each of a kind: every form gives the same rows, every fault one line with its place."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import types

import pytest

from handtuned.training import data
from handtuned.training.files import DataError
from handtuned.training.formats import load_rows
from handtuned.training.settings import FinetuneSettings

WORDS = ("hi, é 😀", 'a "quoted"\nword', "b; c")
ROWS = [{"instruction": f"Say {word}", "input": "", "output": word} for word in WORDS]
CHATS = [[{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
         for row in ROWS]  # fmt: skip


def table(delimiter):
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return "".join(delimiter.join(row) + "\n" for row in quoted)


TEXTS = {
    "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "rows.json": json.dumps(ROWS, ensure_ascii=False),
    "indented.json": json.dumps(ROWS, indent=1),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n",
    "wrapped.json": json.dumps({"version": 1.0, "data": ROWS, "licence": {"name": "x"}}, indent=1),
    "unnamed": "\n \n" + json.dumps({"rows": ROWS}),
    "rows.csv": table(","),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "nan.jsonl": "".join(json.dumps(row | {"input": float("nan")}, ensure_ascii=False) + "\n" for row in ROWS),
    "rows.tsv": table("\t"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_every_form_encoding_and_line_ending_gives_the_same_rows(tmp_path, name, encoding, ending):
    content = TEXTS[name].replace("\n", ending).encode(encoding)
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    for file in (name, f"{name}.gz"):
        assert load_rows(tmp_path / file).rows == CHATS


def test_columns_and_archives_of_arrow(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [*ROWS, {"messages": CHATS[0]}]  # a table holds the union of all columns, null where a row has none
    filled = pyarrow.Table.from_pylist([{"instruction": None, "input": None, "output": None, "messages": None} | row
                                        for row in rows])  # fmt: skip
    parquet.write_table(filled, tmp_path / "rows.parquet")
    for name, writer in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with writer(tmp_path / name, filled.schema) as sink:
            sink.write_table(filled)
    with pyarrow.CompressedOutputStream(str(tmp_path / "rows.jsonl.zst"), "zstd") as sink:
        sink.write(TEXTS["rows.jsonl"].encode())
    assert load_rows(tmp_path / "rows.jsonl.zst").rows == CHATS
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        assert load_rows(tmp_path / name).rows == [*CHATS, CHATS[0]]
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=f"cut-{name}: cannot be read"):
            load_rows(tmp_path / f"cut-{name}")


def test_objects_of_columns_have_the_fields_of_their_own_row_only(tmp_path, monkeypatch):
    """Else a model would learn to call a function with the arguments of all others, as null."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for name in ("to", "city"):
        call = {"function": {"name": "f", "arguments": {name: 4}}}
        schema = {"name": "f", "parameters": {"properties": {name: {"type": "integer"}}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        rows.append({"messages": [{"role": "user", "content": "q"}, answer], "tools": [{"function": schema}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = [(chat, chat.tools) for chat in load_rows(tmp_path / "rows.jsonl").rows]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist() != rows
    parquet.write_table(table, tmp_path / "rows.parquet")
    hub = types.SimpleNamespace(load_dataset=lambda name, split: table.to_pylist())
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for source in (tmp_path / "rows.parquet", "some/rows"):
        assert [(chat, chat.tools) for chat in load_rows(source).rows] == expected


@pytest.mark.parametrize("name, pack", [("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_other_packers_are_named(tmp_path, name, pack):
    (tmp_path / "rows.jsonl").write_bytes(pack(TEXTS["rows.jsonl"].encode()))
    with pytest.raises(DataError, match=f"rows.jsonl: packed by {name}, which is not read; unpack it"):
        load_rows(tmp_path / "rows.jsonl")


def test_a_second_list_of_rows_is_not_dropped_in_silence(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"train": ROWS[:2], "labels": ["a"], "test": ROWS[2:]}))
    with pytest.raises(DataError, match=r"rows\.json: a second list of rows, 'test'; give each a file of its own"):
        load_rows(tmp_path / "rows.json")


LISTED = {"sources": [{"url": "x"}], "prompt": "Say it.", "completion": "It."}
SAID = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It."}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("filler", ["", "x" * 20_000])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_row_that_begins_with_a_list_of_objects_is_a_row(tmp_path, indent, filler, pack):
    rows = [LISTED | {"sources": [{"url": filler}]}] * 3
    (tmp_path / "rows.jsonl").write_bytes(pack("\n".join(json.dumps(row, indent=indent) for row in rows).encode()))
    loaded = load_rows(tmp_path / "rows.jsonl")
    assert loaded.rows == [SAID] * 3 and loaded.notes == ["ignored columns: sources"]


@pytest.mark.parametrize("count", [1, 2])
def test_messages_of_another_name_are_no_rows(tmp_path, count):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'dialog': SAID})}\n" * count)
    assert load_rows(tmp_path / "rows.jsonl", columns={"messages": "dialog"}).rows == [SAID] * count


def test_columns_without_a_name_are_told(tmp_path):
    """As spreadsheets and pandas write them."""
    (tmp_path / "rows.csv").write_text(",prompt,completion,,\n0,Say it.,It.,,\n")
    loaded = load_rows(tmp_path / "rows.csv")
    assert loaded.rows == [SAID] and loaded.notes == ["ignored columns: (no name)"]


def test_a_column_that_stands_twice_in_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    twice = pyarrow.table([["u"], ["v"], ["a"]], names=["prompt", "prompt", "completion"])
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", twice.schema) as sink:
        sink.write_table(twice)
    with pytest.raises(DataError, match=r"rows\.arrow: the column 'prompt' stands twice"):
        load_rows(tmp_path / "rows.arrow")


def test_a_directory_in_the_order_of_its_names_whatever_the_file_system_says(tmp_path):
    lines = TEXTS["rows.jsonl"].splitlines()
    for name, line in zip(("b.jsonl", "c/a.jsonl", "a.jsonl"), lines, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line, encoding="utf-8")
    (tmp_path / "README.md").write_text("no rows")
    loaded = load_rows(tmp_path)
    assert loaded.rows == [CHATS[2], CHATS[0], CHATS[1]] and loaded.rows[0].where == f"{tmp_path / 'a.jsonl'}:1"


def test_standard_input(monkeypatch):
    stdin = types.SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(gzip.compress(TEXTS["rows.json"].encode()))))
    monkeypatch.setattr(sys, "stdin", stdin)
    loaded = load_rows("-")
    assert loaded.rows == CHATS and loaded.rows[1].where == "standard input:1: row 2"


def test_a_name_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "some/nothing":
            raise ConnectionError("no\nnetwork")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_rows("some/rows").rows == CHATS and asked == [("some/rows", "train")]
    with pytest.raises(DataError, match="some/nothing: no such file, nor can it be had from the hub: no network"):
        load_rows("some/nothing")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load_rows("some/rows.jsonl")


def test_a_path_in_the_home_directory(tmp_path, monkeypatch):
    """Which a shell leaves as it is in `--data=~/rows.jsonl`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(TEXTS["rows.jsonl"], encoding="utf-8")
    assert load_rows("~/rows.jsonl").rows == CHATS


def test_several_files_with_weights(tmp_path, capsys):
    for name, chat in zip("abc", CHATS, strict=True):
        rows = [{"messages": [{"role": "user", "content": f"{name}{number}"}, chat[1]]} for number in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [f"{tmp_path}/{name}.jsonl" for name in "abc"]
    settings = FinetuneSettings(data=[f"{files[0]}:2", files[1], f"{files[2]}:0.5"], eval_fraction=0.0)
    train, held_out, _ = data.load_chats(settings)
    asked = [chat[0]["content"] for chat in train]
    assert [asked.count(f"a{n}") for n in range(8)] == [2] * 8 and [asked.count(f"b{n}") for n in range(8)] == [1] * 8
    assert 0 < sum(text.startswith("c") for text in asked) < 8 and held_out == []
    assert data.load_chats(settings)[0] == train, "seeded"
    assert "duplicate" not in capsys.readouterr().out, "what the weights repeat is meant"
    assert FinetuneSettings(data=(files[0],)).data == files[0]


def test_no_more_rows_are_held_out_than_are_scored(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"a{number}"}, CHATS[0][1]]} for number in range(24)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = FinetuneSettings(data=f"{tmp_path}/a.jsonl", eval_fraction=0.5, eval_samples=3)
    train, held_out, _ = data.load_chats(settings)
    assert (len(train), len(held_out)) == (21, 3)


def test_duplicates_and_rows_that_are_held_out_too_are_told(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(TEXTS["rows.jsonl"] + TEXTS["rows.jsonl"].splitlines()[0])
    (tmp_path / "held.jsonl").write_text(TEXTS["rows.jsonl"].splitlines()[0])
    data.load_chats(FinetuneSettings(data=f"{tmp_path}/train.jsonl", eval_data=f"{tmp_path}/held.jsonl"))
    said = capsys.readouterr().out
    assert "duplicate training rows: 1 of 4" in said and "training rows that are held out, too: 2 of 4" in said


FAULTS = {
    "quotes": ("a.jsonl", "{'prompt': 'a'}", "a.jsonl:1: not valid JSON: Expecting property name", "column 2"),
    "comment": ("a.jsonl", "// rows\n" + TEXTS["rows.jsonl"], "a.jsonl:1: not valid JSON: Expecting value, column 1"),
    "one key twice": ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "a.jsonl:1: the key 'prompt' stands twice"),
    "one key twice in a list": ("a.json", '[\n{"a": {"b": 1, "b": 2}}]', "a.json:2: row 1: the key 'b' stands twice"),
    "other letters": ("a.jsonl", b'{"prompt": "a",\n "x": "caf\xe9"}', "a.jsonl:2: not UTF-8 text, column 11"),
    "other letters in a table": ("a.csv", b"prompt,completion\na,b\nc,\xe9\n", "a.csv:3: field ", "is not UTF-8"),
    "other letters in a text": ("a.txt", b"caf\xe9\n", "a.txt:1: not UTF-8 text, column 4"),
    "comma at the end": ("a.json", '[{"prompt": "a", "completion": "b"},]', "a.json:1: row 2: not valid", "column 37"),
    "fields too many": ("a.csv", "prompt,completion\na,b,c\n", "a.csv:2: 3 fields, the header has 2"),
    "fields too few": ("a.csv", "prompt,completion\n\"a\nb\",c\nd\n", "a.csv:4: 1 fields, the header has 2"),
    "header": ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: the column 'prompt' stands twice"),
    "open quote": ("a.csv", 'prompt,completion\n"a,b\n', "a.csv:", "not a valid table"),
    "NUL": ("a.jsonl", '{"prompt": "a\\u0000", "completion": "b"}', "a.jsonl:1: field 'prompt' holds the code"),
    "preferences": ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "a.jsonl:1: a preference row"),
    "image": ("a.jsonl", '{"messages": [], "images": ["a.png"]}', "a.jsonl:1: field 'images' is not empty"),
    "plain text": ("a.txt", "Once.\n", "a.txt:1: a text in which no answer is marked", "--train-on all"),
    "names of columns": ("a.jsonl", '{"question": "a", "answer": "b"}', "unknown columns: question", "--columns"),
    "a zip archive": ("a.json", b"PK\x03\x04\x00\x00\xff\xfe", "a.json: packed by zip"),
    "not packed after all": ("a.jsonl.gz", b"\x1f\x8b\x08 no", "a.jsonl.gz: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line_with_its_place(tmp_path, fault):
    name, content, *reasons = fault
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / name)
    assert "\n" not in str(error.value) and all(reason in str(error.value) for reason in reasons), str(error.value)


HOSTILE = {
    "deep": b'{"a":' * 5_000_000,
    "deep list": b"[" * 5_000_000,
    "deep in a list": b"[" + b'{"a":[' * 3_000_000,
    "one line": b'{"prompt": "' + b"a" * 200_000_000,
    "one line of a list": b'[{"prompt": "' + b"a" * 200_000_000,
    "many small values": b'{"a": [' + b"{}," * 60_000_000,
    "blank": b" " * 200_000_000,
    "bomb": gzip.compress(bytes(10**9), 1),
    "bomb of lines": gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 30_000_000, 1),
    "bomb of a table": gzip.compress(b"prompt,completion\n" + b"a,b\n" * 10**8, 1),
}
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, 2 * 10**9))
from handtuned.training.formats import DataError, load_rows
try:
    load_rows(sys.argv[1])
except DataError as error:
    print(str(error)[:300])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_end_in_one_line_within_2_gb(tmp_path, kind):
    file = tmp_path / ("rows.csv" if "table" in kind else "rows.jsonl")
    file.write_bytes(HOSTILE[kind])
    done = subprocess.run([sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith(str(file)) and done.stdout.count("\n") == 1


def test_a_directory_is_read_without_what_is_hidden_or_tells_of_the_rows(tmp_path):
    row = '{"prompt": "u", "completion": "a"}'
    for name in ("rows.jsonl", "._rows.jsonl", ".ipynb_checkpoints/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row if name == "rows.jsonl" else "broken")
    assert len(load_rows(tmp_path).rows) == 1
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"prompt": ["u"], "completion": ["a"]})
    with pyarrow.OSFile(str(tmp_path / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    for name in ("dataset_info.json", "state.json"):  # as `save_to_disk` leaves them
        (tmp_path / name).write_text('{"_fingerprint": "f"}')
    assert len(load_rows(tmp_path).rows) == 2
