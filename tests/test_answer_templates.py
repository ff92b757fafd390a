"""Chat templates as models bring them: thinking shown, opened or stripped, marks, dates, tools. What is learnt?"""

import datetime
import json

import pytest
from test_data import CHATML, MARKED, learnt_texts, make_tokenizer

from handtuned.training import data
from handtuned.training.data import DataError
from handtuned.training.formats import Chat

TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPENS = GENERATE.replace("assistant\n", "assistant\n<think>\n")
EMPTY = "{{ '<think>\n\n</think>\n\n' }}"
BODY = "{{ m.content + '<|im_end|>\n' }}"
LAST_IS_EMPTY = "{% if loop.last and m.role == 'assistant' %}" + EMPTY + "{% endif %}"
# Thinking stands in the answer's own text, and only the last turn shows it.
STRIPS = (
    "{% set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' and not loop.last "
    "else m.content %}{{ text + '<|im_end|>\n' }}"
)
REASONS = (
    "{% if m.reasoning_content is defined and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}"
)
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
)


def chat_of(*inner, generate=GENERATE, tools=False):
    shown = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" if tools else ""
    return shown + "{% for m in messages %}" + "".join(inner) + "{% endfor %}" + generate


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


END = "<|im_end|>"
TWO = [user("q1"), answer("one"), user("q2"), answer("two")]
THOUGHT = [user("q1"), answer("<think>\nhm\n</think>\n\none"), user("q2"), answer("<think>\nso\n</think>\n\ntwo")]
KINDS = {
    "no thinking": (chat_of(TURN, BODY), TWO, ["one" + END, "two" + END]),
    "the prompt opens it, no turn shows it": (chat_of(TURN, BODY, generate=OPENS), TWO, ["one" + END, "two" + END]),
    "the prompt opens it, the answer goes on": (
        chat_of(TURN, BODY, generate=OPENS), THOUGHT, [turn["content"] + END for turn in THOUGHT[1::2]]),
    "the last turn shows that there is none": (
        chat_of(TURN, LAST_IS_EMPTY, BODY), TWO, ["one" + END, "<think>\n\n</think>\n\ntwo" + END]),
    "so it does, and the prompt opens it": (
        chat_of(TURN, LAST_IS_EMPTY, BODY, generate=OPENS), TWO, ["one" + END, "\n</think>\n\ntwo" + END]),
    "earlier thinking is stripped": (
        chat_of(TURN, STRIPS), THOUGHT, ["one" + END, "<think>\nso\n</think>\n\ntwo" + END]),
    "so it is, and the prompt opens it": (
        chat_of(TURN, STRIPS, generate=OPENS), THOUGHT, ["one" + END, "<think>\nso\n</think>\n\ntwo" + END]),
    "reasoning of its own field": (
        chat_of(TURN, REASONS, BODY), [user("q"), answer("a", reasoning_content="why")],
        ["<think>\nwhy\n</think>\n\na" + END]),
    "the answer begins as the prompt's opening does": (
        chat_of(TURN, BODY, generate=OPENS), [user("q"), answer("<thing>")], ["<thing>" + END]),
    "marks": (MARKED, TWO, ["one" + END, "two" + END]),
    "marks around the end of line": (
        MARKED.replace("'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"), TWO,
        ["one" + END, "two" + END]),
    "no end but the next turn's beginning": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}" + GENERATE, TWO,
        ["one", "two" + END]),
}  # fmt: skip


@pytest.mark.parametrize("template, chat, learnt", KINDS.values(), ids=KINDS)
def test_what_is_learnt(template, chat, learnt):
    tokenizer = make_tokenizer(template)
    example = data.encode(chat, tokenizer)
    assert learnt_texts(example, tokenizer) == learnt
    text = tokenizer.decode(example.input_ids.tolist())
    assert text.removesuffix(END) == tokenizer.apply_chat_template(chat, tokenize=False).removesuffix(END)
    prompt = data.encode_prompt(chat[:-1], tokenizer)
    assert example.follows_prompt == (example.input_ids[: len(prompt)].tolist() == prompt)
    assert learnt_texts(data.encode(chat, tokenizer, train_on="last"), tokenizer) == learnt[-1:]


