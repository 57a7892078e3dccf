"""What calibrated codecs know beforehand about the rows that cross a cut, and where it is kept.

Of each direction (up: head to middle, down: middle to tail), over the tokens of some text:

- mean and scale of every channel; of the downlink also of what is left after prediction;
- a predictor of downlink rows from the uplink rows of the same tokens, y ≈ d * x + V (U x) + c:
  most of the residual stream passes through the middle unchanged (d), the rest is of low rank;
- a transform to coordinates in which an error costs the same in every direction and whose values
  are uncorrelated: the square root of the Fisher information of the loss, then the eigenvectors
  of the covariance there (Karhunen-Loève), with the deviation of every coordinate.

Of both together the budget of `smallest`, with which it costs what it promises. Files of earlier
versions have none.

Kept as calibration.safetensors and calibration.json in one directory, named by a fingerprint that
both ends of a session must agree on.

Letters: N tokens, D hidden, K rank.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.errors import CheckpointError, why_unreadable

TENSORS_FILE, RECORD_FILE = "calibration.safetensors", "calibration.json"
BUDGET = "smallest.budget"
RIDGE = 1e-3  # of the mean variance, added to every covariance that is inverted


@dataclass(frozen=True, slots=True)
class DirectionCalibration:
    """What is known about the rows of one direction."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    fisher: Tensor  # (D, D), rows to coordinates: (x - mean) @ fisher
    fisher_inverse: Tensor  # (D, D)
    deviation: Tensor  # (D,), of the coordinates


