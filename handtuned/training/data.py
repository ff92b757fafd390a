"""Files of rows → chats → examples → batches.

The order of batches is a pure function of the step: a resumed run has no position to restore.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..datasets import shipped_dataset
from ..nn.loss import IGNORE_INDEX
from .encoding import Example, describe_example, encode, encode_prompt, end_of_turn
from .formats import Chat, DataError, load_rows

__all__ = ["IGNORE_INDEX", "Chat", "DataError", "Example", "describe_example", "encode", "encode_prompt",
           "end_of_turn", "load_rows", "shipped_dataset"]  # fmt: skip


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


def load_chats(
    path: str | None, eval_path: str | None, eval_fraction: float, eval_samples: int, seed: int, skip_bad_rows: bool
) -> tuple[list[Chat], list[Chat], str | None]:
    """(training chats, held-out chats, file of the latter or None); prints how many bad rows were skipped.

    Args:
        path, eval_path: files of rows; without a `path` the shipped ones.
        eval_fraction: part of the rows held out when there is no `eval_path`.
        eval_samples: at most this many are held out.
    """
    if path is None:
        path, shipped = map(str, shipped_dataset())
        eval_path = eval_path or shipped
    train_rows = _read(path, skip_bad_rows)
    if eval_path:
        eval_rows = _read(eval_path, skip_bad_rows)
    else:
        train_rows, eval_rows = split(train_rows, eval_fraction, seed)
    return train_rows, eval_rows[:eval_samples], eval_path


def _read(path: str, skip_bad_rows: bool) -> list[Chat]:
    loaded = load_rows(path, skip_bad_rows)
    for note in loaded.notes:
        print(f"{path}: {note}")
    return loaded.rows


def encode_chats(
    train: Sequence[Chat], held_out: Sequence[Chat], tokenizer, max_seq_length: int, skip_bad_rows: bool
) -> tuple[EncodedRows, EncodedRows]:
    """Both parts as token ids and labels; prints what was cut or dropped."""
    encoded = []
    for name, rows in (("training", train), ("held-out", held_out)):
        try:
            part = encode_rows(rows, tokenizer, max_seq_length, skip_bad_rows) if rows else EncodedRows()
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


def split(rows: Sequence[Chat], eval_fraction: float, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Training rows and held-out rows, each in the order of the file; the same seed gives the same split.

    A fraction above 0 holds out at least one row and leaves at least one; 0 holds out none.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction must be at least 0 and below 1, got {eval_fraction}")
    if eval_fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(f"holding out rows needs at least 2 rows, got {len(rows)}; --eval-fraction 0 holds out none")
    count = min(max(1, round(len(rows) * eval_fraction)), len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def context_length(model) -> int | None:
    """How many tokens a model can look back on; None: no limit is known."""
    return getattr(model.config, "max_position_embeddings", None)


def check_max_seq_length(max_seq_length: int, context: int | None) -> None:
    """Raise ValueError unless rows of this many tokens fit the model's context (None: unlimited)."""
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length must be at least 2, got {max_seq_length}")
    if context is not None and max_seq_length > context:
        raise ValueError(f"max_seq_length must be within the model's context of {context}, got {max_seq_length}")


def encode_rows(
    rows: Sequence[Chat], tokenizer, max_seq_length: int, skip_bad_rows: bool = False
) -> EncodedRows:
    """Encode chats; a row of more than `max_seq_length` tokens is cut at its end, or dropped if no answer is left.

    Args:
        skip_bad_rows: leave out and list what `encode` refuses, instead of raising at the first.

    Raises:
        DataError: a row that `encode` refuses, named by its place in the file, or nothing left to learn from.
    """
    examples, kept, refused, truncated, dropped = [], [], [], 0, 0
    for number, row in enumerate(rows, start=1):
        try:
            example = encode(row, tokenizer, max_seq_length)
        except DataError as error:
            reason = f"{getattr(row, 'where', None) or f'row {number}'}: {error}"
            if not skip_bad_rows:
                raise DataError(reason) from None
            refused.append(reason)
            continue
        if example.answer_tokens == 0:
            dropped += 1
            continue
        examples.append(example)
        kept.append(row)
        truncated += example.cut > 0
    if not examples and refused:
        raise DataError(f"nothing to learn: no usable row among {len(rows)}; {refused[0]}")
    if not examples:
        raise DataError(
            f"nothing to learn: each of the {len(rows)} rows is too long for max_seq_length {max_seq_length} tokens"
            if rows
            else "nothing to learn: no rows"
        )
    notes = []
    if truncated:
        notes.append(f"rows truncated to max_seq_length {max_seq_length} tokens: {truncated}")
    if dropped:
        notes.append(f"rows dropped, too long for max_seq_length {max_seq_length} tokens: {dropped}")
    if refused:
        notes.append(f"bad rows skipped: {len(refused)}, the first: {'; '.join(refused[:3])}")
    return EncodedRows(examples, kept, notes)


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest of them.

    Returns:
        input_ids, labels and attention_mask, each int64 of shape (batch, longest); padding has label -100 and mask 0.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.from_numpy(example.input_ids)
        labels[row, :length] = torch.from_numpy(example.labels)
        attention_mask[row, :length] = 1
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def batch_indices(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Which of `n` examples make up batch number `step` (from 0), a pure function of its arguments.

    Every epoch is a shuffle of its own in which each example comes once. The epochs follow one
    another without a gap: a batch at the end of one goes on into the next, so all batches are full.
    """
    for name, value, least in (("step", step, 0), ("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    indices = []
    position, stop = step * batch_size, (step + 1) * batch_size
    while position < stop:
        epoch, offset = divmod(position, n)
        shuffled = np.random.default_rng([seed, epoch]).permutation(n)
        indices += shuffled[offset : offset + stop - position].tolist()
        position = step * batch_size + len(indices)
    return indices