def test_every_answer_follows_the_prompt_that_generation_builds():
    """Whatever white space is around: a token that held both sides of the border could not be written by the model."""
    forms = (CHATML, None, chat_of(TURN, LAST_IS_EMPTY, BODY, generate=OPENS),
             "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' if "
             "add_generation_prompt else '' }}")  # fmt: skip
    for template in forms:
        tokenizer = make_tokenizer(template)
        for text in ("a", " a", "\na", "\n\n a", "  a  ", "a\n", "\n"):
            for question in ("q", "q ", "q\n"):
                chat = [user("Done."), answer(text + "."), user(question), answer(text + ".")]
                example = data.encode(chat, tokenizer)
                assert example.follows_prompt, (template, text, question)
                assert learnt_texts(example, tokenizer)[-1].removesuffix(END).rstrip("\n").endswith(text + ".")


def test_what_a_model_writes_is_what_the_row_said():
    """Its learnt tokens, decoded as `generate` does: with the row's white space and without the template's."""
    instruct = "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}" + (
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}")  # fmt: skip
    for template in (CHATML, None, instruct):
        tokenizer = make_tokenizer(template)
        for text in ("Done.", " Done.", "\nend", "  end \n"):
            example = data.encode([user("q"), answer(text)], tokenizer)
            ids = example.input_ids[example.labels != data.IGNORE_INDEX].tolist()
            assert data.decode_answer(ids, [user("q")], tokenizer) == text


def test_what_the_template_writes_before_an_answer_is_not_shown():
    """Empty thinking, a part of it, a channel; thinking of the model's own is."""
    channel = "{{ '<|endoftext|>final<|im_start|>' if m.role == 'assistant' }}"
    for template in (chat_of(TURN, LAST_IS_EMPTY, BODY), chat_of(TURN, LAST_IS_EMPTY, BODY, generate=OPENS),
                     chat_of(TURN, channel, BODY)):  # fmt: skip
        tokenizer = make_tokenizer(template)
        for text in ("Done.", "final", "<think>\nhm\n</think>\n\nDone."):
            example = data.encode([user("q"), answer(text)], tokenizer)
            ids = example.input_ids[example.labels != data.IGNORE_INDEX].tolist()
            assert data.decode_answer(ids, [user("q")], tokenizer) == text
        thought = tokenizer("<think>\nhm\n</think>\n\nDone.<|im_end|>")["input_ids"]
        assert data.decode_answer(thought, [user("q")], tokenizer) == "<think>\nhm\n</think>\n\nDone."


def test_a_tokenizer_that_cannot_part_prompt_and_answer_is_told():
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {"<unk>": 0, "▁q": 1, "▁a:b": 2, "▁a:": 3, "▁b": 4, "</s>": 5}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    template = "{% for m in messages %}{{ m.content if m.role == 'user' else ' a:' + m.content }}{% endfor %}" + (
        "{{ ' a:' if add_generation_prompt else '' }}")  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", chat_template=template)  # fmt: skip
    encoded = data.encode_rows([[user("q"), answer("b")]], tokenizer, 99)
    assert [note for note in encoded.notes if "does not follow the prompt" in note and note.endswith(": 1")]
    assert learnt_texts(encoded.examples[0], tokenizer) == ["</s>"], "a token that holds both sides is not learnt"


TOOLS = [{"type": "function", "function": {"name": "dim", "description": "", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "dim", "arguments": {"to": 4}}}
ROUND = [user("dim"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "ok"}, answer("Done.")]


def test_a_tool_round_with_thinking_in_the_last_turn_alone():
    template = chat_of(TURN, LAST_IS_EMPTY, "{{ m.content }}", CALLS, "{{ '<|im_end|>\n' }}", tools=True)
    tokenizer = make_tokenizer(template)
    example = data.encode(Chat(ROUND, TOOLS), tokenizer)
    assert learnt_texts(example, tokenizer) == ['<call>dim{"to": 4}' + END, "<think>\n\n</think>\n\nDone." + END]


@pytest.mark.parametrize("write", ["c.function.name + c.function.arguments", "c.function.arguments", "c | tojson"])
def test_arguments_are_given_as_the_template_wants_them(write):
    """Joined to text, shown as they are (an object would come out as Python writes it), or made JSON."""
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ " + write + " }}{% endfor %}"
    tokenizer = make_tokenizer(chat_of(TURN, "{{ m.content }}", calls, "{{ '<|im_end|>\n' }}", tools=True))
    example = data.encode(Chat(ROUND[:2], TOOLS), tokenizer)
    (learnt,) = learnt_texts(example, tokenizer)
    assert json.dumps(CALL["function"]["arguments"]) in learnt and learnt.endswith(END)


