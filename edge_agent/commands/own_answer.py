"""An answer that `midspan ask` makes by itself: the model's ends are loaded here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.console.processes import freeze_loaded_objects, set_up_torch
from common.errors import SettingsError
from edge_agent.commands.question import Means, Question

if TYPE_CHECKING:
    from edge_agent.text.tokenizer import TextTokenizer


def encode_question(question: Question, tokenizer: TextTokenizer) -> list[int]:
    """The ids that the answer follows. Raises SettingsError."""
    if not question.system:
        return tokenizer.encode(question.prompt)
    if not tokenizer.has_chat_template:
        raise SettingsError(
            "the model's tokenizer has no chat template, so --system has no place; `midspan chat "
            "--chat-template FILE` takes one"
        )
    messages = [
        {"role": "system", "content": question.system},
        {"role": "user", "content": question.prompt},
    ]
    return tokenizer.render_chat(messages, None)


class OwnAnswer:
    """One answer; text, tokens and figures grow while `stream` is read."""

    def __init__(self, question: Question, means: Means) -> None:
        """Loads everything. Raises what loading, and starting a generation, raise."""
        self._client = means.connection.connect(means.timeout_s)
        try:
            # a broker that is not there is better known before the model is loaded
            self._generation = self._load(question, means, self._client.status())
        except BaseException:
            self._client.close()
            raise

    def _load(self, question: Question, means: Means, report: dict[str, Any]) -> Any:
        set_up_torch(means.threads or os.cpu_count())
        from edge_agent.text.cuts import draw_span
        from edge_agent.text.ends import load_ends
        from edge_agent.text.generation import Generation
        from edge_agent.text.session import Session
        from edge_agent.text.tokenizer import TextTokenizer

        settings = means.codecs.read_settings(
            step_deadline_s=means.timeout_s,
            draft_tokens=means.drafts.draft_tokens,
            exact=means.exact,
        )
        span = draw_span(means.span_text, means.span_seed)
        ends = load_ends(means.directory, span, means.dtype, report, means.loras, means.neurons)
        calibration = means.codecs.find_calibration(ends)
        drafters = means.drafts.open(ends)
        tokenizer = TextTokenizer(means.directory, means.tokenizer)
        generation = Generation(
            Session(ends, self._client, settings, calibration, means.pool_key, drafters),
            tokenizer,
            encode_question(question, tokenizer),
            question.drawing,
            question.max_new_tokens,
            question.stops,
        )
        freeze_loaded_objects()
        return generation

    @property
    def text(self) -> str:
        return str(self._generation.text)

    @property
    def token_ids(self) -> list[int]:
        return list(self._generation.token_ids)

    @property
    def stats(self) -> dict[str, Any]:
        """What it has cost so far."""
        figures: dict[str, Any] = self._generation.stats.to_json()
        return figures | {"finish_reason": self._generation.finish_reason}

    def stream(self) -> Iterator[str]:
        """Pieces of text as they come. Raises what Session.generate raises."""
        yield from self._generation.stream()

    def close(self) -> None:
        self._client.close()
