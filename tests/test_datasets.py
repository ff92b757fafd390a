"""The shipped data set: what its generator promises."""

import difflib
import json
import re
from collections import Counter
from itertools import chain

import pytest

from handtuned.datasets import make
from handtuned.datasets.make import COMMANDS, SLOTS, SYSTEM, sentences, slot_values
from handtuned.training import data


@pytest.fixture(scope="module")
def rows():
    return {
        name: data.load_rows(path).rows for name, path in zip(("train", "eval"), data.shipped_dataset(), strict=True)
    }


def test_the_generator_rewrites_the_files_byte_for_byte(tmp_path):
    make.write(tmp_path)
    for path in data.shipped_dataset():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home_eval.jsonl", "home_train.jsonl"]


# What an answer may look like: the command, then its keys in order.
SHAPES = [(name.split()[0], *keys) for name, (keys, _, _) in COMMANDS.items()]


def shape(answer):
    return (answer["command"], *list(answer)[1:])


def test_size_and_balance(rows):
    for name, count in make.ROWS.items():
        shapes = Counter(shape(json.loads(row[-1]["content"])) for row in rows[name])
        assert shapes == dict.fromkeys(SHAPES, count)


def test_no_request_occurs_twice(rows):
    requests = [row[1]["content"].lower() for part in rows.values() for row in part]
    assert len(set(requests)) == len(requests)


def pattern(sentence):
    """Lower-case words with the slots as words."""
    return tuple(re.findall(r"[\w{}']+", sentence.lower()))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_sentence_pattern_is_shared(command):
    _, train, held_out = COMMANDS[command]
    train = [pattern(text) for text, _ in sentences(train)]
    held_out = [pattern(text) for text, _ in sentences(held_out)]
    assert len(set(train)) == len(train) == 20
    assert len(set(held_out)) == len(held_out) == 4
    for sentence in held_out:
        alike = max(difflib.SequenceMatcher(None, sentence, other).ratio() for other in train)
        assert alike < 0.85, sentence


def test_held_out_requests_match_no_training_pattern(rows):
    def any_value(slot):
        return "(?:" + "|".join(str(value) for value in chain(*slot_values(slot[1]))) + ")"

    patterns = [
        re.compile(re.sub(r"\\{(\w+)\\}", any_value, re.escape(text)), re.IGNORECASE)
        for _, train, _ in COMMANDS.values()
        for text, _ in sentences(train)
    ]
    for row in rows["train"]:
        assert any(pattern.fullmatch(row[1]["content"]) for pattern in patterns)
    for row in rows["eval"]:
        assert not any(pattern.fullmatch(row[1]["content"]) for pattern in patterns), row[1]["content"]


def test_rows_are_short_and_canonical(rows):
    for part in rows.values():
        for system, user, assistant in part:
            assert system["content"] == SYSTEM
            assert user["content"][0].isupper() or user["content"][0].isdigit()
            assert user["content"][-1] in ".?"
            assert len(user["content"]) < 90
            answer = json.loads(assistant["content"])
            assert shape(answer) in SHAPES
            assert next(iter(answer)) == "command"
            assert assistant["content"] == json.dumps(answer, separators=(",", ":"))


def test_values_are_copied_from_the_request(rows):
    reworded = {"on", "off", "lock", "unlock", "open", "close"}
    for part in rows.values():
        for _, user, assistant in part:
            answer = json.loads(assistant["content"])
            del answer["command"]
            for value in answer.values():
                assert str(value).lower() in user["content"].lower() or value in reworded


def test_the_system_prompt_gives_no_schema_away():
    # It says that there is a command; every other word of an answer must come from training.
    for words in SHAPES:
        assert not set(re.findall(r"\w+", SYSTEM.lower())) & set(words)


def test_articles_fit():
    for slot in SLOTS:
        for value in chain(*slot_values(slot)):
            if f"a {{{slot}}}" in str(COMMANDS):
                assert not re.match(r"[aeiou]|8|11\b|18\b", str(value), re.IGNORECASE), (slot, value)


def test_some_values_are_held_out(rows):
    trained = " ".join(row[1]["content"] for row in rows["train"]).lower()
    seen = " ".join(row[1]["content"] for row in rows["eval"]).lower()
    held_out = [value for slot in ("room", "city", "task", "label", "color") for value in slot_values(slot)[1]]
    assert not [value for value in held_out if value.lower() in trained]
    assert sum(value.lower() in seen for value in held_out) >= 5
