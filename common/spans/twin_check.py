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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from common.errors import CheckpointError, in_one_line
from common.spans.attention import Segment
from common.spans.cut import Cut
from common.spans.kv_rows import ByteRows, KvRows
from common.spans.passage import choose_arguments, name_cache
from common.spans.span_model import SpanModel
from common.spans.twin_config import Kind, keep_layers, kind_of, layers_name, narrow, pick_layers
from common.weights.checkpoint import VOLATILE_KEYS, Checkpoint
from common.weights.loading import load_span
from common.weights.shapes import build_without_values
from common.weights.whole_model import find_decoder

SOURCES = [Path(__file__).resolve().parents[1] / name for name in ("spans", "weights")]
TOLERANCE = 1e-4  # of the largest logit, in float32: 50 times what another order of adding makes
DEPTHS = (4, 6, 8, 12, 16, 24)  # layers tried until every kind is there
PROMPT, LENGTH, OTHER = 12, 16, 6  # tokens
PIECES = ([PROMPT] + [1] * (LENGTH - PROMPT), [7, LENGTH - 7])  # a text is run in
SEED = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why models of a configuration are refused, or None if they are computed right."""

    refusal: str | None
    packs: bool = True  # whether sessions may go through together


def check_twin(config: Any, cache_directory: Path | None = None) -> bool:
    """Whether sessions of the configured model may go through its parts together.

    Raises CheckpointError unless a small twin of it survives being cut.
    """
    path = (cache_directory or _cache_directory()) / f"{_digest(config)}.json"
    verdict = _read_verdict(path)
    if verdict is None:
        verdict, is_lasting = _judge(config)
        if is_lasting:
            _write_verdict(path, verdict)
    if verdict.refusal is not None:
        raise CheckpointError(verdict.refusal)
    return verdict.packs


@dataclass(frozen=True, slots=True)
class Comparison:
    """A cut model beside the whole one."""

    same_bits: bool  # of all logits, run in the same pieces
    difference: float  # the largest of logits, in whatever pieces, as a share of the largest logit
    packs_sessions: bool

    @property
    def is_right(self) -> bool:
        return self.difference <= TOLERANCE  # false for NaN


def compare(whole: Any, directory: Path, cut: Cut) -> Comparison:
    """Run a model that was saved in `directory` whole, and cut in all ways that sessions are run.

    If it comes out differently where sessions go through together, they go one at a time.

    Raises whatever cutting or running it raises.
    """
    vocabulary = whole.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (LENGTH,), generator=_generator())
    wanted = [_run_whole(whole, ids, pieces) for pieces in PIECES]
    comparison = _compare_with(wanted, ids, directory, cut, count_layers(whole), packs=True)
    if comparison.packs_sessions and not comparison.is_right:
        return _compare_with(wanted, ids, directory, cut, count_layers(whole), packs=False)
    return comparison


def _compare_with(
    wanted: Sequence[Tensor], ids: Tensor, directory: Path, cut: Cut, count: int, packs: bool
) -> Comparison:
    checkpoint = Checkpoint(directory)
    parts = _Parts(checkpoint, cut, count, packs)
    checkpoint.close()
    got = [parts.run(ids, pieces) for pieces in PIECES]
    beside = parts.run_beside_another(ids)
    differences = [_difference(logits, wanted[0]) for logits in got]
    differences.append(_difference(beside, torch.cat([wanted[0][:PROMPT], wanted[0][-1:]])))
    if parts.keep_states:
        differences += [_difference(g, wanted[0][-len(g) :]) for g in parts.run_from_states(ids)]
    return Comparison(
        same_bits=all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)),
        difference=max(differences, key=lambda d: (d != d, d)),  # NaN is the largest
        packs_sessions=packs and parts.packs_sessions,
    )


def count_layers(model: Any) -> int:
    count: int = model.config.get_text_config().num_hidden_layers
    return count


def _judge(config: Any) -> tuple[Verdict, bool]:
    """The verdict, and whether it would be the same again (a full disk says nothing lasting)."""
    kind = config.model_type
    try:
        with tempfile.TemporaryDirectory(prefix="midspan-twin-") as name, _own_randomness():
            whole = write_twin(config, Path(name))
            comparison = compare(whole, Path(name), _twin_cut(count_layers(whole)))
    except (OSError, MemoryError) as error:
        return Verdict(f"{kind} models cannot be checked here: {in_one_line(error)}"), False
    except Exception as error:  # whatever a foreign model's code raises, it cannot be cut
        return Verdict(explain_error(error, kind, name)), True
    return Verdict(explain_difference(comparison, kind), comparison.packs_sessions), True


def explain_error(error: Exception, kind: str, directory: str) -> str:
    """Why a model is refused whose twin, written to `directory`, could not be cut or run."""
    if isinstance(error, CheckpointError):
        return str(error).replace(directory, f"a small {kind} model of its configuration")
    words = f"{type(error).__name__}: {in_one_line(error)}"
    return f"{kind} models cannot be cut: a small one fails with {words}"


def explain_difference(comparison: Comparison, kind: str) -> str | None:
    """Why a model is refused whose twin comes out like this; None if it is not."""
    if comparison.is_right:
        return None
    return (
        f"{kind} models would be computed wrongly: cut in three, a small one has logits that "
        f"differ by {comparison.difference:.1e} of the largest; {TOLERANCE:.0e} is allowed"
    )


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def write_twin(config: Any, directory: Path) -> Any:
    """Save a twin of random weights, and return it. Raises CheckpointError if there is none."""
    values, name = narrow(config), layers_name(config)
    kinds = _kinds(_configure(config, values, directory))
    for depth in sorted({min(depth, len(kinds)) for depth in DEPTHS}):
        kept = keep_layers(values, name, pick_layers(kinds, depth))
        small = _configure(config, kept, directory)
        if set(kinds) <= set(_kinds(small)):
            return save_random(_build(small), directory)
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
    model = build_without_values(lambda: _build(config))
    decoder, name = find_decoder(model, config.num_hidden_layers)
    return [kind_of(layer) for layer in getattr(decoder, name)]


def _build(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    ).eval()


@torch.no_grad()
def save_random(model: Any, directory: Path) -> Any:
    """Everything that a checkpoint holds gets values of its own, persistent buffers too."""
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
def _run_whole(model: nn.Module, ids: Tensor, pieces: Sequence[int]) -> Tensor:
    """Logits after each token, (T, vocabulary)."""
    cache = DynamicCache(config=model.config)
    logits, start = [], 0
    for piece in torch.split(ids, list(pieces)):
        given = choose_arguments(model, len(piece), start)
        given[name_cache(model)] = cache
        output = model(input_ids=piece[None], use_cache=True, **given)
        logits.append(output.logits[0])
        start += len(piece)
    return torch.cat(logits)


class _Parts:
    """Head, middle and tail of a twin."""

    def __init__(self, checkpoint: Checkpoint, cut: Cut, count: int, packs: bool) -> None:
        self._parts: list[SpanModel] = [
            load_span(checkpoint, cut.head(), part="head", packs=packs),
            load_span(checkpoint, cut.middle, packs=packs),
            load_span(checkpoint, cut.tail(count), part="tail", packs=packs),
        ]

    @property
    def packs_sessions(self) -> bool:
        return all(part.packs_sessions for part in self._parts)

    @property
    def keep_states(self) -> bool:
        return any(part.keeps_states for part in self._parts)

    def run(self, ids: Tensor, pieces: Sequence[int]) -> Tensor:
        """Logits after each token, (T, vocabulary)."""
        return self._run_on(ids, pieces, [part.new_kv() for part in self._parts], 0)

    def _run_on(
        self, ids: Tensor, pieces: Sequence[int], caches: Sequence[KvRows], start: int
    ) -> Tensor:
        """Logits after each token of a text that goes on at row `start`."""
        head, middle, tail = self._parts
        logits = []
        for piece in torch.split(ids, list(pieces)):
            segments = [Segment(kv, start, len(piece)) for kv in caches]
            rows = middle.run(head.embed_and_run(piece, [segments[0]]), [segments[1]])
            logits.append(tail.logits(rows, segments[2], last=len(piece)))
            start += len(piece)
        return torch.cat(logits)

    def run_from_states(self, ids: Tensor) -> list[Tensor]:
        """Ends of the text as computed after a cut-back, and from what a store would bring.

        What was cut off is other tokens, which nothing may remember.
        """
        caches = [part.new_kv() for part in self._parts]
        ends = []
        self._run_on(ids[:PROMPT], [PROMPT], caches, 0)
        for pieces in ([1, 1], [LENGTH - PROMPT]):
            self._run_on(ids[: sum(pieces)], pieces, caches, PROMPT)
            for kv in caches:
                kv.cut_back(PROMPT)
            ends.append(self._run_on(ids[PROMPT:], [LENGTH - PROMPT], caches, PROMPT))
            for kv in caches:
                kv.cut_back(PROMPT)
        copies = [_copy(part, kv, PROMPT) for part, kv in zip(self._parts, caches, strict=True)]
        ends.append(self._run_on(ids[PROMPT:], [1] * (LENGTH - PROMPT), copies, PROMPT))
        return ends

    def run_beside_another(self, ids: Tensor) -> Tensor:
        """The end of the text in one batch with another's beginning: its prompt's logits, its last.

        All parts compute both sessions in one batch.
        """
        head, middle, tail = self._parts
        ours, other = ([part.new_kv() for part in self._parts] for _ in range(2))
        first = [Segment(kv, 0, PROMPT) for kv in ours]
        rows = middle.run(head.embed_and_run(ids[:PROMPT], [first[0]]), [first[1]])
        early = tail.logits(rows, first[2], last=PROMPT)
        both = [
            [Segment(o, 0, OTHER), Segment(kv, PROMPT, LENGTH - PROMPT)]
            for o, kv in zip(other, ours, strict=True)
        ]
        rows = head.embed_and_run(torch.cat([ids[3 : 3 + OTHER], ids[PROMPT:]]), both[0])
        last = tail.chosen_logits(middle.run(rows, both[1]), both[2], [1, 1])
        return torch.cat([early, last[1:]])


def _copy(part: SpanModel, kv: KvRows, rows: int) -> KvRows:
    """The first rows of a session, and their state, by way of their bytes."""
    copy = part.new_kv()
    stored = np.frombuffer(kv.read_bytes(0, rows), np.uint8).reshape(rows, -1)

    def read(into: ByteRows) -> int:
        into[:] = stored
        return rows

    copy.length = copy.take_rows(0, rows, read)
    if kv.states is not None and copy.states is not None:
        state = copy.states.unpack(kv.states.pack(kv.states.newest(rows)))
        assert state is not None, "a state is not what was packed"
        copy.states.adopt(state)
    return copy


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
        values = json.loads(path.read_text(encoding="utf-8"))
        refusal, packs = values["refusal"], values["packs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_sound = (refusal is None or isinstance(refusal, str)) and isinstance(packs, bool)
    return Verdict(refusal, packs) if is_sound else None


def _write_verdict(path: Path, verdict: Verdict) -> None:
    """Whole or not at all; where nothing can be written, the next start computes it again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(verdict)), encoding="utf-8")
        partial.replace(path)
