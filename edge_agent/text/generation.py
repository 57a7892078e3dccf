"""A prompt in, a stream of text out: session, tokenizer and stop strings put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.stats import GenerationStats
from edge_agent.text.stop_strings import StopStrings
from edge_agent.text.tokenizer import TextStream, TextTokenizer


@dataclass(slots=True)
class Generation:
    """One answer, growing while `stream` is read."""

    session: Session
    tokenizer: TextTokenizer
    prompt_ids: list[int]
    sampling: SamplingSettings
    max_new_tokens: int
    stops: Sequence[str] = ()
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""  # stop or length

    @property
    def stats(self) -> GenerationStats:
        return self.session.stats

    def stream(self) -> Iterator[str]:
        """Pieces of text as they become certain. Raises what Session.generate raises."""
        texts = TextStream(self.tokenizer, self.prompt_ids)
        stops = StopStrings(self.stops)
        tokens = self.session.generate(self.prompt_ids, self.max_new_tokens, self.sampling)
        self.finish_reason = "length"
        for token in tokens:
            self.token_ids.append(token)
            piece = stops.add(texts.add(token))
            self.text += piece
            yield piece
            if stops.found:
                self.finish_reason = "stop"
                tokens.close()
                return
        if self.session.ended_by_itself:
            self.finish_reason = "stop"
        rest = stops.finish()
        self.text += rest
        yield rest


def start_generation(
    session: Session,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: SamplingSettings,
    stops: Sequence[str] = (),
) -> Generation:
    """Prepare an answer to `prompt`. Raises SettingsError for an empty prompt."""
    return Generation(
        session=session,
        tokenizer=tokenizer,
        prompt_ids=tokenizer.encode(prompt),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stops=stops,
    )