def test_a_result_that_shows_arguments_as_python_does_changes_nothing():
    for template in ("{{ m.content }}" + CALLS, "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"):
        tokenizer = talking(template)
        result = ROUND[2] | {"content": f"dim({CALL['function']['arguments']}) ok"}
        learnt = [learnt_texts(data.encode(Chat([*ROUND[:2], said, ROUND[3]], TOOLS), tokenizer), tokenizer)
                  for said in (ROUND[2], result)]  # fmt: skip
        assert learnt[0] == learnt[1]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_one_set_of_guards(template):
    """Tools or calls that are not shown, and what a template raises, of whatever class, are errors of the row."""
    with pytest.raises(DataError, match="does not show"):
        data.encode(Chat(ROUND[:2], TOOLS), make_tokenizer(template))
    for raises in ("raise_exception('no')", "messages[0].content + 1", "messages[9].content.x", "1 // 0"):
        with pytest.raises(DataError, match="the chat template refuses this chat") as error:
            data.encode(TWO, make_tokenizer("{{ " + raises + " }}" + template))
        assert "\n" not in str(error.value)


OTHER = CALL | {"function": CALL["function"] | {"arguments": {"to": 5}}}
TALK = [user("dim"), answer("I dim.", tool_calls=[CALL, OTHER]), {"role": "tool", "content": "ok"}, answer("Done.")]


def talking(shown):
    return make_tokenizer(chat_of(TURN, shown, "{{ '<|im_end|>\n' }}", tools=True))


@pytest.mark.parametrize("shown, hidden", [
    ("{{ m.content if not m.tool_calls }}" + CALLS, "message 2: .* does not show it beside its tool calls"),
    ("{{ m.content }}" + CALLS.replace("{{ c.function.arguments | tojson }}", ""), "message 2: .* the arguments of"),
    ("{{ m.content }}" + CALLS.replace("{% endfor", "{% break %}{% endfor"), "message 2: .* its tool calls"),
    ("{{ m.content }}" + CALLS.replace("c.function.arguments", "m.tool_calls[0].function.arguments"),
     "message 2: .* the arguments of"),
], ids=["text", "arguments", "the second call", "the second's arguments"])  # fmt: skip
def test_nothing_of_an_answer_with_calls_is_hidden(shown, hidden):
    with pytest.raises(DataError, match=hidden):
        data.encode(Chat(TALK, TOOLS), talking(shown))


def test_text_and_calls_of_one_answer_are_learnt_together():
    tokenizer = talking("{{ m.content }}" + CALLS)
    shown = 'I dim.<call>dim{"to": 4}<call>dim{"to": 5}' + END
    assert learnt_texts(data.encode(Chat(TALK, TOOLS), tokenizer), tokenizer) == [shown, "Done." + END]


def test_what_a_template_opens_behind_every_chat_is_not_learnt():
    """Nor the beginning of a header that follows at once, as in the first template of Llama 3."""
    always = CHATML.partition("{% if add_generation_prompt")[0] + "{{ '<|im_start|>assistant\n' }}"
    for template in (always, always.replace("<|im_end|>\n", "<|im_end|>")):
        tokenizer = make_tokenizer(template)
        assert learnt_texts(data.encode(TWO, tokenizer), tokenizer) == ["one" + END, "two" + END]
        assert data.end_of_turn(tokenizer) == tokenizer.eos_token_id
    twice = chat_of(TURN, "{{ m.content + '<|im_end|>' }}{{ '<|endoftext|>' if m.role == 'assistant' }}", generate="")
    for template in (twice, twice + GENERATE):  # both of two ends are learnt
        tokenizer = make_tokenizer(template)
        assert learnt_texts(data.encode(TWO[:2], tokenizer), tokenizer)[0].endswith("one<|im_end|><|endoftext|>")


def test_the_way_out_is_named_and_works():
    """A template that rewrites an earlier answer beyond recognition."""
    shouts = chat_of(TURN, "{{ (m.content | length if not loop.last else m.content) ~ '<|im_end|>\n' }}")
    tokenizer = make_tokenizer(shouts)
    with pytest.raises(DataError, match="--train-on last learns the last answer alone"):
        data.encode(TWO, tokenizer)
    tokenizer = make_tokenizer(shouts.replace("if not loop.last", "if m.role == 'assistant' and not loop.last"))
    assert learnt_texts(data.encode(TWO, tokenizer, train_on="last"), tokenizer) == ["two" + END]


def test_turns_before_the_last_are_shown_though_only_the_last_is_learnt():
    tokenizer = make_tokenizer("{% set messages = messages[-2:] %}" + CHATML)
    for train_on in ("last", "answers", "all"):
        with pytest.raises(DataError, match=r"message [12]: the chat template"):
            data.encode(TWO, tokenizer, train_on=train_on)


