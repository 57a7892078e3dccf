"""Refuse a model whose family would be computed wrongly: cut a small twin of it and compare.

A twin has the model's own class and switches, few narrow layers and random weights. It is written
to a directory, run whole by transformers, and run cut by the code that loads and runs real models.
Guards that know of single modules and arguments say better what is wrong; this one needs to know
nothing, so no family slips past it, nor a new release of transformers.

The verdict is remembered by all it depends on: the configuration, the libraries, our own source.

What a twin cannot show: a difference that needs thousands of tokens, or values that only training
gives; and weights are written as this release writes them, so names of older checkpoints are not
tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from common.errors import CheckpointError, in_one_line
from common.spans.attention import Segment
from common.spans.cut import Cut
from common.spans.span_model import SpanModel
from common.spans.twin_config import Kind, keep_layers, kind_of, layers_name, narrow, pick_layers
from common.weights.checkpoint import VOLATILE_KEYS, Checkpoint
from common.weights.loading import find_decoder, load_span

SOURCES = [Path(__file__).resolve().parents[1] / name for name in ("spans", "weights")]
TOLERANCE = 1e-4  # of the largest logit, in float32: 50 times what another order of adding makes
DEPTHS = (4, 6, 8, 12, 16, 24)  # layers tried until every kind is there
PROMPT, LENGTH, FIRST_PIECE = 12, 16, 7  # tokens
SEED = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why models of a configuration are refused, or None if they are computed right."""

    refusal: str | None


def check_twin(config: Any, cache_directory: Path | None = None) -> None:
    """Raise CheckpointError unless a small twin of the configured model survives being cut."""
    path = (cache_directory or _cache_directory()) / f"{_digest(config)}.json"
    verdict = _read_verdict(path)
    if verdict is None:
        verdict, is_lasting = _judge(config)
        if is_lasting:
            _write_verdict(path, verdict)
    if verdict.refusal is not None:
        raise CheckpointError(verdict.refusal)


def largest_difference(config: Any, directory: Path) -> float:
    """The largest difference of logits, cut against whole, as a share of the largest logit.

    `directory` is empty and takes the twin. Raises whatever cutting or running it raises.
    """
    whole = _write_twin(config, directory)
    count = whole.config.num_hidden_layers
    ids = torch.randint(1, whole.config.vocab_size, (LENGTH,), generator=_generator())
    wanted = _run_whole(whole, ids)
    checkpoint = Checkpoint(directory)
    parts = _Parts(checkpoint, _twin_cut(count), count)
    checkpoint.close()
    return max(_difference(got, wanted) for got in parts.run_in_all_ways(ids))


def _judge(config: Any) -> tuple[Verdict, bool]:
    """The verdict, and whether it would be the same again (a full disk says nothing lasting)."""
    kind = config.model_type
    try:
        with tempfile.TemporaryDirectory(prefix="midspan-twin-") as name, _own_randomness():
            difference = largest_difference(config, Path(name))
    except CheckpointError as error:
        message = str(error).replace(name, f"a small {kind} model of its configuration")
        return Verdict(message), True
    except (OSError, MemoryError) as error:
        return Verdict(f"{kind} models cannot be checked here: {in_one_line(error)}"), False
    except Exception as error:  # whatever a foreign model's code raises, it cannot be cut
        words = f"{type(error).__name__}: {in_one_line(error)}"
        return Verdict(f"{kind} models cannot be cut: a small one fails with {words}"), True
    if difference <= TOLERANCE:  # false for NaN
        return Verdict(None), True
    return Verdict(
        f"{kind} models would be computed wrongly: cut in three, a small one has logits that "
        f"differ by {difference:.1e} of the largest; {TOLERANCE:.0e} is allowed"
    ), True


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _write_twin(config: Any, directory: Path) -> Any:
    """Save a twin of random weights, and return it. Raises CheckpointError if there is none."""
    values, name = narrow(config), layers_name(config)
    kinds = _kinds(_configure(config, values, directory))
    for depth in sorted({min(depth, len(kinds)) for depth in DEPTHS}):
        kept = keep_layers(values, name, pick_layers(kinds, depth))
        small = _configure(config, kept, directory)
        if set(kinds) <= set(_kinds(small)):
            return _save_random(small, directory)
    raise CheckpointError(
        f"{config.model_type} models cannot be checked: this one has {len(set(kinds))} kinds of "
        f"layers, which do not all appear in a model of {DEPTHS[-1]} layers"
    )


