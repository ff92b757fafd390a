"""Chats → examples → batches."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model

from handtuned.training import data
from handtuned.training.data import IGNORE_INDEX, DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The answer stands after a space that only the answer writes, and is trimmed.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# An empty thought precedes the last answer only, as in models that think.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNENDED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Turn on the light."},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "And off again, é 😀?"},
    {"role": "assistant", "content": "end 😀"},
]


def make_tokenizer(chat_template=None, writes_bos=False):
    """A byte-level tokenizer with merges across spaces, whose padding is its end of turn, as in SmolLM2."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [message["content"] for message in CHAT] * 9 + ["user assistant: \n\n Done. end"] * 9, trainer
    )
    if writes_bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


def learnt_texts(example, tokenizer):
    """The text of each stretch of learnt tokens."""
    texts, run = [], []
    for token, label in zip([*example.input_ids.tolist(), 0], [*example.labels.tolist(), IGNORE_INDEX], strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return texts


AS_CHAT = [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]


class TestEncoding:
    @pytest.mark.parametrize(
        "template, learnt",
        {
            "chatml": (CHATML, ["Done.<|im_end|>", "end 😀<|im_end|>"]),
            "marked": (MARKED, ["Done.<|im_end|>", "end 😀<|im_end|>"]),
            "instruct": (INSTRUCT, [" Done. <|im_end|>", " end 😀 <|im_end|>"]),
            "thinking": (THINKING, ["Done.<|im_end|>", "<think>\n\n</think>\n\nend 😀<|im_end|>"]),
        }.values(),
        ids=["chatml", "marked", "instruct", "thinking"],
    )
    def test_only_answers_and_their_ends_are_learnt(self, template, learnt):
        tokenizer = make_tokenizer(template)
        example = data.encode(CHAT, tokenizer)
        assert learnt_texts(example, tokenizer) == learnt
        assert example.input_ids.tolist() == tokenizer.apply_chat_template(CHAT)["input_ids"]
        assert example.answer_tokens == (example.labels != IGNORE_INDEX).sum() > 0

    @pytest.mark.parametrize(
        "template", [CHATML, MARKED, INSTRUCT, None], ids=["chatml", "marked", "instruct", "plain"]
    )
    def test_what_is_learnt_follows_the_prompt_that_generation_uses(self, template):
        tokenizer = make_tokenizer(template)
        example = data.encode(CHAT, tokenizer)
        prompt = data.encode_prompt(CHAT[:-1], tokenizer)
        last = len(example.labels) - 1 - int(np.argmax((example.labels != IGNORE_INDEX)[::-1]))
        first = last - int(np.argmax((example.labels == IGNORE_INDEX)[: last + 1][::-1])) + 1
        assert example.input_ids[:first].tolist() == prompt
        assert example.input_ids[last] == tokenizer.eos_token_id

    def test_pain_19_the_end_of_the_answer_is_learnt_although_padding_has_its_id(self):
        tokenizer = make_tokenizer(CHATML)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        short, long = data.encode(AS_CHAT, tokenizer), data.encode(CHAT, tokenizer)
        batch = data.collate([short, long], tokenizer.pad_token_id)
        length = len(short.input_ids)
        end = int(np.flatnonzero(short.labels != IGNORE_INDEX)[-1])
        assert batch["labels"][0, end] == tokenizer.eos_token_id
        assert (batch["labels"][0, length:] == IGNORE_INDEX).all()
        assert (batch["input_ids"][0, length:] == tokenizer.pad_token_id).all()

    @pytest.mark.parametrize("answer", ["think", "i", "assistant", "<think>", " padded \n", "im_end", "user"])
    @pytest.mark.parametrize("template", [CHATML, THINKING, MARKED], ids=["chatml", "thinking", "marked"])
    def test_answer_that_also_occurs_in_the_template(self, template, answer):
        tokenizer = make_tokenizer(template)
        example = data.encode([CHAT[1], {"role": "assistant", "content": answer}], tokenizer)
        (learnt,) = learnt_texts(example, tokenizer)
        assert learnt == ("<think>\n\n</think>\n\n" if template == THINKING else "") + answer + "<|im_end|>"

    @pytest.mark.parametrize("writes_bos", [False, True])
    def test_plain_format_without_a_template(self, writes_bos):
        tokenizer = make_tokenizer(writes_bos=writes_bos)
        example = data.encode(CHAT, tokenizer)
        bos = "<|im_start|>" if writes_bos else ""
        assert tokenizer.decode(example.input_ids.tolist()) == (
            f"{bos}Be brief.\n\n### Instruction:\nTurn on the light.\n\n### Response:\nDone.<|im_end|>"
            "\n\n### Instruction:\nAnd off again, é 😀?\n\n### Response:\nend 😀<|im_end|>"
        )
        assert learnt_texts(example, tokenizer) == ["Done.<|im_end|>", "end 😀<|im_end|>"]

    def test_template_without_an_end_gets_one(self):
        tokenizer = make_tokenizer(UNENDED)
        example = data.encode(CHAT, tokenizer)
        assert learnt_texts(example, tokenizer) == ["Done.", "end 😀\n<|im_end|>"]
        text = tokenizer.apply_chat_template(CHAT, tokenize=False) + "<|im_end|>"
        assert tokenizer.decode(example.input_ids.tolist()) == text

    def test_pain_19_an_answer_that_ends_with_an_unknown_word_still_learns_to_end(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(make_model(tmp_path))
        chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 nonsense"}]
        assert learnt_texts(data.encode(chat, tokenizer), tokenizer) == ["w2 <unk> <|end|>"]

    def test_pain_19_the_end_of_a_turn_need_not_be_the_end_of_text(self):
        tokenizer = make_tokenizer(CHATML)
        tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
        assert data.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert data.end_of_turn(make_tokenizer("{{ raise_exception('no') }}")) is None

    @pytest.mark.parametrize("hidden, reason", {
        "assistant": "message 3: the chat template rewrites this chat, so its answer cannot be found; --train-on last",
        "user": "message 2: the chat template does not show it",
        "system": "message 1: the chat template does not show it; put it at the beginning of the user's message",
    }.items())  # fmt: skip
    def test_template_that_hides_messages_is_refused(self, hidden, reason):
        template = f"{{% for m in messages %}}{{% if m['role'] != '{hidden}' %}}{{{{ m['content'] }}}}{{% endif %}}"
        with pytest.raises(DataError, match=reason):
            data.encode(CHAT, make_tokenizer(template + "{% endfor %}"))

    def test_template_that_refuses_a_chat(self):
        template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
        tokenizer = make_tokenizer(template)
        with pytest.raises(DataError, match="refuses this chat: no system role"):
            data.encode(CHAT, tokenizer)
        with pytest.raises(DataError, match="row 2: the chat template refuses this chat"):
            data.encode_rows([AS_CHAT, CHAT], tokenizer, 100)

    def test_first_token_is_never_learnt(self):
        tokenizer = make_tokenizer(CHATML)
        for chat in (AS_CHAT, [{"role": "text", "content": "Done."}]):
            example = data.encode(chat, tokenizer, train_on="all")
            assert example.labels.tolist() == [IGNORE_INDEX, *example.input_ids[1:].tolist()]
        assert tokenizer.decode(example.input_ids.tolist()) == "Done.<|im_end|>"

    @pytest.mark.parametrize("bos", ["", "<|im_start|>"])
    def test_a_text_begins_once(self, bos):
        tokenizer = make_tokenizer(writes_bos=True)
        example = data.encode([{"role": "text", "content": f"{bos}Done."}], tokenizer, train_on="all")
        assert tokenizer.decode(example.input_ids.tolist()) == "<|im_start|>Done.<|im_end|>"

    def test_truncation_is_counted_and_announced(self):
        tokenizer = make_tokenizer(CHATML)
        full = data.encode(CHAT, tokenizer)
        cut = data.encode(CHAT, tokenizer, len(full.input_ids) - 3)
        assert cut.cut == 3
        assert cut.input_ids.tolist() == full.input_ids[:-3].tolist()
        assert cut.labels.tolist() == full.labels[:-3].tolist()

        first_answer = int(np.flatnonzero(full.labels != IGNORE_INDEX)[0])
        rows = [CHAT, AS_CHAT, [CHAT[1], CHAT[2]], [{"role": "user", "content": "a" * 500}, AS_CHAT[1]]]
        encoded = data.encode_rows(rows, tokenizer, first_answer + 1)
        assert len(encoded.examples) == 3
        assert max(len(example.input_ids) for example in encoded.examples) == first_answer + 1
        assert encoded.notes == [
            f"rows truncated to max_seq_length {first_answer + 1} tokens: 1",
            f"rows dropped, too long for max_seq_length {first_answer + 1} tokens: 1",
        ]
        assert data.encode_rows(rows[:3], tokenizer, 1000).notes == []

    @pytest.mark.parametrize("cores", [1, 2])
    def test_many_rows_are_shared_out_among_the_cores(self, cores, monkeypatch):
        template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHATML
        tokenizer, rows, encode = make_tokenizer(template), [CHAT, AS_CHAT] * 100, data.encode
        rows[150] = [{"role": "user", "content": "bad"}, AS_CHAT[1]]
        monkeypatch.setattr(data, "encode", lambda *args: dataclasses.replace(encode(*args), cut=os.getpid()))
        monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: set(range(cores)))
        alone = data.encode_rows(rows, tokenizer, 1000, skip_bad_rows=True)
        monkeypatch.setattr(data, "MANY_ROWS", 200)
        shared = data.encode_rows(rows, tokenizer, 1000, skip_bad_rows=True)
        assert (shared.rows, shared.notes) == (alone.rows, alone.notes) and "row 151" in alone.notes[-1]
        assert data.digest(shared.examples) == data.digest(alone.examples)
        assert {example.cut for example in alone.examples} == {os.getpid()}
        assert (os.getpid() in {example.cut for example in shared.examples}) == (cores == 1)
        with pytest.raises(DataError, match="row 151: the chat template refuses this chat"):
            data.encode_rows(rows, tokenizer, 1000)

    def test_pain_19_nothing_left_to_learn_is_an_error(self):
        tokenizer = make_tokenizer(CHATML)
        with pytest.raises(DataError, match="nothing to learn: each of the 2 rows is too long for max_seq_length 4"):
            data.encode_rows([CHAT, AS_CHAT], tokenizer, 4)
        with pytest.raises(DataError, match="nothing to learn: no rows"):
            data.encode_rows([], tokenizer, 4)

    def test_pain_19_a_sample_shows_what_is_learnt(self):
        tokenizer = make_tokenizer(CHATML)
        shown = data.describe_example(data.encode(AS_CHAT, tokenizer), tokenizer)
        assert shown.splitlines()[0].endswith("tokens, 2 of them learnt, between >> and <<:")
        assert shown.endswith(
            ":\n<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n>>3<|im_end|><<\n"
        )


class TestBatches:
    def test_collate_pads_on_the_right(self):
        examples = [
            data.Example(np.array([5, 2], np.int32), np.array([-100, 2], np.int32)),
            data.Example(np.array([7, 8, 9, 2], np.int32), np.array([-100, -100, 9, 2], np.int32)),
        ]
        batch = data.collate(examples, pad_id=2)
        assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [7, 8, 9, 2]]
        assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, -100, 9, 2]]
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())

    @settings(deadline=None)  # a busy machine is not a failure
    @given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
    def test_every_epoch_holds_every_example_once(self, n, batch_size, seed, epochs):
        steps = -(-n * epochs // batch_size)
        batches = [data.batch_indices(step, n, batch_size, seed) for step in range(steps)]
        assert all(len(batch) == batch_size for batch in batches)
        order = [index for batch in batches for index in batch]
        for epoch in range(epochs):
            assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))

    @settings(deadline=None)
    @given(n=st.integers(1, 40), seed=st.integers(0, 99), sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)))
    def test_order_does_not_depend_on_the_batch_size(self, n, seed, sizes):
        small, large = sizes
        one = [i for step in range(large) for i in data.batch_indices(step, n, small, seed)]
        other = [i for step in range(small) for i in data.batch_indices(step, n, large, seed)]
        assert one == other

    def test_pain_20_any_step_can_be_asked_for_on_its_own(self):
        first = [data.batch_indices(step, 13, 4, seed=3) for step in range(20)]
        again = {step: data.batch_indices(step, 13, 4, seed=3) for step in reversed(range(20))}
        assert first == [again[step] for step in range(20)]

    def test_epochs_and_seeds_differ(self):
        orders = {tuple(data.batch_indices(step, 50, 50, seed)) for step in range(3) for seed in range(3)}
        assert len(orders) == 9


