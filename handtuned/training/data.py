"""Files of rows → chats → examples → batches.

The order of batches is a pure function of the step: a resumed run has no position to restore.
"""

import hashlib
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..datasets import shipped_dataset
from ..nn.loss import IGNORE_INDEX
from .encoding import Example, decode_answer, describe_example, encode, encode_prompt, end_of_turn
from .files import DataError
from .formats import Chat, load_rows
from .settings import FinetuneSettings, column_names

__all__ = ["IGNORE_INDEX", "Chat", "DataError", "Example", "decode_answer", "describe_example", "encode",
           "encode_prompt", "end_of_turn", "load_rows", "shipped_dataset"]  # fmt: skip


@dataclass(frozen=True)
class EncodedRows:
    """Examples that all have something to learn, the chats that they come from, and what the user must hear of."""

    examples: Sequence[Example] = ()
    rows: Sequence[Chat] = ()
    notes: Sequence[str] = ()


def shared_system_prompt(rows: Sequence[Chat]) -> str | None:
    """The system message of every chat, if all have the same: prompts after training need it too."""
    first = {row[0]["content"] if row[0]["role"] == "system" else None for row in rows}
    return first.pop() if len(first) == 1 else None


def load_chats(settings: FinetuneSettings) -> tuple[list[Chat], list[Chat], str | None]:
    """(training chats, held-out chats, file of the latter or None); prints what the user must hear of the files."""
    sources, eval_path = settings.data, settings.eval_data
    if sources is None:
        sources, shipped = map(str, shipped_dataset())
        eval_path = eval_path or shipped

    def read(path: str, weight: float) -> list[tuple[Chat, float]]:
        loaded = load_rows(path, settings.skip_bad_rows, column_names(settings.columns), settings.train_on)
        for note in loaded.notes:
            print(f"{path}: {note}")
        return [(chat, weight) for chat in loaded.rows]

    sources = [sources] if isinstance(sources, str) else sources
    chats = [entry for source in sources for entry in read(*weighted_source(source))]
    if eval_path:
        held_out = read(eval_path, 1.0)
    else:
        chats, held_out = split(chats, settings.eval_fraction, settings.seed, settings.eval_samples)
    train, held_out = repeated(chats, settings.seed), [chat for chat, _ in held_out][: settings.eval_samples]
    texts, others = [repr((chat, chat.tools)) for chat, _ in chats], {repr((chat, chat.tools)) for chat in held_out}
    for what, count in (("duplicate training rows", len(texts) - len(set(texts))),
                        ("training rows that are held out, too", sum(text in others for text in texts))):  # fmt: skip
        if count:
            print(f"{what}: {count} of {len(texts)}")
    return train, held_out, eval_path


def weighted_source(source: str) -> tuple[str, float]:
    """ "rows.jsonl:2" → its rows twice in each epoch, "rows.jsonl:0.5" → half of them; without a weight, once."""
    path, _, weight = source.rpartition(":")
    if Path(source).exists() or not path or not re.fullmatch(r"\d*\.?\d+", weight):
        return source, 1.0
    return path, float(weight)


def repeated(chats: Sequence[tuple[Chat, float]], seed: int) -> list[Chat]:
    """Every chat as often as its weight says; of a weight's fraction, a seeded part of the chats."""
    draws = np.random.default_rng(seed).random(len(chats))
    return [chat for (chat, weight), draw in zip(chats, draws, strict=True)
            for _ in range(int(weight) + (draw < weight % 1))]  # fmt: skip


def encode_chats(train: Sequence[Chat], held_out: Sequence[Chat], tokenizer,
                 settings: FinetuneSettings) -> tuple[EncodedRows, EncodedRows]:  # fmt: skip
    """Both parts as token ids and labels; prints what was cut or dropped."""
    encoded = []
    limits = settings.max_seq_length, settings.skip_bad_rows, settings.train_on, settings.drop_long_rows
    for name, rows in (("training", train), ("held-out", held_out)):
        try:
            part = encode_rows(rows, tokenizer, *limits) if rows or name == "training" else EncodedRows()
        except DataError as error:
            raise DataError(f"{name} rows: {error}") from None
        for note in part.notes:
            print(f"{name} rows: {note}")
        encoded.append(part)
    return tuple(encoded)


def digest(examples: Sequence[Example]) -> str:
    """A sha256 of what is learnt from, by which a run or a study that is resumed recognizes its data."""
    found = hashlib.sha256()
    for example in examples:
        found.update(example.input_ids.tobytes() + example.labels.tobytes())
    return found.hexdigest()


def split(rows: Sequence, eval_fraction: float, seed: int, most: int | None = None) -> tuple[list, list]:
    """Training rows and held-out rows, each in the order of the file; the same seed gives the same split.

    A fraction above 0 holds out at least one row, `most` at most, and leaves at least one; 0 holds out none.
    """
    if eval_fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(f"holding out rows needs at least 2 rows, got {len(rows)}; --eval-fraction 0 holds out none")
    count = min(max(1, round(len(rows) * eval_fraction)), len(rows) - 1, most or len(rows))
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    parts = [], []
    for index, row in enumerate(rows):
        parts[index in held_out].append(row)
    return parts


