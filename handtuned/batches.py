"""Encoded examples → batches.

The order of batches is a pure function of the step: a resumed run has no position to restore.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One chat as two int32 arrays of equal length; the label at position t is predicted from the ids before it."""

    input_ids: np.ndarray
    labels: np.ndarray  # the id itself where it is learnt, else -100
    cut: int = 0  # tokens beyond max_seq_length that were left off at the end

    @property
    def answer_tokens(self) -> int:
        """How many tokens are learnt."""
        return int((self.labels != IGNORE_INDEX).sum())


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
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
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


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
