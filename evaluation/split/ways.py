"""An answer written on the device alone, in the cloud alone, and split: each pass stage by stage.

All of it runs in this process with the pieces that device and worker have, so times are those of
this machine; what a link would take for the bytes is added by a formula. Bytes are those of bodies,
or of text where only text travels; the headers of a step, 95 bytes, are not in them.

Letters: T tokens, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.link import Link
from edge_agent.text.ends import Scores
from edge_agent.text.sampler import Sampler
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.leakage.split_model import Codecs, SplitModel

DEVICE_ONLY, CLOUD_ONLY, SPLIT = "device only", "cloud only", "split"
STAGES = ("tokenize", "head", "encode", "middle", "decode", "tail", "sample")


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model: the prompt is step 0. A line of the log."""

    way: str
    codec: str
    step: int
    tokens: int  # that went in
    token_id: int  # that came out
    bytes_up: int
    bytes_down: int
    link_ms: float
    stage_ms: dict[str, float]

    @property
    def total_ms(self) -> float:
        return self.link_ms + sum(self.stage_ms.values())


class StageClock:
    """Time since the last mark goes to the stage that is named."""

    def __init__(self) -> None:
        self._spent_s = dict.fromkeys(STAGES, 0.0)
        self._marked_at = time.perf_counter()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self._spent_s[stage] += now - self._marked_at
        self._marked_at = now

    def take_ms(self) -> dict[str, float]:
        """By stage, since the last time."""
        taken = {stage: round(seconds * 1e3, 4) for stage, seconds in self._spent_s.items()}
        self._spent_s = dict.fromkeys(STAGES, 0.0)
        return taken


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What came of some tokens."""

    scores: Scores
    bytes_up: int = 0
    bytes_down: int = 0


class Way(Protocol):
    """How an answer comes to be. Keeps the KV of one session."""

    @property
    def name(self) -> str: ...

    @property
    def codec(self) -> str: ...

    def run(self, token_ids: Sequence[int], clock: StageClock) -> Pass: ...

    def take_link_ms(self, link: Link, step: int, both_ways_bytes: int) -> float: ...


class DeviceOnly:
    """The whole model where the text is. No codec, no link."""

    name, codec = DEVICE_ONLY, ""

    def __init__(self, split: SplitModel) -> None:
        self._split = split
        self._caches, self._kv = split.ends.new_caches(), split.new_kv()

    def run(self, token_ids: Sequence[int], clock: StageClock) -> Pass:
        up = self._split.ends.run_heads([(token_ids, self._caches)])[0]
        clock.mark("head")
        down = self._split.run_middle(up, self._kv)
        clock.mark("middle")
        scores = self._split.ends.run_tails([(down, self._caches)])[0][0]
        clock.mark("tail")
        return Pass(scores)

    def take_link_ms(self, link: Link, step: int, both_ways_bytes: int) -> float:
        return 0.0


class CloudOnly(DeviceOnly):
    """The whole model elsewhere: text goes there once, and text is streamed back."""

    name = CLOUD_ONLY

    def __init__(self, split: SplitModel, tokenizer: TextTokenizer) -> None:
        super().__init__(split)
        self._tokenizer = tokenizer
        self._is_asked = False

    def run(self, token_ids: Sequence[int], clock: StageClock) -> Pass:
        scores = super().run(token_ids, clock).scores
        up = 0 if self._is_asked else self._count_bytes(token_ids)
        self._is_asked = True
        return Pass(scores, up, self._count_bytes([scores.best]))

    def take_link_ms(self, link: Link, step: int, both_ways_bytes: int) -> float:
        rtt_ms = link.rtt_ms if step == 0 else 0.0  # nothing is waited for after that
        return Link(link.mbit, rtt_ms).take_ms(both_ways_bytes)

    def _count_bytes(self, token_ids: Sequence[int]) -> int:
        return len(self._tokenizer.decode(list(token_ids)).encode())


class SplitSession:
    """The ends here, the middle as if in the pool, rows through the codecs."""

    name = SPLIT

    def __init__(self, split: SplitModel, codecs: Codecs) -> None:
        self._split, self._codecs = split, codecs
        self.codec = codecs.name
        self.caches, self._kv = split.ends.new_caches(), split.new_kv()

    def run(self, token_ids: Sequence[int], clock: StageClock) -> Pass:
        rows = self._split.ends.run_heads([(token_ids, self.caches)])[0]
        clock.mark("head")
        body = self._codecs.up.encode(rows)
        clock.mark("encode")
        up = self._codecs.up.decode(body, len(rows), rows.shape[1])
        clock.mark("decode")
        return self.run_rows(up, clock, len(body))

    def run_rows(self, up: Tensor, clock: StageClock, bytes_up: int = 0) -> Pass:
        """From rows (T, D) as the pool has them."""
        rows = self._split.run_middle(up, self._kv)
        clock.mark("middle")
        codec = self._codecs.down
        uplink = up if codec.needs_uplink else None
        body = codec.encode(rows, uplink)
        clock.mark("encode")
        down = codec.decode(body, len(rows), rows.shape[1], uplink=uplink)
        clock.mark("decode")
        scores = self._split.ends.run_tails([(down, self.caches)])[0][0]
        clock.mark("tail")
        return Pass(scores, bytes_up, len(body))

    def take_link_ms(self, link: Link, step: int, both_ways_bytes: int) -> float:
        return link.take_ms(both_ways_bytes)


def write_answer(
    way: Way,
    clock: StageClock,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    link: Link | None = None,
    begun: Pass | None = None,
) -> Iterator[Step]:
    """So many tokens, greedily. The end of a text is no end here, so that all ways are as long.

    `begun` is what came of the prompt, if that has been run; `prompt` may be empty then.
    """
    sampler, text = Sampler(SamplingSettings()), list(prompt)
    new = text[:]
    for number in range(new_tokens):
        done = begun if begun is not None and number == 0 else way.run(new, clock)
        token = sampler.choose(done.scores, text)
        clock.mark("sample")
        link_ms = 0.0
        if link is not None:
            link_ms = way.take_link_ms(link, number, done.bytes_up + done.bytes_down)
        yield Step(
            way.name, way.codec, number, len(new), token, done.bytes_up, done.bytes_down,
            round(link_ms, 4), clock.take_ms(),
        )  # fmt: skip
        new = [token]
        text.append(token)
