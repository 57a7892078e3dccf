"""Does a defence hold? What docs/privacy.md says of them is measured by

    python -m evaluation.leakage.tryout

on the demo model (--defence for some of them). A defence holds if of 10,000 rows at most a fifth of
the tokens is recovered by someone who knows the defence and 64 of the tokens, while perplexity
rises by a tenth at most. So each is made as strong as a rise by a tenth allows, and then attacked.

Letters: T tokens, N rows, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from common.codecs.calibration import open_calibration
from common.console.processes import set_up_torch
from common.console.tables import format_table
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.demo_model import find_model
from common.weights.loading import load_span
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.leakage.adaptive import (
    PriorSearch,
    align,
    sort_by_known_rows,
    sort_by_statistics,
)
from evaluation.leakage.attacks import KNOWN_TOKENS
from evaluation.leakage.defences import (
    Defence,
    cheap_noise,
    coarse,
    draw_order,
    draw_rotation,
    erased,
    even_noise,
    sparse,
)
from evaluation.leakage.exact_search import ExactSearch
from evaluation.leakage.inversion import LinearMap, Network, RowAttack, know_plaintext
from evaluation.leakage.split_model import SplitModel
from evaluation.texts import read_prompts

ROWS = 10_000
SEARCHED_ROWS = 1_000  # by search with a prior, which takes 20 ms for each
SCORED_TEXTS = 16
ALLOWED_RISE = 10.0  # percent
LONGEST = 256  # tokens of a text
SEARCH_STEPS = 7
TOO_STRONG = (2.0, 4.0, 8.0)  # noise, as a share of the rows' deviation
DRAWN_CUTS = (1, 2, 4)
ATTACKS = (
    "prior_search", "linear_map", "network", "known_plaintext", "alignment", "statistics",
    "search_at_each_cut",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a defence costs and what it leaves; recovered by attack, in percent."""

    defence: str
    cut: str
    strength: float
    loss_percent: float
    recovered: dict[str, float]

    @property
    def strongest(self) -> float:
        return max(self.recovered.values())

    def to_row(self) -> tuple[object, ...]:
        """For the table: a column for each of ATTACKS."""
        found = [self.recovered.get(attack) for attack in ATTACKS]
        return (
            self.defence, self.cut, self.strength, self.loss_percent, *found, self.strongest,
        )  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """One cut of the model, the sessions to be protected, and the attacker's own."""

    split: SplitModel
    texts: Sequence[list[int]]
    own_texts: Sequence[list[int]]

    @functools.cached_property
    def rows(self) -> list[Tensor]:
        """Of each session, unprotected: (T, D)."""
        return [self._run(text) for text in self.texts]

    @functools.cached_property
    def tokens(self) -> Tensor:
        return torch.tensor([token for text in self.texts for token in text])

    @functools.cached_property
    def own_rows(self) -> Tensor:
        return torch.cat([self._run(text) for text in self.own_texts])

    @functools.cached_property
    def own_tokens(self) -> Tensor:
        return torch.tensor([token for text in self.own_texts for token in text])

    @functools.cached_property
    def base(self) -> float:
        """Nats per token without a defence."""
        return self._score(self.rows[:SCORED_TEXTS])

    def measure_loss(self, defence: Defence) -> float:
        """The rise of perplexity, in percent."""
        generator = torch.Generator().manual_seed(1)
        rows = [defence.protect(rows, generator) for rows in self.rows[:SCORED_TEXTS]]
        return (math.exp(self._score(rows) - self.base) - 1) * 100

    def _score(self, rows: Sequence[Tensor]) -> float:
        nats, count = 0.0, 0
        for text, up in zip(self.texts, rows, strict=False):
            log_likelihood = torch.log_softmax(self.split.score(up), dim=1)
            nats -= float(log_likelihood[:-1].gather(1, torch.tensor(text)[1:, None]).sum())
            count += len(text) - 1
        return nats / count

    def _run(self, text: list[int]) -> Tensor:
        return self.split.ends.run_heads([(text, self.split.ends.new_caches())])[0]


Maker = tuple[str, Callable[[float], Defence], float, float]


def find_strength(
    ground: Ground, make: Callable[[float], Defence], weak: float, strong: float
) -> float:
    """The strength whose loss is nearest below what is allowed, between two, on a log scale."""
    for _ in range(SEARCH_STEPS):
        between = math.sqrt(weak * strong)
        if ground.measure_loss(make(between)) <= ALLOWED_RISE:
            weak = between
        else:
            strong = between
    return weak


