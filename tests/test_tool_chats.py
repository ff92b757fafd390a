"""Chats with tools: kept, shown by the model's template, calls learnt, results not."""

import json

import pytest
from test_data import CHATML, learnt_texts, make_tokenizer
from test_training_formats import write

from handtuned.training import data
from handtuned.training.data import DataError
from handtuned.training.formats import Chat, as_text, load_rows

TOOLS = [{"type": "function", "function": {"name": "dim", "description": "Dim a lamp.", "parameters": {}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "dim", "arguments": {"to": 4, "where": "hall é"}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Dim it."},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": '{"done": true}', "tool_call_id": "c1", "name": "dim"},
    {"role": "tool", "content": "ok", "tool_call_id": "c1"},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "On it.", "tool_calls": [CALL]},
]
# The way of Qwen2.5 and Hermes: tools in the system turn, calls in tags, results in a user turn that they share.
TAGS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}{{ c.function | tojson }}{{ '\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The way of Mistral: calls stand in place of the words, and only the last turn's tools are shown.
LIST = (
    "{% if tools %}{{ '[TOOLS]' + tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{{ '[CALLS]' + m.tool_calls | tojson + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}"
)


def encoded(template, messages=MESSAGES, tools=TOOLS):
    tokenizer = make_tokenizer(template)
    example = data.encode(Chat(messages, tools), tokenizer)
    assert example.input_ids.tolist() == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    return learnt_texts(example, tokenizer)


def test_calls_and_answers_are_learnt_results_are_not():
    call = "\n<tool_call>\n" + json.dumps(CALL["function"], ensure_ascii=False) + "\n</tool_call>"
    assert encoded(TAGS) == [2 * call + "<|im_end|>", "Done.<|im_end|>", "On it." + call + "<|im_end|>"]
    one, two = ("[CALLS]" + json.dumps(calls, ensure_ascii=False) + "<|im_end|>" for calls in ([CALL], [CALL] * 2))
    assert encoded(LIST, [*MESSAGES[:-1], MESSAGES[-1] | {"content": ""}]) == [two, "Done.<|im_end|>", one]


NAMES = "(messages[:loop.index0] | selectattr('tool_calls', 'defined') | list | last).tool_calls[0].function.name"


def test_a_result_that_names_its_call_is_not_learnt():
    """As Gemma 4 and gpt-oss write it; nor does its name stand for a second call, which is not shown."""
    names = TAGS.replace("'\n<tool_response>\n' +", "'\n<tool ' + " + NAMES + " + '>\n' +")
    assert encoded(names) == encoded(TAGS)
    once = names.replace("{{ '\n</tool_call>' }}{% endfor", "{{ '\n</tool_call>' }}{% break %}{% endfor")
    with pytest.raises(DataError, match="message 3: the chat template does not show its tool calls"):
        encoded(once)


def test_a_last_result_that_is_closed_otherwise_is_not_learnt():
    """As Hermes writes it: an end of line behind a result, unless it is the last message."""
    hermes = TAGS.replace("'\n</tool_response>' }}", "'\n</tool_response>' + ('' if loop.last else '\n') }}")
    assert encoded(hermes) == encoded(TAGS)
    tokenizer, chat = make_tokenizer(hermes), Chat(MESSAGES[:6], TOOLS)
    assert not data.encode(chat, tokenizer).follows_prompt
    prompt = tokenizer.apply_chat_template(chat[:-1], tools=TOOLS, add_generation_prompt=True)["input_ids"]
    assert data.encode_prompt(chat[:-1], tokenizer) == prompt


def test_rows_keep_tools_and_what_belongs_to_calls(tmp_path):
    raw_call = {**CALL, "function": {"name": "dim", "arguments": json.dumps(CALL["function"]["arguments"])}}
    raw = [{**m, "tool_calls": [raw_call] * len(m["tool_calls"])} if "tool_calls" in m else m for m in MESSAGES]
    raw[2] = {**raw[2], "content": None}
    bare = TOOLS[0]["function"]  # as in xLAM, and as OpenAI's Responses write it
    tools = [TOOLS, json.dumps(TOOLS), [bare], [{"type": "function"} | bare]]
    rows = [{"messages": raw, "tools": given} for given in tools]
    loaded = load_rows(write(tmp_path / "rows.jsonl", *rows))
    assert loaded.notes == []
    for chat in loaded.rows:
        assert chat == MESSAGES and chat.tools == TOOLS and chat[:-1].tools == TOOLS
    assert as_text(MESSAGES[-1]) == 'On it.\n{"name": "dim", "arguments": {"to": 4, "where": "hall é"}}'


def test_the_prompt_of_an_answer_shows_the_tools():
    tokenizer = make_tokenizer(TAGS)
    text = tokenizer.decode(data.encode_prompt(Chat(MESSAGES, TOOLS)[:-1], tokenizer), skip_special_tokens=False)
    assert '"description": "Dim a lamp."' in text and text.endswith("Again.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([MESSAGES[1], MESSAGES[5]], TOOLS, "does not show the tools"),
        (MESSAGES[1:3], None, "message 2: the chat template does not show its tool calls"),
        (MESSAGES[1:6], None, "message 2: "),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(messages, tools, message):
    for template in (CHATML, None):
        with pytest.raises(DataError, match=message):
            data.encode(Chat(messages, tools), make_tokenizer(template))


def test_a_template_that_leaves_results_out_is_refused():
    mute = TAGS.replace("+ m.content + '\n</tool_response>'", "+ '\n</tool_response>'")
    with pytest.raises(DataError, match="message 4: the chat template does not show the tool's result"):
        encoded(mute)


def test_a_call_may_stand_in_the_text(tmp_path):
    """As in the sets of Hermes, ToolACE and Glaive."""
    said = '<tool_call>\n{"name": "dim"}\n</tool_call>'
    turns = [("human", "Dim it."), ("gpt", said), ("tool", "ok"), ("gpt", "Done.")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    (chat,) = load_rows(write(tmp_path / "rows.jsonl", row)).rows
    assert encoded(TAGS, chat, None) == [said + "<|im_end|>", "Done.<|im_end|>"]


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_what_may_be_empty(tmp_path, arguments):
    """Agents write calls beside white space and without arguments, commands print nothing."""
    call = {"function": {"name": "dim", "arguments": arguments}}
    row = [MESSAGES[1], {"role": "assistant", "content": "\n\n", "reasoning_content": "\n", "tool_calls": [call]},
           {"role": "tool", "content": ""}, MESSAGES[5]]  # fmt: skip
    (chat,) = load_rows(write(tmp_path / "rows.jsonl", {"messages": row})).rows
    bare = [row[0], row[1] | {"content": [], "reasoning_content": []}, *row[2:]]
    assert load_rows(write(tmp_path / "bare.jsonl", {"messages": bare})).rows == [chat]
    read = {"type": "function", "function": {"name": "dim", "arguments": {}}}
    assert chat == [row[0], {"role": "assistant", "content": "", "tool_calls": [read]}, *row[2:]]
    said = '\n<tool_call>\n{"name": "dim", "arguments": {}}\n</tool_call><|im_end|>'
    assert encoded(TAGS, chat, None) == [said, "Done.<|im_end|>"]


def calling(call):
    """A row that ends with this call."""
    return {"messages": [MESSAGES[1], {**MESSAGES[2], "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    {
        "no list": ({"messages": MESSAGES[1:3], "tools": 3}, "field 'tools' must be a list of function schemas"),
        "no name": ({"messages": MESSAGES[1:3], "tools": [{"function": {}}]}, "field 'tools' must be a list"),
        "broken text": ({"messages": MESSAGES[1:3], "tools": "[{"}, "field 'tools' is not valid JSON"),
        "no call": (calling(3), "message 2: field 'tool_calls'"),
        "a user's call": ({"messages": [{**MESSAGES[1], "tool_calls": [CALL]}]}, "message 1: field 'tool_calls'"),
        "broken arguments": (
            calling({"name": "dim", "arguments": "{"}),
            "message 2: the arguments of dim are not valid JSON",
        ),
        "no arguments": (
            calling({"name": "dim", "parameters": {"to": 4}}),
            "message 2: the call of dim has 'parameters', expected 'arguments'",
        ),
        "other arguments": (
            calling({"name": "dim", "parameters": {"to": 4}, "arguments": None}),
            "message 2: the call of dim has 'parameters', expected 'arguments'",
        ),
        "NaN in text": (
            calling({"name": "dim", "arguments": '{"to": NaN}'}),
            "message 2: the arguments of dim are not valid JSON",
        ),
        "infinity": (
            calling({"name": "dim", "arguments": {"to": 1e999}}),
            "message 2: the arguments of dim are not valid JSON",
        ),
        "arguments no object": (
            calling({"name": "dim", "arguments": [4]}),
            "message 2: the arguments of dim must be a JSON object",
        ),
        "a result nobody asked for": ({"messages": [MESSAGES[1], MESSAGES[3]]}, "message 2: role 'tool' out of order"),
        "a result first": ({"messages": [MESSAGES[0], MESSAGES[3]]}, "message 2: role 'tool' out of order"),
        "ends with a result": ({"messages": MESSAGES[1:4]}, "the last message must be the assistant's answer"),
        "no result text": (
            {"messages": [*MESSAGES[1:3], {"role": "tool", "content": None}, MESSAGES[5]]},
            "message 3: field 'content' must be text",
        ),
    }.values(),
)
def test_bad_rows_are_named(tmp_path, row, reason):
    with pytest.raises(DataError) as error:
        load_rows(write(tmp_path / "rows.jsonl", row))
    assert reason in str(error.value) and "rows.jsonl:1: " in str(error.value)
