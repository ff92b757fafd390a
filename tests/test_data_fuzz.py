"""Mutated files and random templates: a row or one line of error comes out, and nothing is learnt that is no answer.

The number of files and templates is small in CI and whole (20,000 and 5,000) with --slow.
"""

import contextlib
import gzip
import json
import random
import re

import pytest
from test_data import learnt_texts, make_tokenizer
from test_data_files import TEXTS

from handtuned.training import data
from handtuned.training.files import DataError
from handtuned.training.formats import load_rows

FORMS = {
    "chats": {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                           {"role": "assistant", "content": "A", "weight": 1}], "tools": None},
    "calls": {"tools": [{"type": "function", "function": {"name": "f"}}], "messages": [
        {"role": "user", "content": "U"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "R"}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}], "system": "S"},
    "alpaca": {"instruction": "U", "input": "I", "output": "A", "history": [["q", "a"]]},
    "pairs": {"prompt": [{"role": "user", "content": "U"}], "completion": "A", "label": True},
}  # fmt: skip


def files():
    """Name → bytes: every form of file, and in JSON Lines every form of row."""
    for name, text in TEXTS.items():
        yield name, text.encode()
        yield f"{name}.gz", gzip.compress(text.encode())
        yield name, text.encode("utf-16")
    for row in FORMS.values():
        yield "rows.jsonl", (json.dumps(row) + "\n").encode() * 3
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        return
    rows = pyarrow.Table.from_pylist([FORMS["alpaca"], FORMS["alpaca"]])
    sinks = {name: pyarrow.BufferOutputStream() for name in ("rows.parquet", "rows.arrow")}
    parquet.write_table(rows, sinks["rows.parquet"])
    with pyarrow.ipc.new_file(sinks["rows.arrow"], rows.schema) as writer:
        writer.write_table(rows)
    yield from ((name, sink.getvalue().to_pybytes()) for name, sink in sinks.items())


SIGNS = (b"\0", b'"', b"{", b"[", b",", b"]}", b"\n", b"\r", b"null", b"NaN", b"1e999", b"\\ud800", b"\xff\xfe",
         b"\xef\xbb\xbf")  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at, to = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        to = min(to, at + draw.choice((1, 4, 50, 10**6)))
        noise = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 5)))
        content[at:to] = draw.choice((b"", noise, content[at:to] * 2, b"[" * 3000, *SIGNS))
    return bytes(content)


def test_mutated_files(request, tmp_path):
    draw, kinds = random.Random(0), list(files())
    for number in range(20_000 if request.config.getoption("--slow") else 1_000):
        name, content = kinds[number % len(kinds)]
        file = tmp_path / name
        file.write_bytes(mutated(content, draw))
        skip = draw.random() < 0.5
        try:
            loaded = load_rows(file, skip_bad_rows=skip)
        except DataError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error), f"{number}: {error}"
            continue
        for chat in loaded.rows:
            assert chat[-1]["role"] == "assistant" and chat.where.startswith(str(file))
            assert all(isinstance(message["content"], str) for message in chat)
        if name == "rows.jsonl" and file.read_bytes().isascii():  # answers are texts of the file that are called so
            text = json.dumps(list(objects(file.read_text())))
            answers = {json.dumps(message["content"]) for chat in loaded.rows for message in chat[-1:]
                       if "tool_calls" not in message}  # fmt: skip
            assert all(answer in text for answer in answers), number


def objects(text: str):
    """Every JSON object that begins anywhere in a text."""
    for start in re.finditer("{", text):
        with contextlib.suppress(ValueError, RecursionError):
            yield json.JSONDecoder().raw_decode(text, start.start())[0]