def judge(ground: Ground, name: str, defence: Defence, strength: float) -> Verdict:
    """Attack with all that knows of the defence, and see what it costs."""
    generator = torch.Generator().manual_seed(2)
    seen = [defence.protect(rows, generator) for rows in ground.rows]
    rows = torch.cat(seen)
    own = defence.protect(ground.own_rows, generator)
    known = know_plaintext(rows[:KNOWN_TOKENS], ground.tokens[:KNOWN_TOKENS])
    linear, network = LinearMap(own, ground.own_tokens), Network(own, ground.own_tokens)
    recovered = {
        "prior_search": _search(ground, defence, seen),
        "linear_map": _score_tokens(ground, linear.recover(rows)),
        "network": _score_tokens(ground, network.recover(rows)),
        "known_plaintext": _score_tokens(ground, known.recover(rows)),
    }
    loss = round(ground.measure_loss(defence), 2)
    return Verdict(name, ground.split.name, round(strength, 3), loss, recovered)


def judge_rotation(ground: Ground) -> Verdict:
    """A secret rotation of all channels, for workers whose rotated weights nobody knows plain.

    It costs nothing. Attacked with the known tokens alone, and with a head of the same model.
    """
    turn = draw_rotation(ground.own_rows.shape[1], torch.Generator().manual_seed(3))
    plain = torch.cat(ground.rows)
    rows = plain @ turn
    known = know_plaintext(rows[:KNOWN_TOKENS], ground.tokens[:KNOWN_TOKENS])
    found = align(rows, plain[:KNOWN_TOKENS], ground.own_rows, ground.own_tokens)
    recovered = {
        "known_plaintext": _score_tokens(ground, known.recover(rows)),
        "alignment": _score_tokens(ground, found),
    }
    return Verdict("secret rotation", ground.split.name, 1.0, 0.0, recovered)


def judge_shuffle(ground: Ground) -> Verdict:
    """Channels in an order that a seed gives, whose workers' weights are in that order as well.

    It costs nothing. Workers that put the channels back themselves have the seed, and then there is
    nothing to attack.
    """
    order = draw_order(ground.own_rows.shape[1], seed=3)
    plain = torch.cat(ground.rows)
    rows = plain[:, order]
    known = know_plaintext(rows[:KNOWN_TOKENS], ground.tokens[:KNOWN_TOKENS])
    reader = LinearMap(ground.own_rows, ground.own_tokens)
    aligned = sort_by_known_rows(rows, plain[:KNOWN_TOKENS])
    told = sort_by_statistics(rows, ground.own_rows, ground.own_tokens)
    recovered = {
        "known_plaintext": _score_tokens(ground, known.recover(rows)),
        "alignment": _score_tokens(ground, reader.recover(aligned)),
        "statistics": _score_tokens(ground, reader.recover(told)),
    }
    return Verdict("channels shuffled", ground.split.name, 1.0, 0.0, recovered)


def judge_drawn_cut(ground: Ground, cuts: Sequence[int] = DRAWN_CUTS) -> Verdict:
    """A device that draws a cut for every step, and does not say which. It costs nothing.

    The pool would need the KV of all layers behind the first of the cuts, so this is only here.
    """
    heads = load_heads(ground.split.ends.directory, cuts)
    seen = [draw_rows(heads, text, seed) for seed, text in enumerate(ground.texts)]
    own = torch.cat([draw_rows(heads, text, -1 - n) for n, text in enumerate(ground.own_texts)])
    rows = torch.cat(seen)
    maps: dict[str, RowAttack] = {
        "linear_map": LinearMap(own, ground.own_tokens),
        "network": Network(own, ground.own_tokens),
        "known_plaintext": know_plaintext(rows[:KNOWN_TOKENS], ground.tokens[:KNOWN_TOKENS]),
    }
    recovered = {name: _score_tokens(ground, each.recover(rows)) for name, each in maps.items()}
    search = ExactSearch(heads, ground.split.ends.vocabulary, ground.texts[0][0])
    codec = ground.split.make_codecs("fp32").up
    recovered["search_at_each_cut"] = _score_texts(
        ground, seen, lambda rows: search.recover(rows, codec)
    )
    return Verdict("cut drawn per step", "/".join(map(str, cuts)), 1.0, 0.0, recovered)


def load_heads(directory: Path, cuts: Sequence[int]) -> list[SpanModel]:
    """Of the layers up to each cut."""
    checkpoint = Checkpoint(directory)
    heads = [load_span(checkpoint, Span(0, cut), part="head") for cut in cuts]
    checkpoint.close()
    return heads


