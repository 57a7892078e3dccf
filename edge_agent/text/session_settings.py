"""How a text session talks to the pool, and what of it fits to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.codecs.quantize import has_separate_rows
from common.codecs.spec import AUTO, DEFAULT_CODEC, EXACT, parse_codec
from common.errors import SettingsError
from common.link import Link
from common.settings import DRAFT_TOKENS, PIECES_AHEAD, PREFILL_ROWS
from common.spans.cut import Span, are_joined
from edge_agent.text.ends import ModelEnds


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a session talks to the pool: codecs of prompt and decode steps, up and down.

    `route` are the spans that compute its middle layers one after another, each on a worker that
    serves it; without it they are those that were served when the model's ends were loaded, or all
    in one. Where a part of it is served no more, a session goes on over others that are. Between
    spans rows are in the codec `between`. Where a codec is `auto`, it is chosen when the session is
    opened (edge_agent/text/codec_choice.py).

    In an `exact` session no number depends on what else is computed at the time: neither on other
    sessions, nor on drafts, nor on whether something had to be computed again.
    """

    prompt_up: str = DEFAULT_CODEC
    prompt_down: str = DEFAULT_CODEC
    decode_up: str = DEFAULT_CODEC
    decode_down: str = DEFAULT_CODEC
    prefill_rows: int = PREFILL_ROWS
    step_deadline_s: float = 60.0
    route: Sequence[Span] = ()
    between: str = EXACT
    chosen_for: Link | None = None  # by which `auto` was settled
    pieces_ahead: int = PIECES_AHEAD  # of a long prompt, on their way at once
    draft_tokens: int = DRAFT_TOKENS  # at most, in one step; where there is a drafter
    exact: bool = False

    @property
    def is_open(self) -> bool:
        """Whether a codec is still to be chosen."""
        return AUTO in self.codecs

    @property
    def codec_by_step(self) -> dict[str, str]:
        """Of prompt and decode steps, up and down."""
        names = ("prompt_up", "prompt_down", "decode_up", "decode_down")
        return {name: getattr(self, name) for name in names}

    @property
    def codecs(self) -> list[str]:
        """The names in use, each once."""
        return list(dict.fromkeys((*self.codec_by_step.values(), self.between)))


def settle(settings: SessionSettings, ends: ModelEnds) -> SessionSettings:
    """Those that hold for a model. Raises SettingsError for codecs that cannot.

    Where the pool has the tail, codecs that are the same both ways are for boundary rows: logits
    come as they are then.
    """
    between = parse_codec(settings.between)
    if settings.exact and (between.multiplies or not has_separate_rows(between)):
        raise SettingsError(
            f"codec {between.name} between spans makes rows depend on those beside them, and the "
            "session is to be exact; expected fp32, fp16, bf16 or int8"
        )
    if ends.cut.has_tail:
        return settings
    pairs = (
        (settings.prompt_up, settings.prompt_down), (settings.decode_up, settings.decode_down)
    )  # fmt: skip
    prompt_down, decode_down = (EXACT if up == down else down for up, down in pairs)
    return replace(settings, prompt_down=prompt_down, decode_down=decode_down)


def why_no_drafts(settings: SessionSettings, ends: ModelEnds) -> str:
    """Why guesses could not be checked several at once; empty if they can."""
    if ends.keeps_states:
        return (
            "its layers, or neurons that were chosen with --neurons, keep a state of the text, "
            "which cannot be taken back token by token"
        )
    spec = parse_codec(settings.decode_down)
    if spec.low_bits or spec.granularity in ("tensor", "channel"):
        return f"rows that come back together in {spec.name} are not what they are one by one"
    if settings.exact and spec.multiplies:
        return f"rows in {spec.name} go through a product of matrices together, and are to be exact"
    return ""


def check_route(route: Sequence[Span], middle: Span) -> list[Span]:
    """The spans that a session passes, all in one if none. Raises SettingsError unless they fit."""
    route = list(route) or [middle]
    if not are_joined(route) or (route[0].first, route[-1].stop) != (middle.first, middle.stop):
        spans = ", ".join(map(str, route))
        raise SettingsError(f"the route {spans} is not the middle {middle}, span after span")
    return route


def uniform_settings(codec: str, **others: Any) -> SessionSettings:
    """The same codec everywhere."""
    return SessionSettings(codec, codec, codec, codec, **others)


def count_new_tokens(
    ends: ModelEnds, prompt_ids: Sequence[int], max_new_tokens: int, score_prompt: bool = False
) -> int:
    """How many tokens may be generated after a prompt. Raises SettingsError if it cannot be run."""
    least = 0 if score_prompt else 1
    if max_new_tokens < least:
        raise SettingsError(
            f"the number of new tokens is {max_new_tokens}; expected {least} or more"
        )
    if not prompt_ids:
        raise SettingsError("the prompt has no tokens")
    beyond = [i for i in (min(prompt_ids), max(prompt_ids)) if not 0 <= i < ends.vocabulary]
    if beyond:
        raise SettingsError(
            f"the prompt has token {beyond[0]}; {ends.name} has 0 to {ends.vocabulary - 1}"
        )
    if ends.context is None:
        return max_new_tokens
    room = ends.context - len(prompt_ids)
    if room < min(1, max_new_tokens):
        raise SettingsError(
            f"the prompt has {len(prompt_ids)} tokens; {ends.name} has a context of "
            f"{ends.context}, so at most {ends.context - 1} leave room for an answer"
        )
    return min(max_new_tokens, room)
