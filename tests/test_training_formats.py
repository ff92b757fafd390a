"""Files of rows → chats."""

import json

import pytest

from handtuned.training.formats import DataError, load_rows
from handtuned.training.settings import column_names

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Turn on the light."},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "And off again?"},
    {"role": "assistant", "content": "Done."},
]


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
AS_CHAT = [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]

BAD_ROWS = {
    "broken": ('{"prompt": ', "not valid JSON"),
    "two objects": ('{"a": 1} {"b": 2}', "not valid JSON"),
    "deep": ('{"a":' * 100_000, "not valid JSON"),
    "no object": ('"text"', "a row must be a JSON object, got str"),
    "unknown columns": ({"question": "?", "answer": "!"}, "unknown columns: question, answer"),
    "no columns": ({}, "unknown columns: none"),
    "known column without content": ({"prompt": float("nan"), "completion": "!"}, "field 'prompt' is empty"),
    "no output": ({"instruction": "Add."}, "field 'output' is missing"),
    "no completion": ({"prompt": "Add."}, "field 'completion' is missing"),
    "number": ({"prompt": "Add.", "completion": 3}, "field 'completion' must be text, got int"),
    "null": ({"instruction": "Add.", "output": None}, "field 'output' must be text, got NoneType"),
    "empty answer": ({"instruction": "Add.", "output": "  \n"}, "field 'output' is empty"),
    "empty prompt": ({"prompt": "", "completion": "3"}, "field 'prompt' is empty"),
    "bad input": ({"instruction": "Add.", "input": [1], "output": "3"}, "field 'input' must be text, got list"),
    "surrogate": ('{"prompt": "a\\ud83d", "completion": "b"}', "field 'prompt' holds half of a surrogate pair"),
    "no messages": ({"messages": []}, "field 'messages' must be a list"),
    "messages text": ({"messages": "hi"}, "field 'messages' must be a list"),
    "message text": ({"messages": ["hi"]}, "message 1: must be a JSON object, got str"),
    "no role": ({"messages": [{"content": "hi"}]}, "message 1: unknown role None"),
    "tool": ({"messages": [AS_CHAT[0], {"role": "tool", "content": "x"}]}, "message 2: role 'tool' out of order"),
    "tool calls": (
        {"messages": [AS_CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "message 2: field 'tool_calls' must hold calls with a function name",
    ),
    "tools": ({"messages": AS_CHAT, "tools": [{}]}, "field 'tools' must be a list of function schemas"),
    "no answer": ({"messages": [AS_CHAT[0]]}, "the last message must be the assistant's answer"),
    "answer first": ({"messages": [AS_CHAT[1]]}, "message 1: role 'assistant' out of order"),
    "two requests": ({"messages": [AS_CHAT[0], *AS_CHAT]}, "message 2: role 'user' out of order"),
    "late system": ({"messages": [*AS_CHAT, CHAT[0]]}, "message 3: role 'system' out of order"),
    "empty turn": (
        {"messages": [AS_CHAT[0], {"role": "assistant", "content": ""}]},
        "message 2: field 'content' is empty",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: field 'content' is missing"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}]},
        "message 1: field 'content' holds a part of type 'image'; only text can be learnt",
    ),
}


class TestLoading:
    def test_three_forms_of_row(self, tmp_path):
        rows = [ALPACA, {"messages": AS_CHAT}, {"prompt": "Add.\n\n1 and 2", "completion": "3"}]
        loaded = load_rows(write(tmp_path / "rows.jsonl", *rows))
        assert loaded.rows == [AS_CHAT] * 3
        assert loaded.notes == []

    @pytest.mark.parametrize("no_input", [{}, {"input": ""}, {"input": None}], ids=["missing", "empty", "null"])
    def test_alpaca_without_input(self, tmp_path, no_input):
        row = {"instruction": "Say hi.", "output": "hi", **no_input}
        assert load_rows(write(tmp_path / "a.jsonl", row)).rows[0][0]["content"] == "Say hi."

    def test_json_list(self, tmp_path):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([ALPACA, ALPACA], indent=2))
        assert load_rows(path).rows == [AS_CHAT] * 2

    def test_byte_order_mark_crlf_blank_lines_and_line_separators_in_strings(self, tmp_path):
        row = {"prompt": "a\u2028b\x85c", "completion": "é"}
        text = "\n\r\n" + json.dumps(row, ensure_ascii=False) + "\r\n   \r\n" + json.dumps(row)
        (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
        chat = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "é"}]
        assert load_rows(tmp_path / "rows.jsonl").rows == [chat, chat]

    def test_chat_keeps_system_and_every_turn(self, tmp_path):
        assert load_rows(write(tmp_path / "c.jsonl", {"messages": CHAT})).rows == [CHAT]

    def test_empty_system_message_is_kept(self, tmp_path):
        chat = [{"role": "system", "content": ""}, *AS_CHAT]
        assert load_rows(write(tmp_path / "c.jsonl", {"messages": chat})).rows == [chat]

    def test_unread_columns_are_announced(self, tmp_path):
        loaded = load_rows(write(tmp_path / "a.jsonl", {**ALPACA, "text": "x"}, {**ALPACA, "id": 7}))
        assert loaded.notes == ["ignored columns: id, text"]
        messages = [{**AS_CHAT[0], "name": "Ann", "weight": None}, {**AS_CHAT[1], "tool_calls": []}]
        loaded = load_rows(write(tmp_path / "m.jsonl", {"messages": messages, "source": "x"}))
        assert loaded.rows == [AS_CHAT]
        assert loaded.notes == ["ignored columns: messages.name, source"]

    @pytest.mark.parametrize("row, reason", BAD_ROWS.values(), ids=BAD_ROWS)
    def test_bad_row_is_named_and_can_be_skipped(self, tmp_path, row, reason):
        path = write(tmp_path / "rows.jsonl", ALPACA, "", row, ALPACA)
        with pytest.raises(DataError) as error:
            load_rows(path)
        assert str(error.value).startswith(f"{path}:3: {reason}")
        assert "\n" not in str(error.value)
        loaded = load_rows(path, skip_bad_rows=True)
        assert loaded.rows == [AS_CHAT] * 2
        assert loaded.notes[0] == f"bad rows skipped: 1 of 3, the first: {error.value}"

    def test_bad_row_of_a_list_is_named_by_line_and_number(self, tmp_path):
        path = tmp_path / "rows.json"
        path.write_text('[\n {"prompt": "a", "completion": "b"},\n\n {"prompt": "a"},\n 7]\n')
        with pytest.raises(DataError, match=r"rows\.json:4: row 2: field 'completion' is missing"):
            load_rows(path)
        (note,) = load_rows(path, skip_bad_rows=True).notes
        assert note.removeprefix("bad rows skipped: 2 of 3, the first: ") == (
            f"{path}:4: row 2: field 'completion' is missing; {path}:5: row 3: a row must be a JSON object, got int"
        )

    @pytest.mark.parametrize(
        "text, reason",
        {
            "unclosed": ('[{"prompt": "a", "completion": "b"}', "1: row 1: not valid JSON: expected ',' or ']'"),
            "no comma": (
                '[{"prompt": "a", "completion": "b"}\n{"prompt": "a"}]',
                "1: row 1: not valid JSON: expected ',' or ']'",
            ),
            "dangling": ('[{"prompt": "a", "completion": "b"},\n]', "2: row 2: not valid JSON: Expecting value"),
            "broken": ('[\n{"prompt": ]', "2: row 1: not valid JSON: Expecting value"),
            "only open": ("[", "1: row 1: not valid JSON: Expecting value"),
            "more": ('[{"prompt": "a", "completion": "b"}] []', " not valid JSON: text after the end of the list"),
        }.values(),
    )
    def test_broken_list_is_never_skipped(self, tmp_path, text, reason):
        path = tmp_path / "rows.json"
        path.write_text(text)
        for skip_bad_rows in (False, True):
            with pytest.raises(DataError) as error:
                load_rows(path, skip_bad_rows)
            assert str(error.value).startswith(f"{path}:{reason}")

    @pytest.mark.parametrize("text", ["", "\n \n", "[]", "[ \n ]", "\ufeff"])
    def test_empty_file(self, tmp_path, text):
        path = tmp_path / "rows.jsonl"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows"):
            load_rows(path)

    def test_no_usable_row(self, tmp_path):
        path = write(tmp_path / "rows.jsonl", {}, {})
        with pytest.raises(DataError, match=r"rows\.jsonl: no usable row among 2; .*rows\.jsonl:1: unknown columns"):
            load_rows(path, skip_bad_rows=True)

    def test_unreadable(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file"):
            load_rows(tmp_path / "none.jsonl")
        with pytest.raises(DataError, match="cannot be read"):
            load_rows(tmp_path)
        (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a",\n"completion": "\xe9"}')
        with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
            load_rows(tmp_path / "latin.jsonl")


def said(*texts, system=None):
    """A chat of these texts, user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


CALLED = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "dim", "arguments": {"to": 4}}}]},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "a"},
]  # fmt: skip
FORMS = {
    "sharegpt": ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, said("u", "a")),
    "its names, with a system": (
        {"conversations": [{"from": "user", "value": "u"}, {"from": "chatgpt", "value": "a"}], "system": "s"},
        said("u", "a", system="s")),
    "its calls": (
        {"conversations": [{"from": "human", "value": "u"},
                           {"from": "function_call", "value": '{"name": "dim", "arguments": {"to": 4}}'},
                           {"from": "observation", "value": "ok"}, {"from": "gpt", "value": "a"}]}, CALLED),
    "from and value in messages": (
        {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, said("u", "a")),
    "messages as text": ({"messages": json.dumps(said("u", "a"))}, said("u", "a")),
    "developer": ({"messages": [{"role": "developer", "content": "s"}, *said("u", "a")]}, said("u", "a", system="s")),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]},
                      {"role": "assistant", "content": "a"}]}, said("uv", "a")),
    "weights": (
        {"messages": [*said("u", "a"), {"role": "user", "content": "v"},
                      {"role": "assistant", "content": "b", "weight": 0}]},
        [*said("u", "a", "v"), {"role": "assistant", "content": "b", "weight": 0}]),
    "reasoning": (
        {"messages": [said("u")[0], {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
        [said("u")[0], {"role": "assistant", "content": "a", "reasoning_content": "r"}]),
    "alpaca with all it has": (
        {"instruction": "u", "input": "i", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
        said("q1", "a1", "q2", "a2", "u\n\ni", "a", system="s")),
    "history as text": (
        {"instruction": "u", "output": "a", "history": '[["q", "b"]]'}, said("q", "b", "u", "a")),
    "white space for nothing": (
        {"instruction": "u", "input": " ", "output": "a", "system": "\n", "history": "null"}, said("u", "a")),
    "calls as OpenAI wrote them first": (
        {"messages": [said("u")[0], {"role": "assistant", "content": None, "function_call": {
            "name": "dim", "arguments": '{"to": 4}'}}, {"role": "function", "content": "ok"}, CALLED[3]]}, CALLED),
    "a result of one empty line": (
        {"messages": [*CALLED[:2], {"role": "tool", "content": "\n"}, CALLED[3]]},
        [*CALLED[:2], {"role": "tool", "content": ""}, CALLED[3]]),
    "an input alone": ({"instruction": "", "input": "i", "output": "a"}, said("i", "a")),
    "messages to complete": (
        {"prompt": said("u", "a", "v"), "completion": [{"role": "assistant", "content": "b"}], "label": True},
        said("u", "a", "v", "b")),
    "a system beside a prompt": ({"prompt": "u", "completion": "a", "system": "s"}, said("u", "a", system="s")),
}  # fmt: skip


@pytest.mark.parametrize("row, chat", FORMS.values(), ids=FORMS)
def test_forms_of_rows(tmp_path, row, chat):
    loaded = load_rows(write(tmp_path / "rows.jsonl", row))
    assert loaded.rows == [chat] and loaded.notes == []


def test_preferences_that_are_null_are_none(tmp_path):
    """A table holds the union of all columns."""
    row = {"prompt": "u", "completion": "a", "chosen": None, "rejected": None}
    assert load_rows(write(tmp_path / "rows.jsonl", row)).rows == [said("u", "a")]


def test_columns_by_other_names(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "u", "answer": "a", "prompt": "another", "id": 1})
    loaded = load_rows(path, columns={"prompt": "question", "completion": "answer"})
    assert loaded.rows == [said("u", "a")] and loaded.notes == ["ignored columns: id, prompt"]
    with pytest.raises(DataError, match="field 'reply' is missing, which --columns takes for completion"):
        load_rows(path, columns={"prompt": "question", "completion": "reply"})
    for text in ("prompt", "prompt= ", "prompt=question,prompt=answer"):
        with pytest.raises(ValueError, match="--columns must be of the form prompt=NAME,completion=NAME"):
            column_names(text)


def test_what_is_not_to_be_learnt_is_left_out_and_counted(tmp_path):
    unwanted = {"messages": [said("u")[0], {"role": "assistant", "content": "a", "weight": 0}]}
    rows = [{"prompt": "u", "completion": "a", "label": wanted} for wanted in (True, False, "spam")]
    loaded = load_rows(write(tmp_path / "rows.jsonl", *rows, unwanted))
    assert loaded.rows == [said("u", "a")] * 2
    assert loaded.notes == ["ignored columns: label",
                            "rows left out, as their label is false or their answers have weight 0: 2"]  # fmt: skip


def test_the_last_answer_alone_decides_where_it_alone_is_learnt(tmp_path):
    rows = [{"messages": [*said("u", "a", "v"), {"role": "assistant", "content": "b", "weight": weight}]}
            for weight in (0, 1)]  # fmt: skip
    loaded = load_rows(write(tmp_path / "rows.jsonl", *rows), train_on="last")
    assert len(loaded.rows) == 1 and loaded.notes[-1].endswith("weight 0: 1")
    assert len(load_rows(tmp_path / "rows.jsonl").rows) == 2


@pytest.mark.parametrize("row, reason", {
    "a key twice in arguments": (
        {"conversations": [{"from": "human", "value": "u"},
                           {"from": "function_call", "value": '{"name": "f", "arguments": [{"a": 1, "a": 2}]}'}]},
        "function_call is ambiguous: the key 'a' stands twice"),
    "a key twice in a list of lists": ('{"prompt": "u", "completion": "a", "x": [[{"a": 1, "a": 2}]]}',
                                       "the key 'a' stands twice in an object"),
    "a key twice in messages": ({"messages": '[{"role": "user", "content": "u", "content": "v"}]'}, "stands twice"),
    "thousands of digits": ('{"prompt": "u", "completion": "a", "id": %s}' % ("9" * 5000), "Exceeds the limit"),
    "weight": ({"messages": [said("u")[0], {**said("u", "a")[1], "weight": 0.5}]}, "field 'weight' must be 0 or 1"),
    "history": ({"instruction": "u", "output": "a", "history": ["q", "a"]}, "a list of [request, answer] pairs"),
    "a number of histories": ({"instruction": "u", "output": "a", "history": 1}, "a list of [request, answer] pairs"),
    "half a character in a call": (
        {"messages": [*said("u"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"\ud83d": 1}}]}]},
        "the JSON of messages and tools holds half of a surrogate pair"),
    "a mark in tools": ({"messages": said("u", "a"), "tools": [{"name": "f", "description": "\ufdd1"}]},
                        "holds the code point 0xfdd1"),
    "call": ({"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": "dim()"}]},
             "message 2: field 'value' of a function_call is not valid JSON"),
    "two systems": ({"messages": said("u", "a", system="s"), "system": "t"}, "message 2: role 'system' out of order"),
    "preferences": ({"chosen": "a", "rejected": "b"}, "a preference row"),
    "two texts": ({"conversations": [*said("u"), {"from": "gpt", "value": "a", "content": "b"}]},
                  "message 2: fields 'content' and 'value' both say something"),
    "pictures": ({"prompt": "u", "completion": "a", "images": ["x.png"]}, "field 'images' is not empty"),
}.values())  # fmt: skip
def test_rows_that_would_lose_their_meaning_are_refused(tmp_path, row, reason):
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path / "rows.jsonl", row))
    assert reason in str(error.value)
