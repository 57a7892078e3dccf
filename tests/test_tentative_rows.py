"""Rows that may be taken back: an edge that drafts, mostly wrongly, writes what others write."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator

import pytest
import torch
from pools import PROMPTS

from common.codecs.codec import make_codec
from common.errors import StepRefused
from common.protocol.messages import Need, Opening, Part, Step, StepReply
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.exchange import Ask
from edge_agent.text.ends import ModelEnds
from edge_agent.text.replay_log import ReplayLog, parts_of
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 40
CODEC = "fp32"


class DraftingEdge:
    """Greedy decoding, several tokens in a step: what the model would not have said is taken back.

    It guesses the true continuation with a probability, so that drafts are right up to any token.
    """

    def __init__(
        self, ends: ModelEnds, client: BrokerClient, draft: int, seed: int, wanders: bool = False
    ) -> None:
        """One that `wanders` has each step computed by another worker than the last."""
        self._ends, self._client, self._draft, self._wanders = ends, client, draft, wanders
        self._rng = random.Random(seed)
        self._session_id = secrets.token_bytes(16)
        part = str(ends.cut.middle)
        self._opening = Opening(ends.fingerprint, [part], ends.hidden, [CODEC], "")
        self._caches = ends.new_caches()
        self._log = ReplayLog()
        self._number = 0
        self._up, self._down = make_codec(CODEC, "up"), make_codec(CODEC, "down")
        self.last_worker = ""
        self.taken_back = 0
        self.rows_replayed = 0

    def write(self, prompt: list[int], truth: list[int]) -> Iterator[int]:
        """The tokens after a prompt; `truth` is what drafts are guessed from."""
        written: list[int] = []
        guesses = self._compute(prompt, tentative=0)[-1:]
        while len(written) < COUNT:
            token = guesses[0]
            written.append(token)
            yield token
            drafts = self._guess(truth, len(written))
            said = self._compute([token, *drafts], tentative=len(drafts))
            right = 0
            while right < len(drafts) and drafts[right] == said[right]:
                right += 1
            self._take_back(len(drafts) - right)
            for draft in drafts[:right]:
                if len(written) < COUNT:
                    written.append(draft)
                    yield draft
            guesses = [said[right]]

    def _guess(self, truth: list[int], at: int) -> list[int]:
        wrong_from = self._rng.randrange(self._draft + 1)
        drafts = truth[at : at + self._draft]
        return [t if i < wrong_from else self._rng.randrange(1000) for i, t in enumerate(drafts)]

    def _take_back(self, count: int) -> None:
        if count:
            self.taken_back += count
            left = len(self._log) - count
            for cache in (self._caches.head, self._caches.tail):
                cache.length = left
            self._log.cut_back(left)

    def _compute(self, token_ids: list[int], tentative: int) -> list[int]:
        """Run tokens through head, pool and tail; the best token after each of them."""
        start = len(self._log)
        (rows,) = self._ends.run_heads([(token_ids, self._caches)])
        for row in rows:  # each by itself: any of them may be taken back
            self._log.append(1, 0, self._up.encode(row[None]))
        position, results = start, torch.empty(0, self._ends.hidden)
        while position < len(self._log):
            pieces = self._log.read(position, 256)
            last = pieces[-1].end
            wanted = max(0, last - max(position, start))
            drafts = max(0, last - (len(self._log) - tentative))
            step = Step(
                self._session_id, 0, 0, self._number, pieces[0].start, parts_of(pieces), wanted,
                0, 60_000, shun=self.last_worker if self._wanders else "", tentative=drafts,
            )  # fmt: skip
            self._number += 1
            body = b"".join(piece.body for piece in pieces)
            answered = self._client.exchange(Ask(step, body, self._opening, False, True))
            answer = answered.answer
            self.last_worker = answer.worker_id
            if isinstance(answer, Need):
                self.rows_replayed += position - answer.have
                results = results[: max(0, answer.have - start)]
                position = answer.have
                continue
            assert isinstance(answer, StepReply)
            if wanted:
                down = self._down.decode(answered.body, wanted, self._ends.hidden)
                results = torch.cat([results, down])
            position = last
        logits = self._ends.score_tail(results, self._caches)
        best: list[int] = logits.argmax(-1).tolist()
        return best

    def end(self) -> None:
        self._client.end_session(self._session_id)


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=3, model="stories-llama")) as running:
        yield running


def reference_of(whole_model: torch.nn.Module, prompt_ids: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    tokens: list[int] = whole_model.generate(ids, max_new_tokens=count, **options)[0].tolist()
    return tokens[len(prompt_ids) :]


@pytest.mark.parametrize("draft", range(9))
def test_drafts_of_any_length_change_no_token_while_workers_are_killed(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module, draft: int
) -> None:
    prompt = TextTokenizer(demo_ends.directory).encode(PROMPTS[draft])
    truth = reference_of(whole_model, prompt, COUNT + draft + 1)
    client = pool.connect()
    edge = DraftingEdge(demo_ends, client, draft, seed=draft)
    got = []
    for index, token in enumerate(edge.write(prompt, truth)):
        got.append(token)
        if index in (12, 25):
            pool.kill_worker(edge.last_worker)
            pool.start_worker()
    assert got[:COUNT] == truth[:COUNT]
    assert edge.taken_back > 0 or draft == 0
    edge.end()
    client.close()
    pool.wait_for_workers(3)


def test_workers_that_have_seen_other_drafts_forget_them(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    prompt = TextTokenizer(demo_ends.directory).encode(PROMPTS[3])
    truth = reference_of(whole_model, prompt, COUNT + 6)
    client = pool.connect()
    for seed in range(4):
        edge = DraftingEdge(demo_ends, client, 5, seed, wanders=True)
        assert list(edge.write(prompt, truth))[:COUNT] == truth[:COUNT]
        assert edge.taken_back > 10
        edge.end()
    client.close()


def test_drafts_do_not_reach_the_store(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    """All workers die after a step with drafts: what is loaded are the rows before them."""
    prompt = TextTokenizer(demo_ends.directory).encode(PROMPTS[5])
    truth = reference_of(whole_model, prompt, COUNT + 9)
    client = pool.connect()
    edge = DraftingEdge(demo_ends, client, 8, seed=11)
    got = []
    for index, token in enumerate(edge.write(prompt, truth)):
        got.append(token)
        if index == 20:
            time.sleep(0.3)  # what is committed is committed
            for name in sorted(pool.workers):
                pool.kill_worker(name)
                pool.start_worker()
    assert got[:COUNT] == truth[:COUNT]
    assert edge.rows_replayed < len(prompt)  # the store had the others
    edge.end()
    client.close()
    pool.wait_for_workers(3)


def test_more_drafts_than_rows_are_refused(pool: LocalPool, demo_ends: ModelEnds) -> None:
    client = pool.connect()
    opening = Opening(demo_ends.fingerprint, ["2-6"], demo_ends.hidden, [CODEC], "")
    body = bytes(4 * demo_ends.hidden)
    step = Step(
        secrets.token_bytes(16), 0, 0, 0, 0, [Part(0, [1], len(body))], 1, 0, 9000, tentative=2
    )
    with pytest.raises(StepRefused, match="step calls 2 of its 1 rows tentative"):
        client.ask(step, body, opening, is_known=False, wait_for_worker=False)
    client.close()
