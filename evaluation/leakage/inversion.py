"""Attacks that look at each row by itself: what token does a row like this stand for?

Nearest embedding needs the embedding table only. The linear map and the small network are trained
on rows whose tokens the attacker knows, of texts of their own. Known plaintext is a map of the
same kind made of as few as 64 rows of the session under attack, and needs no weights at all.

The linear map is a linear discriminant (Fisher; one covariance for all tokens): scores are a linear
function of the row. With few rows its covariance is drawn towards a multiple of the identity.

Letters: N rows, D width, V vocabulary, K tokens that occur.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

SHRINKAGE = 0.05  # of the covariance towards a sphere, with many rows
SHRINKAGE_OF_FEW = 0.5
HIDDEN = 384
EPOCHS = 12
BATCH = 256
LEARNING_RATE = 3e-3


class RowAttack(Protocol):
    """Rows (N, D) to token ids (N,)."""

    def recover(self, rows: Tensor) -> Tensor: ...


class NearestEmbedding:
    """The token whose embedding has the most similar direction."""

    def __init__(self, embeddings: Tensor) -> None:
        self._mean = embeddings.mean(dim=0)
        self._directions = nn.functional.normalize(embeddings - self._mean, dim=1)  # (V, D)

    def recover(self, rows: Tensor) -> Tensor:
        found: Tensor = torch.argmax((rows - self._mean) @ self._directions.T, dim=1)
        return found


class LinearMap:
    """Trained on pairs of rows and tokens."""

    def __init__(self, rows: Tensor, token_ids: Tensor, shrinkage: float = SHRINKAGE) -> None:
        self._known, index = _number(token_ids)
        counts = torch.bincount(index)
        means = torch.zeros(len(self._known), rows.shape[1]).index_add_(0, index, rows)
        means /= counts[:, None]
        precision = _invert(rows - means[index], rows, shrinkage)
        self._weight = precision @ means.T  # (D, K)
        share = counts / counts.sum()
        self._bias = share.log() - (means @ precision * means).sum(dim=1) / 2

    def recover(self, rows: Tensor) -> Tensor:
        found: Tensor = self._known[(rows @ self._weight + self._bias).argmax(dim=1)]
        return found


def _number(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Those that occur, ascending (K,), and which of them each is (N,)."""
    known = torch.tensor(sorted(set(token_ids.tolist())))
    return known, torch.searchsorted(known, token_ids)


def _invert(within: Tensor, rows: Tensor, shrinkage: float) -> Tensor:
    """The inverse of the covariance (D, D) within tokens, drawn towards that of all rows."""
    own = within.T @ within / len(within)
    spread = float((rows - rows.mean(dim=0)).square().mean()) + 1e-12
    sphere = spread * torch.eye(rows.shape[1])
    inverse: Tensor = torch.linalg.inv((1 - shrinkage) * own + shrinkage * sphere)
    return inverse


def know_plaintext(rows: Tensor, token_ids: Tensor) -> LinearMap:
    """What a few rows of the session itself give away, when their tokens are known."""
    return LinearMap(rows, token_ids, SHRINKAGE_OF_FEW)


class Network:
    """One hidden layer, trained on pairs. The same pairs give the same network."""

    def __init__(self, rows: Tensor, token_ids: Tensor, epochs: int = EPOCHS) -> None:
        self._known, index = _number(token_ids)
        self._mean, self._scale = rows.mean(dim=0), rows.std(dim=0) + 1e-6
        generator = torch.Generator().manual_seed(0)
        self._layers = _make_layers(rows.shape[1], len(self._known), generator)
        self._train(self._normalize(rows), index, epochs, generator)

    def recover(self, rows: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self._known[self._layers(self._normalize(rows)).argmax(dim=1)]
        return found

    def _normalize(self, rows: Tensor) -> Tensor:
        return (rows - self._mean) / self._scale

    def _train(self, rows: Tensor, index: Tensor, epochs: int, generator: torch.Generator) -> None:
        optimizer = torch.optim.AdamW(self._layers.parameters(), lr=LEARNING_RATE)
        steps = epochs * -(-len(rows) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for part in torch.split(torch.randperm(len(rows), generator=generator), BATCH):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self._layers(rows[part]), index[part])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()


def _make_layers(inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    layers = [nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, outputs)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.GELU(), layers[1])