def draw_rows(heads: Sequence[SpanModel], text: Sequence[int], seed: int) -> Tensor:
    """Of each token the row that one of the heads gives, drawn by lot: (T, D)."""
    tokens = torch.tensor(text)
    rows = [head.embed_and_run(tokens, [Segment(head.new_kv(), 0, len(text))]) for head in heads]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(heads), (len(text),), generator=generator)
    return torch.stack(rows)[drawn, torch.arange(len(text))]


def _search(ground: Ground, defence: Defence, seen: Sequence[Tensor]) -> float:
    codecs = ground.split.make_codecs("fp32")
    search = PriorSearch(ground.split, defence, ground.texts[0][0])
    return _score_texts(ground, seen, lambda rows: search.recover(rows, codecs))


def _score_texts(
    ground: Ground, seen: Sequence[Tensor], recover: Callable[[Tensor], list[int]]
) -> float:
    """Percent that are right of the first texts' tokens, each text recovered by itself."""
    right = count = 0
    for text, rows in zip(ground.texts, seen, strict=True):
        right += sum(a == b for a, b in zip(text, recover(rows), strict=True))
        count += len(text)
        if count >= SEARCHED_ROWS:
            break
    return round(100 * right / count, 1)


def _score_tokens(ground: Ground, found: Tensor) -> float:
    """Percent that are right, of those that were not known."""
    right = (found == ground.tokens)[KNOWN_TOKENS:].float().mean()
    return round(100 * float(right), 1)


def open_ground(span: str) -> Ground:
    """The demo model at a cut, with stories from its validation text."""
    directory = find_model(None)
    split = SplitModel(directory, span)
    texts = read_prompts(
        directory / "validation.txt", TextTokenizer(directory), documents=True, length=LONGEST
    )
    victims: list[list[int]] = []
    own: list[list[int]] = []
    count = 0
    for text in texts:
        (victims if count < ROWS else own).append(text)
        count += len(text)
    return Ground(split, victims, own)


Trial = tuple[str, Callable[[], Verdict]]


def list_makers(ground: Ground) -> list[Maker]:
    """Defences that can be made stronger and stronger, and between which strengths to look."""
    rows, tokens = ground.own_rows, ground.own_tokens
    ends, width = ground.split.ends, ground.own_rows.shape[1]
    cut = (ends.cut.begin, ends.cut.end)
    known = open_calibration(None, ends.directory, ends.fingerprint, cut)
    makers: list[Maker] = [("even noise", lambda s: even_noise(rows, s), 0.01, 10)]
    if known is not None:
        inverse = known.up.fisher_inverse
        makers.append(("noise where it is cheap", lambda s: cheap_noise(inverse, s), 1e-3, 10))
    return [
        *makers,
        ("fewer values kept", lambda s: sparse(rows, max(1, round(width / s))), 1, width),
        ("telling directions erased", lambda s: erased(rows, tokens, round(s)), 1, width),
    ]


def list_trials(ground: Ground) -> list[Trial]:
    """Each defence as strong as the allowed loss lets it be, and noise that is too strong."""
    rows = ground.own_rows
    return [
        *((maker[0], partial(_judge_strongest, ground, maker)) for maker in list_makers(ground)),
        ("codec bool", lambda: judge(ground, "codec bool", coarse(rows, "bool"), 1.0)),
        ("secret rotation", lambda: judge_rotation(ground)),
        ("channels shuffled", lambda: judge_shuffle(ground)),
        ("cut drawn per step", lambda: judge_drawn_cut(ground)),
        *(("too much noise", partial(_judge_noise, ground, s)) for s in TOO_STRONG),
    ]


def _judge_strongest(ground: Ground, maker: Maker) -> Verdict:
    name, make, weak, strong = maker
    strength = find_strength(ground, make, weak, strong)
    return judge(ground, name, make(strength), strength)


def _judge_noise(ground: Ground, strength: float) -> Verdict:
    return judge(ground, "too much noise", even_noise(ground.own_rows, strength), strength)


@click.command()
@click.option("--span", "spans", multiple=True, default=("2:6", "6:7"), show_default=True)
@click.option("--defence", "names", multiple=True, help="Only this; repeat it for several.")
def main(spans: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Try every defence at each cut."""
    set_up_torch(threads=1)
    verdicts = []
    for span in spans:
        for name, run in list_trials(open_ground(span)):
            if not names or name in names:
                verdicts.append(run())
                click.echo(f"{name}: {verdicts[-1].strongest}%", err=True)
    headers = ("defence", "cut", "strength", "loss_percent", *ATTACKS, "strongest")
    click.echo(format_table(headers, [verdict.to_row() for verdict in verdicts]))


if __name__ == "__main__":
    main()