@dataclass(frozen=True, slots=True)
class Predictor:
    """Downlink rows from the decoded uplink rows of the same tokens."""

    diagonal: Tensor  # (D,)
    reduce: Tensor  # (D, K)
    expand: Tensor  # (K, D)
    constant: Tensor  # (D,)

    def predict(self, uplink: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        flat = torch.addcmul(self.constant, uplink, self.diagonal)
        return flat.addmm_(uplink @ self.reduce, self.expand)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that was measured at one cut of one model."""

    model: str  # fingerprint
    span: tuple[int, int]
    tokens: int
    up: DirectionCalibration
    down: DirectionCalibration
    residual: DirectionCalibration  # of the downlink less its prediction
    predictor: Predictor
    fingerprint: str = ""
    smallest_budget: float | None = None  # nats per token; exact in float32

    @property
    def hidden(self) -> int:
        return int(self.up.mean.shape[0])


def fit_calibration(
    model: str, span: tuple[int, int], up: Tensor, down: Tensor, up_grad: Tensor, down_grad: Tensor
) -> Calibration:
    """Measure from rows and gradients of the loss with respect to them, (N, D) each, float32.

    The gradients are those of the negative log-likelihood of tokens drawn from the model itself,
    so that their second moment is the Fisher information.
    """
    predictor = _fit_predictor(up, down)
    residual = down - predictor.predict(up)
    return Calibration(
        model, span, up.shape[0],
        _fit_direction(up, up_grad), _fit_direction(down, down_grad),
        _fit_direction(residual, down_grad), predictor,
    )  # fmt: skip


def _fit_direction(rows: Tensor, grad: Tensor) -> DirectionCalibration:
    mean = rows.mean(dim=0)
    scale = rows.std(dim=0).clamp_min(1e-6 * float(rows.std()) + 1e-12)
    centered = (rows - mean).double()
    fisher = _regularize(grad.double().T @ grad.double() / len(grad))
    root = _matrix_root(fisher)
    covariance = _regularize(root @ (centered.T @ centered / len(rows)) @ root)
    variances, axes = torch.linalg.eigh(covariance)
    forward = root @ axes
    return DirectionCalibration(
        mean, scale, forward.float().contiguous(),
        torch.linalg.inv(forward).float().contiguous(), variances.sqrt().float(),
    )  # fmt: skip


def _fit_predictor(up: Tensor, down: Tensor) -> Predictor:
    x_mean, y_mean = up.double().mean(dim=0), down.double().mean(dim=0)
    x, y = up.double() - x_mean, down.double() - y_mean
    diagonal = (x * y).mean(dim=0) / x.square().mean(dim=0).clamp_min(1e-12)
    covariance = _regularize(x.T @ x / len(x))
    full = torch.linalg.solve(covariance, x.T @ (y - x * diagonal) / len(x))  # (D, D)
    rank = min(64, max(1, up.shape[1] // 4))
    # reduced-rank regression: keep the directions of the output that are explained best
    _, _, basis = torch.linalg.svd(_matrix_root(covariance) @ full)
    expand = basis[:rank]  # (K, D)
    reduce = full @ expand.T  # (D, K)
    constant = y_mean - diagonal * x_mean - x_mean @ reduce @ expand
    return Predictor(
        diagonal.float(), reduce.float().contiguous(), expand.float().contiguous(), constant.float()
    )


def _regularize(matrix: Tensor) -> Tensor:
    size = matrix.shape[0]
    amount = RIDGE * matrix.diagonal().mean().clamp_min(1e-30)
    return matrix + amount * torch.eye(size, dtype=matrix.dtype)


def _matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _tensors_of(calibration: Calibration) -> dict[str, Tensor]:
    tensors = {}
    for name in ("up", "down", "residual"):
        direction = getattr(calibration, name)
        for field in DirectionCalibration.__slots__:
            tensors[f"{name}.{field}"] = getattr(direction, field)
    for field in Predictor.__slots__:
        tensors[f"predictor.{field}"] = getattr(calibration.predictor, field)
    if calibration.smallest_budget is not None:
        tensors[BUDGET] = torch.tensor([calibration.smallest_budget])
    return tensors


def save_calibration(calibration: Calibration, directory: Path) -> str:
    """Write both files and return the fingerprint."""
    directory.mkdir(parents=True, exist_ok=True)
    data = save(_tensors_of(calibration))
    fingerprint = _fingerprint(data)
    (directory / TENSORS_FILE).write_bytes(data)
    record = {
        "model": calibration.model, "span": list(calibration.span),
        "tokens": calibration.tokens, "fingerprint": fingerprint,
    }  # fmt: skip
    (directory / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return fingerprint


def load_calibration(directory: Path) -> Calibration:
    """Read what `save_calibration` wrote. Raises CheckpointError if it is missing or broken."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} holds no usable calibration: it is no directory; midspan calibrate "
            "makes one"
        )
    try:
        record = json.loads((directory / RECORD_FILE).read_text())
        data = (directory / TENSORS_FILE).read_bytes()
        tensors = load(data)
        parts = {
            name: DirectionCalibration(
                *(tensors[f"{name}.{field}"] for field in DirectionCalibration.__slots__)
            )
            for name in ("up", "down", "residual")
        }
        predictor = Predictor(*(tensors[f"predictor.{f}"] for f in Predictor.__slots__))
        _check_tensors(tensors)
        budget = float(tensors[BUDGET]) if BUDGET in tensors else None
        calibration = Calibration(
            record["model"], (record["span"][0], record["span"][1]), record["tokens"],
            parts["up"], parts["down"], parts["residual"], predictor, _fingerprint(data), budget,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        name = getattr(error, "filename", None)  # of one of the two files
        why = f"{Path(name).name}: {why_unreadable(error)}" if name else why_unreadable(error)
        raise CheckpointError(f"{directory} holds no usable calibration: {why}") from error
    if calibration.fingerprint != record.get("fingerprint"):
        raise CheckpointError(
            f"{directory}: {TENSORS_FILE} has fingerprint {calibration.fingerprint}, "
            f"but {RECORD_FILE} says {record.get('fingerprint')}"
        )
    return calibration


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless every tensor has its shape and holds what can be computed with."""
    hidden = tensors["up.fisher"].shape[0]
    rank = tensors["predictor.expand"].shape[0]
    shapes = {
        "mean": (hidden,), "scale": (hidden,), "deviation": (hidden,), "fisher": (hidden, hidden),
        "fisher_inverse": (hidden, hidden), "diagonal": (hidden,), "constant": (hidden,),
        "reduce": (hidden, rank), "expand": (rank, hidden), "budget": (1,),
    }  # fmt: skip
    for name, tensor in tensors.items():
        field = name.partition(".")[2]
        if tuple(tensor.shape) != shapes.get(field):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shapes[field]}")
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds other things than finite float32 numbers")
        if field in ("scale", "deviation", "budget") and not (tensor > 0).all():
            raise ValueError(f"{name} holds numbers that are not positive")


def open_calibration(
    directory: Path | None, model_directory: Path, model: str, span: tuple[int, int]
) -> Calibration | None:
    """The calibration in `directory`, or the one that lies with the model for this cut, if any.

    Raises CheckpointError when the one that was named is of another model or cut.
    """
    if directory is not None:
        try:
            calibration = load_calibration(directory)
        except CheckpointError as error:
            raise CheckpointError(f"--calibration {error}") from error
        if (calibration.model, calibration.span) != (model, span):
            first, last = calibration.span
            raise CheckpointError(
                f"{directory} was calibrated for span {first}-{last} of the model with fingerprint "
                f"{calibration.model}, not for {span[0]}-{span[1]} of {model}"
            )
        return calibration
    shipped = default_directory(model_directory, span)
    if not shipped.is_dir():
        return None
    calibration = load_calibration(shipped)
    return calibration if (calibration.model, calibration.span) == (model, span) else None


def default_directory(model_directory: Path, span: tuple[int, int]) -> Path:
    """Where a calibration lies that comes with a model."""
    return model_directory / "calibration" / f"{span[0]}-{span[1]}"


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