def context_length(model) -> int | None:
    """How many tokens a model can look back on; None: no limit is known."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if longest and longest > 0 else None  # XLNet says -1


def encode_rows(rows: Sequence[Chat], tokenizer, max_seq_length: int, skip_bad_rows: bool = False,
                train_on: str = "answers", drop_long_rows: bool = False) -> EncodedRows:  # fmt: skip
    """Encode chats; a row of more than `max_seq_length` tokens is cut at its end, or dropped if no answer is left.

    Args:
        drop_long_rows: drop it in any case.
        skip_bad_rows: leave out and list what `encode` refuses, instead of raising at the first.
        train_on: as for `encode`.

    DataError: a row that `encode` refuses, named by its place in the file, or nothing left to learn from.
    """
    from tqdm import tqdm

    def encoded(at: int) -> Example | DataError:
        try:
            return encode(rows[at], tokenizer, max_seq_length, train_on)
        except DataError as error:
            return error

    examples, kept, refused, dropped = [], [], [], 0
    bar = tqdm(rows, desc="encoding", unit="row", dynamic_ncols=True, leave=False, delay=2)  # s
    for number, (row, example) in enumerate(zip(bar, _on_all_cores(encoded, len(rows)), strict=True), start=1):
        if isinstance(example, DataError):
            reason = f"{getattr(row, 'where', None) or f'row {number}'}: {example}"
            if not skip_bad_rows:
                raise DataError(reason)
            refused.append(reason)
            continue
        if example.answer_tokens == 0 or (drop_long_rows and example.cut):
            dropped += 1
            continue
        examples.append(example)
        kept.append(row)
    if not examples:
        reason = f"no usable row among {len(rows)}; {refused[0]}" if refused else (
            f"each of the {len(rows)} rows is too long for max_seq_length {max_seq_length} tokens")  # fmt: skip
        raise DataError(f"nothing to learn: {reason if rows else 'no rows'}")
    counts = {
        f"rows truncated to max_seq_length {max_seq_length} tokens": sum(example.cut > 0 for example in examples),
        f"rows dropped, too long for max_seq_length {max_seq_length} tokens": dropped,
        "rows with reasoning that the chat template does not show": sum(e.hides_reasoning for e in examples),
        "rows whose answer does not follow the prompt of `generate` token by token, as tokenizer or chat template "
        "write it otherwise": sum(not example.follows_prompt for example in examples),
    }
    notes = [f"{what}: {count}" for what, count in counts.items() if count]
    if refused:
        notes.append(f"bad rows skipped: {len(refused)}, the first: {'; '.join(refused[:3])}")
    return EncodedRows(examples, kept, notes)


MANY_ROWS = 4000  # fewer are done before processes have started


def _on_all_cores(function: Callable, count: int) -> Iterator:
    """`function(0)` … `function(count - 1)`, in order. Where they are many, forked processes share them, which have all
    that the function refers to and send back only what it returns."""
    cores = 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count < MANY_ROWS or cores < 2:
        yield from map(function, range(count))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns of each fork
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=_remember, initargs=(function,)) as pool:
        yield from pool.map(_call_remembered, range(count), chunksize=64)


def _remember(function: Callable) -> None:
    global _remembered
    _remembered = function


def _call_remembered(at: int):
    return _remembered(at)


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu",
            bins: list[list[int]] | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Pad examples on the right: input_ids and labels, both int64 (batch, longest); padding has label -100.

    With `bins`, which examples share a sequence, there are position_ids too, that begin anew with each example.
    """
    bins = bins or [[row] for row in range(len(examples))]

    def padded(arrays: list[np.ndarray], value: int) -> torch.Tensor:
        rows = [torch.from_numpy(np.concatenate([arrays[row] for row in shared])).long() for shared in bins]
        return pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    batch = {"input_ids": padded([example.input_ids for example in examples], pad_id),
             "labels": padded([example.labels for example in examples], IGNORE_INDEX)}  # fmt: skip
    if max(map(len, bins)) > 1:
        batch["position_ids"] = padded([np.arange(len(example.labels)) for example in examples], 0)
    return batch


MEGABATCH = 50  # batches among which --group-by-length sorts, as transformers' Trainer does


def batch_indices(step: int, n: int, batch_size: int, seed: int, lengths: Sequence[int] | None = None) -> list[int]:
    """Which of `n` examples make up batch number `step` (from 0), a pure function of its arguments.

    Every epoch is a shuffle of its own in which each example comes once. The epochs follow one
    another without a gap: a batch at the end of one goes on into the next, so all batches are full.

    With `lengths` a batch holds examples of like length: they are sorted within `MEGABATCH` batches, shortest first,
    and these batches, full ones, are shuffled again.
    """
    indices = []
    position, stop = step * batch_size, (step + 1) * batch_size
    while position < stop:
        epoch, offset = divmod(position, n)
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(n)
        if lengths is not None:
            first = -epoch * n % batch_size  # those before complete the last batch of the epoch before
            full = shuffled[first : n - (n - first) % batch_size]
            for at in range(0, len(full), MEGABATCH * batch_size):
                among = full[at : at + MEGABATCH * batch_size]
                order = among[np.argsort(np.take(lengths, among), kind="stable")].reshape(-1, batch_size)
                among[:] = rng.permutation(order).ravel()
        indices += shuffled[offset : offset + stop - position].tolist()
        position = step * batch_size + len(indices)
    return indices
