"""A text session for one thread: its work is done as it comes, over a client of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor

from common.codecs.calibration import Calibration
from common.errors import NoWorker, StepOvertaken
from common.protocol.messages import StepKey
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.exchange import Answered, Ask
from edge_agent.text.codec_choice import CodecChooser
from edge_agent.text.drafting.drafter import DrafterSource
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import SessionSettings
from edge_agent.text.stats import GenerationStats
from edge_agent.text.text_session import TextSession
from edge_agent.text.work import (
    AwaitAnswer,
    DecodeRow,
    DropAsks,
    EncodeRows,
    EndElsewhere,
    NewToken,
    RunHead,
    RunTail,
    ScoreRows,
    SendAhead,
    Work,
)


class Session:
    """A text session with a connection of its own: its work is done here, one thing at a time.

    Raises SettingsError for a codec that cannot be used.
    """

    def __init__(
        self,
        ends: ModelEnds,
        client: BrokerClient,
        settings: SessionSettings | None = None,
        calibration: Calibration | None = None,
        pool_key: bytes | None = None,
        drafters: DrafterSource | None = None,
    ) -> None:
        """As TextSession. To choose codecs the link is measured, once for each client."""
        self._ends = ends
        self._client = client
        self._ahead: deque[StepKey] = deque()  # steps that were sent, in order
        settings = settings or SessionSettings()
        if settings.is_open:
            settings = CodecChooser(settings, calibration).choose(ends, client.measure_link())
        self._text = TextSession(ends, settings, calibration, pool_key, drafters)

    @property
    def session_id(self) -> bytes:
        return self._text.session_id

    @property
    def generation(self) -> int:
        """How often it was cut back where rows had been sent."""
        return self._text.generation

    @property
    def stats(self) -> GenerationStats:
        """Of the last answer."""
        return self._text.stats

    @property
    def ended_by_itself(self) -> bool:
        """With an end-of-sequence token."""
        return self._text.ended_by_itself

    @property
    def last_worker_id(self) -> str:
        return self._text.last_worker_id

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings,
        keep_open: bool = False,
    ) -> Generator[int, None, None]:
        """Yield new tokens until the end of the text, `max_new_tokens`, or the end of the context.

        A session that is kept open may be used again, also after an error; `end` it then. Raises
        SettingsError if the prompt does not fit into the context, NoWorker, StepRefused or
        BrokerUnavailable when the pool cannot go on.
        """
        working = self._text.answer(prompt_ids, max_new_tokens, sampling)
        try:
            result = None
            while True:
                try:
                    work = working.send(result)
                except StopIteration:
                    return
                if isinstance(work, NewToken):
                    yield work.token_id
                    result = None
                else:
                    result = self._do(work)
        finally:
            working.close()
            self._drop_ahead()
            if not keep_open:
                self.end()

    def score(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after every token of a text, (T, vocabulary), as one prompt. Ends the session."""
        working = self._text.middle_rows(token_ids)
        try:
            result = None
            while True:
                try:
                    result = self._do(working.send(result))
                except StopIteration as done:
                    return self._text.score_tail(done.value)
        finally:
            working.close()
            self.end()

    def cut_back(self, position: int) -> int:
        """Forget all rows from `position` on; returns how many are left.

        Rows that were encoded together go together, so those may be fewer than `position`.
        """
        return self._text.cut_back(position)

    def end(self) -> None:
        """Tell the pool that it may forget the session."""
        self._client.end_session(self.session_id)

    def _do(self, work: Work) -> Any:
        match work:
            case RunHead(token_ids, caches, is_prompt):
                return self._ends.run_heads([(token_ids, caches)], [is_prompt])[0]
            case RunTail(rows, caches, is_prompt, wanted):
                return self._ends.run_tails([(rows, caches)], [is_prompt], [wanted])[0]
            case ScoreRows(rows, caches):
                return self._ends.score_tail(rows, caches)
            case EncodeRows() | DecodeRow():
                return work.do()
            case EndElsewhere(session_id):
                return self._client.end_session(session_id)
            case SendAhead(ask):
                return self._ahead.append(self._client.send_ahead(ask))
            case AwaitAnswer():
                return self._await(self._ahead.popleft())
            case DropAsks():
                return self._drop_ahead()
            case Ask():
                return self._await(self._client.send_ahead(work))

    def _drop_ahead(self) -> None:
        while self._ahead:
            self._client.drop(self._ahead.popleft())

    def _await(self, key: StepKey) -> Answered | NoWorker | StepOvertaken:
        try:
            return self._client.await_answer(key)
        except (NoWorker, StepOvertaken) as error:
            return error
