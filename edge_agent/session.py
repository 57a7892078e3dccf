"""One session: a prompt goes through head, pool and tail, and comes out token by token.

The session owns what nobody else needs to keep: the KV of head and tail, and the replay log of
encoded boundary rows, from which the pool can have any KV computed again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.codecs import DEFAULT_CODEC, find_codec
from common.errors import NonFiniteError, ProtocolError, SettingsError
from common.messages import NeedRows, Step, StepReply
from common.settings import PREFILL_ROWS
from edge_agent.client import BrokerClient
from edge_agent.ends import ModelEnds
from edge_agent.replay_log import ReplayLog
from edge_agent.sampler import Sampler, SamplingSettings
from edge_agent.stats import GenerationStats


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a session talks to the pool."""

    codec: str = DEFAULT_CODEC
    reply_codec: str = DEFAULT_CODEC
    prefill_rows: int = PREFILL_ROWS
    step_deadline_s: float = 60.0


class Session:
    """A conversation with the pool. Raises SettingsError for an unknown codec."""

    def __init__(
        self, ends: ModelEnds, client: BrokerClient, settings: SessionSettings | None = None
    ) -> None:
        self.session_id = secrets.token_bytes(16)
        self.stats = GenerationStats()
        self._ends = ends
        self._client = client
        self._settings = settings or SessionSettings()
        self._codec = find_codec(self._settings.codec)
        self._reply_codec = find_codec(self._settings.reply_codec)
        self._caches = ends.new_caches()
        self._log = ReplayLog(self._codec.row_bytes(ends.hidden))
        self._generation = 0
        self._fork = 0
        self._step = 0
        self._answered = False  # a worker has answered in this session
        self.ended_by_itself = False  # with an end-of-sequence token
        self.last_worker_id = ""

    def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, sampling: SamplingSettings
    ) -> Generator[int, None, None]:
        """Yield new tokens until the end of the text, `max_new_tokens`, or the end of the context.

        Raises SettingsError if the prompt does not fit into the context, NoWorker, StepRefused or
        BrokerUnavailable when the pool cannot go on.
        """
        limit = self._check_length(len(prompt_ids), max_new_tokens)
        sampler = Sampler(sampling)
        token_ids = list(prompt_ids)
        started_at = time.monotonic()
        self.stats.prompt_tokens = len(token_ids)
        try:
            logits = self._run(token_ids, is_prompt=True)
            for index in range(limit):
                token = sampler.pick(logits, token_ids)
                self._count_token(index, started_at)
                yield token
                token_ids.append(token)
                self.ended_by_itself = token in self._ends.eos_ids
                if self.ended_by_itself or index + 1 == limit:
                    return
                logits = self._run([token], is_prompt=False)
        finally:
            self._client.end_session(self.session_id)

    def _count_token(self, index: int, started_at: float) -> None:
        stats = self.stats
        stats.new_tokens += 1
        stats.total_s = time.monotonic() - started_at
        stats.bytes_up, stats.bytes_down = self._client.bytes_up, self._client.bytes_down
        stats.asked_again = self._client.asked_again
        if index == 0:
            stats.first_token_s = stats.total_s
            stats.prompt_bytes_up, stats.prompt_bytes_down = stats.bytes_up, stats.bytes_down

    def _check_length(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """How many tokens may be generated."""
        if max_new_tokens < 1:
            raise SettingsError(f"the number of new tokens is {max_new_tokens}; expected 1 or more")
        context = self._ends.context
        if context is None:
            return max_new_tokens
        if prompt_tokens >= context:
            raise SettingsError(
                f"the prompt has {prompt_tokens} tokens; {self._ends.name} has a context of "
                f"{context}, so at most {context - 1} leave room for an answer"
            )
        return min(max_new_tokens, context - prompt_tokens)

    def _run(self, token_ids: Sequence[int], is_prompt: bool) -> Tensor:
        """Head, pool and tail for the next tokens; logits after the last of them, (vocabulary,)."""
        head_at = time.monotonic()
        boundary = self._ends.run_head(token_ids, self._caches)
        start = len(self._log)
        self._log.append(self._codec.encode(boundary))
        sent_at = time.monotonic()
        rows, in_pool = self._compute_middle(start, len(self._log))
        back_at = time.monotonic()
        logits = self._ends.run_tail(rows, self._caches)
        done_at = time.monotonic()
        if not is_prompt:
            queue_s, middle_s = in_pool
            self.stats.add_stage("head", sent_at - head_at)
            self.stats.add_stage("network", max(0.0, back_at - sent_at - queue_s - middle_s))
            self.stats.add_stage("queue", queue_s)
            self.stats.add_stage("middle", middle_s)
            self.stats.add_stage("tail", done_at - back_at)
        return logits

    def _compute_middle(self, start: int, end: int) -> tuple[Tensor, tuple[float, float]]:
        """Have the pool compute rows start..end of the log, replaying earlier ones if it must.

        Returns the rows (end - start, D) and the seconds spent in queues and in the middle layers.
        """
        parts: list[Tensor] = []
        position, queue_s, middle_s = start, 0.0, 0.0
        while position < end:
            chunk_end = min(end, position + self._settings.prefill_rows)
            reply_rows = max(0, chunk_end - max(position, start))
            answer, body = self._send(position, chunk_end, reply_rows)
            if isinstance(answer, NeedRows):
                if answer.have >= position:
                    raise ProtocolError(
                        f"worker {answer.worker_id} asks for rows from {answer.have} on, "
                        f"which a step at {position} has sent"
                    )
                self.stats.rows_replayed += position - answer.have
                received = max(0, answer.have - start)
                parts = [torch.cat(parts)[:received]] if parts and received else []
                position = answer.have
                continue
            if reply_rows:
                parts.append(self._decode(answer, body, reply_rows))
                self.stats.tokens_by_worker[answer.worker_id] += reply_rows
            self.stats.committed = answer.committed
            self.last_worker_id = answer.worker_id
            queue_s += answer.queue_us / 1e6
            middle_s += answer.compute_us / 1e6
            position = chunk_end
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), (queue_s, middle_s)

    def _send(self, position: int, end: int, reply_rows: int) -> tuple[StepReply | NeedRows, bytes]:
        settings = self._settings
        step = Step(
            session_id=self.session_id,
            generation=self._generation,
            fork=self._fork,
            step=self._step,
            position=position,
            rows=end - position,
            reply_rows=reply_rows,
            hidden=self._ends.hidden,
            codec=self._codec.name,
            reply_codec=self._reply_codec.name,
            model=self._ends.fingerprint,
            span=(self._ends.cut.begin, self._ends.cut.end),
            deadline_ms=round(settings.step_deadline_s * 1000),
        )
        self._step += 1
        body = self._log.read(position, end)
        answer, answer_body = self._client.ask(step, body, wait_for_worker=self._answered)
        self._answered = True
        assert isinstance(answer, StepReply | NeedRows)
        return answer, answer_body

    def _decode(self, reply: StepReply, body: bytes, rows: int) -> Tensor:
        try:
            return self._reply_codec.decode(body, rows, self._ends.hidden, self._ends.tail.dtype)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"worker {reply.worker_id} answered with bad rows: {error}"
            ) from error
