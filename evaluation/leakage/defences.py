"""Things to do to boundary rows before they leave the device, so that less can be read from them.

None of them is offered by a command: `python -m evaluation.leakage.tryout` measures that none of
them holds. Each says what whoever knows of it expects to see, and in which coordinates what it adds
is noise of deviation 1, for attacks had better know.

Letters: T tokens, D width, K directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.codecs.codec import make_codec
from evaluation.leakage.split_model import cross


class Defence(Protocol):
    """What happens to the rows of a session, how strongly."""

    def protect(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows (T, D) as the pool gets them."""
        ...

    def expect(self, rows: Tensor) -> Tensor:
        """The mean of what the pool gets for rows (T, D)."""
        ...

    def whiten(self, rows: Tensor) -> Tensor:
        """Rows (T, D) in coordinates where what the defence has added has deviation 1."""
        ...


@dataclass(frozen=True)
class Noise:
    """Gaussian, `shape` (D, D) times as much: the identity is as much in all directions."""

    shape: Tensor

    def protect(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return rows + torch.randn(rows.shape, generator=generator) @ self.shape

    def expect(self, rows: Tensor) -> Tensor:
        return rows

    def whiten(self, rows: Tensor) -> Tensor:
        white: Tensor = rows @ torch.linalg.inv(self.shape)
        return white


@dataclass(frozen=True)
class Fixed:
    """Something that is done to each row in the same way; `error` is what it changes, by value."""

    change: Callable[[Tensor], Tensor]
    error: float

    def protect(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.change(rows)

    def expect(self, rows: Tensor) -> Tensor:
        return self.change(rows)

    def whiten(self, rows: Tensor) -> Tensor:
        return rows / self.error


def even_noise(rows: Tensor, strength: float) -> Noise:
    """As much in all directions; `strength` is its deviation as a share of that of the rows."""
    return Noise(strength * float(rows.std()) * torch.eye(rows.shape[1]))


def cheap_noise(fisher_inverse: Tensor, strength: float) -> Noise:
    """More where the model minds less: as much as costs the same loss in every direction.

    `fisher_inverse` (D, D) leads from coordinates in which errors cost the same to rows.
    """
    return Noise(strength * fisher_inverse)


def coarse(rows: Tensor, codec: str) -> Fixed:
    """Few bits; `rows` are some to measure with."""
    encoder = make_codec(codec, "up")
    return _fix(rows, lambda values: cross(encoder, values))


def sparse(rows: Tensor, kept: int) -> Fixed:
    """Of each row the `kept` values that differ most from the mean; the others are the mean."""
    mean, deviation = rows.mean(dim=0), rows.std(dim=0)

    def change(values: Tensor) -> Tensor:
        beyond = ((values - mean) / deviation).abs()
        mask = torch.zeros_like(values).scatter_(1, beyond.topk(kept).indices, 1.0)
        return mean + mask * (values - mean)

    return _fix(rows, change)


def erased(rows: Tensor, token_ids: Tensor, directions: int) -> Fixed:
    """Without the directions in which tokens differ most, beside how much each varies by itself."""
    axes = find_telling_directions(rows, token_ids, directions)  # (D, K)
    mean = rows.mean(dim=0)
    return _fix(rows, lambda values: values - (values - mean) @ axes @ axes.T)


def find_telling_directions(rows: Tensor, token_ids: Tensor, count: int) -> Tensor:
    """An orthonormal basis (D, K) of Fisher's discriminant directions."""
    index = torch.searchsorted(known := torch.tensor(sorted(set(token_ids.tolist()))), token_ids)
    counts = torch.bincount(index)[:, None]
    means = torch.zeros(len(known), rows.shape[1]).index_add_(0, index, rows) / counts
    own = rows - means[index]
    within = own.T @ own / len(own) + 1e-3 * float(own.square().mean()) * torch.eye(rows.shape[1])
    centred = (means - rows.mean(dim=0)) * counts.sqrt()
    root = torch.linalg.cholesky(torch.linalg.inv(within))
    _, _, axes = torch.linalg.svd(centred @ root, full_matrices=False)
    basis: Tensor = torch.linalg.qr(root @ axes[:count].T)[0]
    return basis


def draw_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (D, D): a secret between a device and rotated private weights."""
    basis, triangle = torch.linalg.qr(torch.randn(width, width, generator=generator))
    rotation: Tensor = basis * triangle.diagonal().sign()
    return rotation


def draw_order(width: int, seed: int) -> Tensor:
    """Channels (D,) in an order that whoever has the seed can draw again."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def _fix(rows: Tensor, change: Callable[[Tensor], Tensor]) -> Fixed:
    error = float((change(rows) - rows).square().mean().sqrt())
    return Fixed(change, max(error, 1e-6 * float(rows.std())))