def test_weights_and_what_is_learnt():
    tokenizer = make_tokenizer(CHATML)
    chat = [user("q1"), answer("one", weight=0), user("q2"), answer("two")]
    assert learnt_texts(data.encode(chat, tokenizer), tokenizer) == ["two" + END]
    assert "one" not in "".join(learnt_texts(data.encode(chat, tokenizer, train_on="all"), tokenizer))
    every = data.encode(TWO, tokenizer, train_on="all")
    assert every.answer_tokens == len(every.input_ids) - 1
    assert every.input_ids.tolist() == tokenizer.apply_chat_template(TWO)["input_ids"]


def test_reasoning_that_is_not_shown_is_told():
    drops = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    for template, row in ((CHATML, answer("a", reasoning_content="why")), (drops, answer("<think>why</think>a"))):
        (note,) = data.encode_rows([[user("q"), row], TWO], make_tokenizer(template), 999).notes
        assert note == "rows with reasoning that the chat template does not show: 1"


def test_what_is_learnt_does_not_depend_on_the_clock(monkeypatch):
    import transformers.utils.chat_template_utils as utils

    tokenizer, found = make_tokenizer("{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}" + CHATML), set()
    for day in (1, 2):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return datetime.datetime(2031, 1, day, tzinfo=tz)

        monkeypatch.setattr(utils, "datetime", Day)
        found.add(data.digest([data.encode(TWO, tokenizer)]))
        assert data.encode(TWO, tokenizer).follows_prompt
    assert len(found) == 1


NO_THOUGHT = "{% if m.role == 'assistant' %}{{ '</think>' }}{% endif %}"  # as DeepSeek V3.1 and GLM 4.7 write it
SEVERAL_ENDS = (  # as Command R7B: an end of the text and of the turn, and the next answer is always begun
    "{% for m in messages %}{{ '<s>' + m.role + '<a>' + m.content }}"
    "{{ '<e>' if m.role == 'assistant' }}<|im_end|>{% endfor %}<s>assistant<a><e>"
)


def with_tokens(template):
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<a>", "<e>"]})
    return tokenizer


@pytest.mark.parametrize("template, chat, learnt", [
    (chat_of(TURN, NO_THOUGHT, BODY, generate=OPENS), TWO, ["</think>one" + END, "</think>two" + END]),
    (chat_of(TURN, REASONS, BODY, generate=OPENS), [user("q"), answer("a", reasoning_content="why")],
     ["<think>\nwhy\n</think>\n\na" + END]),
    (SEVERAL_ENDS, TWO, ["one<e>" + END, "two<e>" + END]),
    ("{% for m in messages %}{{ m.role + '<a>' + m.content }}{{ '<e>end<s>' }}{% endfor %}"
     "{{ 'assistant<a>' if add_generation_prompt }}", TWO, ["one<e>end<s>", "two<e>end<s>"]),
    ("{% for m in messages %}{{ '<s>' + m.role + '<a>' + m.content + '<|im_end|>' }}{% endfor %}<s>Be brief.<|im_end|>"
     "{{ '<s>assistant<a>' if add_generation_prompt }}", TWO[:2], ["one" + END]),
], ids=["a closing tag", "reasoning behind a prompt that opens it", "always begun", "text in the end", "a reminder"])
def test_prompt_and_answer_part_between_whole_tokens(template, chat, learnt):  # fmt: skip
    """A prompt ends in no half tag, where `generate` ends it; what a template writes behind every chat is no answer."""
    tokenizer = with_tokens(template)
    example = data.encode(chat, tokenizer)
    assert learnt_texts(example, tokenizer) == learnt
    prompt = data.encode_prompt(chat[:-1], tokenizer)
    if "Be brief" not in template:  # the reminder stands in the prompt alone, which is reported
        assert example.follows_prompt and example.input_ids[: len(prompt)].tolist() == prompt
        first = (example.labels != data.IGNORE_INDEX).nonzero()[0]
        assert len(chat) > 2 or first[0] == len(prompt)


def test_texts_as_parts_for_templates_of_models_that_see():
    parts = "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    tokenizer = make_tokenizer(chat_of(TURN, parts, "{{ '<|im_end|>\n' }}"))
    assert learnt_texts(data.encode(TWO, tokenizer), tokenizer) == ["one" + END, "two" + END]
    assert tokenizer.decode(data.encode_prompt(TWO[:1], tokenizer)).endswith("q1<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_asks_for_tools_shows_them():
    tokenizer = make_tokenizer("{% for t in tools %}{{ t | tojson }}{% endfor %}" + chat_of(TURN, BODY))
    assert learnt_texts(data.encode(Chat(TWO, TOOLS), tokenizer), tokenizer) == ["one" + END, "two" + END]