class Template:
    """A template of random habits, once in Jinja for the library and once as Python that knows what is an answer."""

    def __init__(self, draw: random.Random):
        self.opening, self.closing = draw.choice((("<|im_start|>", "<|im_end|>\n"), ("<|im_start|>", "<|im_end|>"),
                                                  ("[", " <|im_end|>"), ("<|im_start|>", "\n")))  # fmt: skip
        self.header = draw.choice(("\n", ": ", "]"))
        self.trim, self.strips, self.marks = (draw.random() < 0.4 for _ in range(3))
        self.empty = draw.choice(("", "", "<think>\n\n</think>\n\n"))  # before the last answer
        self.opens = draw.choice(("", "", "<think>\n"))  # in the prompt
        self.bos = draw.choice(("", "<|endoftext|>"))

    def jinja(self) -> str:
        said = "m.content | trim" if self.trim else "m.content"
        if self.strips:
            said = f"({said} if loop.last or m.role != 'assistant' else (m.content.split('</think>') | last | trim))"
        generation = ("{% generation %}", "{% endgeneration %}") if self.marks else ("", "")
        return (
            f"{{{{ {self.bos!r} }}}}{{% for m in messages %}}{{{{ {self.opening!r} + m.role + {self.header!r} }}}}"
            f"{generation[0]}{{% if loop.last and m.role == 'assistant' %}}{{{{ {self.empty!r} }}}}{{% endif %}}"
            f"{{{{ {said} }}}}{{{{ {self.closing!r} }}}}{generation[1]}{{% endfor %}}{{% if add_generation_prompt %}}"
            f"{{{{ {self.opening + 'assistant' + self.header + self.opens!r} }}}}{{% endif %}}"
        )

    def learnt(self, chat: list[dict]) -> list[str]:
        """What of the chat, as this template writes it, a model that is asked has to write itself."""
        texts = []
        for message in chat:
            if message["role"] != "assistant":
                continue
            last, said = message is chat[-1], message["content"].strip() if self.trim else message["content"]
            if self.strips and not last:
                said = message["content"].split("</think>")[-1].strip()
            added = self.empty if last else ""
            shared = len(self.opens) if added.startswith(self.opens) else 0
            end = self.closing.rstrip("\n") if "<|im_end|>" in self.closing else ""
            texts.append(added[shared:] + said + (end or (self.closing + "<|im_end|>" if last else "")))
        return texts


PIECES = ("a", "Done.", " ", "\n", "\n\n", "é", "😀", "<think>", "</think>", "\n</think>\n\n", "assistant", "user: ",
          "]", "<thin", "im_end", "1", "  ", "[assistant]")  # fmt: skip


def random_chat(draw: random.Random) -> list[dict]:
    def said() -> str:
        return "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 6))) + draw.choice(("x", "", "y "))

    turns = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
    for _ in range(draw.randrange(1, 4)):
        turns += [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
    return [turn for turn in turns if turn["content"].strip()]


def spaced_tokenizer():
    """As Llama's and Mistral's: a space is a sign of the word behind it, and stands before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])  # fmt: skip
    signs = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator([" ".join(PIECES)] * 9, trainers.BpeTrainer(vocab_size=500, special_tokens=signs,
                                                                        show_progress=False))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                   unk_token="<unk>")  # fmt: skip


@pytest.mark.parametrize("kind", [make_tokenizer, spaced_tokenizer], ids=["bytes", "spaced"])
def test_random_templates(request, kind):
    draw, refused, told, learnt, tokenizer = random.Random(0), 0, 0, 0, kind()
    count = 5_000 if request.config.getoption("--slow") else 300
    for number in range(count):
        template, chat = Template(draw), random_chat(draw)
        if [turn["role"] for turn in chat if turn["role"] != "system"] != ["user", "assistant"] * (len(chat) // 2):
            continue  # a turn without words, which no row has
        tokenizer.chat_template = template.jinja()
        try:
            example = data.encode(chat, tokenizer)
        except DataError as error:
            assert "the chat template" in str(error), number
            refused += 1
            continue
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        decoded = tokenizer.decode(example.input_ids.tolist())
        assert decoded in (text, text + "<|im_end|>"), number
        texts, expected = learnt_texts(example, tokenizer), [part for part in template.learnt(chat) if part]
        if kind is spaced_tokenizer:  # it does not show a space before a text
            texts, expected = [part.lstrip(" ") for part in texts], [part.lstrip(" ") for part in expected]
        assert texts == expected, f"{number}: {template.jinja()!r} {chat}"
        learnt += 1
        told += not example.follows_prompt
        if example.follows_prompt:
            prompt = data.encode_prompt(chat[:-1], tokenizer)
            assert example.input_ids[: len(prompt)].tolist() == prompt, number
            assert example.labels[len(prompt)] == example.input_ids[len(prompt)], number
    assert learnt > count / 2 and refused + told < count / 50, (learnt, refused, told)