NUMBERED = [[{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}] for i in range(20)]


class TestSplit:
    def test_split_is_complete_disjoint_ordered_and_seeded(self):
        train, held_out = data.split(NUMBERED, 0.2, seed=1)
        assert (len(train), len(held_out)) == (16, 4)
        numbers = [[int(row[0]["content"]) for row in part] for part in (train, held_out)]
        assert sorted([*numbers[0], *numbers[1]]) == list(range(20))
        assert all(part == sorted(part) for part in numbers)
        assert data.split(NUMBERED, 0.2, seed=1) == (train, held_out)
        assert data.split(NUMBERED, 0.2, seed=2) != (train, held_out)

    @pytest.mark.parametrize("fraction, held_out", [(0, 0), (0.001, 1), (0.999, 19)])
    def test_both_sides_keep_a_row(self, fraction, held_out):
        assert [len(part) for part in data.split(NUMBERED, fraction, seed=0)] == [20 - held_out, held_out]

    def test_errors(self):
        with pytest.raises(DataError, match="at least 2 rows, got 1"):
            data.split(NUMBERED[:1], 0.1, seed=0)

    def test_shared_system_prompt(self):
        assert data.shared_system_prompt([CHAT, CHAT[:3]]) == "Be brief."
        assert data.shared_system_prompt([CHAT, AS_CHAT]) is None
        assert data.shared_system_prompt([AS_CHAT]) is None
