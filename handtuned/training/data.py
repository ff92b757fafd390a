"""Files of rows → chats → examples → batches.

The order of batches is a pure function of the step: a resumed run has no position to restore.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..datasets import shipped_dataset
from ..nn.loss import IGNORE_INDEX
from .encoding import Example, describe_example, encode, encode_prompt, end_of_turn
from .formats import Chat, DataError, load_rows
from .settings import FinetuneSettings

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


def load_chats(settings: FinetuneSettings) -> tuple[list[Chat], list[Chat], str | None]:
    """(training chats, held-out chats, file of the latter or None); prints how many bad rows were skipped."""
    path, eval_path = settings.data, settings.eval_data
    if path is None:
        path, shipped = map(str, shipped_dataset())
        eval_path = eval_path or shipped
    train_rows = _read(path, settings.skip_bad_rows)
    if eval_path:
        eval_rows = _read(eval_path, settings.skip_bad_rows)
    else:
        train_rows, eval_rows = split(train_rows, settings.eval_fraction, settings.seed)
    return train_rows, eval_rows[: settings.eval_samples], eval_path


def _read(path: str, skip_bad_rows: bool) -> list[Chat]:
    loaded = load_rows(path, skip_bad_rows)
    for note in loaded.notes:
        print(f"{path}: {note}")
    return loaded.rows


def encode_chats(
    train: Sequence[Chat], held_out: Sequence[Chat], tokenizer, settings: FinetuneSettings
) -> tuple[EncodedRows, EncodedRows]:
    """Both parts as token ids and labels; prints what was cut or dropped."""
    encoded = []
    limits = settings.max_seq_length, settings.skip_bad_rows
    for name, rows in (("training", train), ("held-out", held_out)):
        try:
            part = encode_rows(rows, tokenizer, *limits) if rows else EncodedRows()
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
    if eval_fraction == 0:
        return list(rows), []
    if len(rows) < 2:
        raise DataError(f"holding out rows needs at least 2 rows, got {len(rows)}; --eval-fraction 0 holds out none")
    count = min(max(1, round(len(rows) * eval_fraction)), len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    parts = [], []
    for index, row in enumerate(rows):
        parts[index in held_out].append(row)
    return parts


def context_length(model) -> int | None:
    """How many tokens a model can look back on; None: no limit is known."""
    return getattr(model.config, "max_position_embeddings", None)


def encode_rows(rows: Sequence[Chat], tokenizer, max_seq_length: int, skip_bad_rows: bool = False) -> EncodedRows:
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
    if not examples:
        reason = f"each of the {len(rows)} rows is too long for max_seq_length {max_seq_length} tokens"
        if refused:
            reason = f"no usable row among {len(rows)}; {refused[0]}"
        raise DataError(f"nothing to learn: {reason if rows else 'no rows'}")
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
        input_ids and labels, both int64 of shape (batch, longest); padding has label -100.
    """

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [torch.from_numpy(getattr(example, name)).long() for example in examples]
        return pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    return {"input_ids": padded("input_ids", pad_id), "labels": padded("labels", IGNORE_INDEX)}


def batch_indices(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Which of `n` examples make up batch number `step` (from 0), a pure function of its arguments.

    Every epoch is a shuffle of its own in which each example comes once. The epochs follow one
    another without a gap: a batch at the end of one goes on into the next, so all batches are full.
    """
    indices = []
    position, stop = step * batch_size, (step + 1) * batch_size
    while position < stop:
        epoch, offset = divmod(position, n)
        shuffled = np.random.default_rng([seed, epoch]).permutation(n)
        indices += shuffled[offset : offset + stop - position].tolist()
        position = step * batch_size + len(indices)
    return indices