def _configure(config: Any, values: dict[str, Any], directory: Path) -> Any:
    """The configuration that loading a directory with these values gives."""
    dropped = {"dtype", "torch_dtype", "architectures", "_name_or_path"}
    kept = {name: value for name, value in values.items() if name not in dropped}
    (directory / "config.json").write_text(json.dumps(kept | {"model_type": config.model_type}))
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _kinds(config: Any) -> list[Kind]:
    with torch.device("meta"):
        model = _build(config)
    decoder, name = find_decoder(model, config.num_hidden_layers)
    return [kind_of(layer) for layer in getattr(decoder, name)]


def _build(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    ).eval()


@torch.no_grad()
def _save_random(config: Any, directory: Path) -> Any:
    """Everything that a checkpoint holds gets values of its own, persistent buffers too."""
    model = _build(config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(directory)
    return model


def _twin_cut(count: int) -> Cut:
    """A quarter of the layers on each side, but something on each side where that can be."""
    side = max(1, count // 4)
    return Cut(side, count - side) if count > 2 else Cut(count - 1, count)


@torch.inference_mode()
def _run_whole(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits after each token, (T, vocabulary): the prompt in one step, then one by one."""
    cache = DynamicCache(config=model.config)
    steps = [ids[:PROMPT], *torch.split(ids[PROMPT:], 1)]
    return torch.cat([model(step[None], past_key_values=cache).logits[0] for step in steps])


class _Parts:
    """Head, middle and tail of a twin."""

    def __init__(self, checkpoint: Checkpoint, cut: Cut, count: int) -> None:
        self._parts: list[SpanModel] = [
            load_span(checkpoint, cut.head(), part="head"),
            load_span(checkpoint, cut.middle),
            load_span(checkpoint, cut.tail(count), part="tail"),
        ]

    def run_in_all_ways(self, ids: Tensor) -> list[Tensor]:
        """Logits after each token: with a prompt and single tokens, in two pieces, in a batch."""
        one_by_one = [PROMPT] + [1] * (LENGTH - PROMPT)
        return [
            self._run(ids, one_by_one),
            self._run(ids, [FIRST_PIECE, LENGTH - FIRST_PIECE]),
            self._run_beside_another(ids),
        ]

    def _run(self, ids: Tensor, pieces: Sequence[int]) -> Tensor:
        head, middle, tail = self._parts
        caches = [part.new_kv() for part in self._parts]
        logits, start = [], 0
        for piece in torch.split(ids, list(pieces)):
            segments = [Segment(kv, start, len(piece)) for kv in caches]
            rows = middle.run(head.embed_and_run(piece, [segments[0]]), [segments[1]])
            logits.append(tail.logits(rows, segments[2], last=len(piece)))
            start += len(piece)
        return torch.cat(logits)

    def _run_beside_another(self, ids: Tensor) -> Tensor:
        """The middle computes the end of the text in one batch with the beginning of another."""
        head, middle, tail = self._parts
        rows = head.embed_and_run(ids, [Segment(head.new_kv(), 0, LENGTH)])
        ours, other = middle.new_kv(), middle.new_kv()
        early = middle.run(rows[:PROMPT], [Segment(ours, 0, PROMPT)])
        both = torch.cat([rows[3:9], rows[PROMPT:]])
        segments = [Segment(other, 0, 6), Segment(ours, PROMPT, LENGTH - PROMPT)]
        rows = torch.cat([early, middle.run(both, segments)[6:]])
        return tail.logits(rows, Segment(tail.new_kv(), 0, LENGTH), last=LENGTH)


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _cache_directory() -> Path:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        base = Path(os.devnull)  # holds nothing and takes nothing
    return base / "midspan" / "twins"


def _digest(config: Any) -> str:
    """Names a verdict by what it depends on."""
    values = {k: v for k, v in config.to_dict().items() if k not in VOLATILE_KEYS}
    digest = hashlib.sha256(f"{transformers.__version__} {torch.__version__}".encode())
    for source in sorted(path for folder in SOURCES for path in folder.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _read_verdict(path: Path) -> Verdict | None:
    try:
        refusal = json.loads(path.read_text(encoding="utf-8"))["refusal"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Verdict(refusal) if refusal is None or isinstance(refusal, str) else None


def _write_verdict(path: Path, verdict: Verdict) -> None:
    """Whole or not at all; where nothing can be written, the next start computes it again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"refusal": verdict.refusal}), encoding="utf-8")
        partial.replace(path)
