"""A language model in miniature: household requests answered in JSON commands, one token per word, trained in seconds.

The requests and commands are the shipped rows. A dialect renames some words of the commands, so there is always
something new to fine-tune to: a weight has to change, and how well it did can be counted in held-out tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..datasets import shipped_dataset
from ..nn.loss import IGNORE_INDEX
from ..nn.transformer import Transformer
from ..optim import AdamW

LONGEST = 52  # tokens of the longest row

HOUSE_A = {"light": "lamp", "buy": "order", "weather": "forecast", "remember": "note", "room": "place",
           "percent": "level", "quantity": "count", "command": "do", "city": "town"}  # fmt: skip
HOUSE_B = {"command": "act", "light": "bulb", "room": "area", "heat": "warm", "degrees": "celsius", "timer": "clock",
           "minutes": "min", "wake": "rouse", "item": "thing", "action": "verb"}  # fmt: skip

Rows = tuple[torch.Tensor, torch.Tensor]


def words(text: str) -> list[str]:
    """Words, and every other character that is not a blank."""
    return re.findall(r"\w+|[^\w\s]", text)


def _pairs(path: Path) -> list[tuple[str, str]]:
    """(request, answer) of every row."""
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [(chat[1]["content"], chat[2]["content"]) for chat in chats]


class House:
    """The shipped rows in several dialects, over one vocabulary.

    Args:
        dialects: name → {word of the shipped commands: word of this dialect}, or None for the commands as they are.

    Attributes:
        training, testing: name of a dialect → (tokens, labels), both (rows, 52) int64.
        ids: word → token. 0 ends a row, 1 stands between request and answer.
    """

    def __init__(self, dialects: Mapping[str, Mapping[str, str] | None]):
        train, held_out = map(_pairs, shipped_dataset())
        vocabulary = {word for pair in train + held_out for text in pair for word in words(text)}
        vocabulary.update(word for change in dialects.values() if change for word in change.values())
        self.ids = {word: i for i, word in enumerate(sorted(vocabulary), start=2)}
        self.training = {name: self.encode(train, change) for name, change in dialects.items()}
        self.testing = {name: self.encode(held_out, change) for name, change in dialects.items()}

    def encode(self, pairs: list[tuple[str, str]], change: Mapping[str, str] | None = None) -> Rows:
        """(tokens, labels), both (len(pairs), 52) int64: the loss looks at the answer only."""
        tokens = torch.zeros(len(pairs), LONGEST, dtype=torch.long)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for i, (request, answer) in enumerate(pairs):
            said = [self.ids[word] for word in words(request)] + [1]
            told = [self.ids[(change or {}).get(word, word)] for word in words(answer)] + [0]
            tokens[i, : len(said + told)] = torch.tensor(said + told)
            labels[i, len(said) - 1 : len(said + told) - 1] = torch.tensor(told)
        return tokens, labels

    def new_model(self) -> Transformer:
        """A Llama of two layers of width 64, with random weights from torch's global generator."""
        return Transformer(len(self.ids) + 2, num_layers=2, d_model=64, num_heads=4, d_ff=192)


def draw(rows: Rows, order: torch.Generator) -> Rows:
    """16 random rows, both (16, width) int64: as wide as the longest of them."""
    batch = torch.randint(len(rows[0]), (16,), generator=order)
    width = int(rows[0][batch].any(0).sum()) + 1
    return rows[0][batch, :width], rows[1][batch, :width]


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the answers' tokens; logits (rows, width, vocabulary), labels (rows, width)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)


def fit(
    model: nn.Module, rows: Rows, steps: int, lr: float, parameters: Iterable[nn.Parameter] | None = None
) -> list[float]:
    """Train `parameters` (all, unless named) in place with AdamW, always in the same order of rows.

    Returns:
        the loss of each step.
    """
    optimizer = AdamW(list(parameters or model.parameters()), lr=lr, weight_decay=0.0)
    order, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        tokens, labels = draw(rows, order)
        loss = loss_of(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows) -> float:
    """Share of the answers' tokens that are predicted right, each after the true tokens before it."""
    tokens, labels = rows
    asked = labels != IGNORE_INDEX
    return (model(tokens).argmax(-1) == labels)[asked].float().mean().item()
