"""What `midspan ask` was asked and how, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.adapters.choice import LoraChoice
from common.console.inputs import check_file
from common.errors import SettingsError
from common.neurons.settings import NeuronSettings
from common.security.keys import ClientKeys
from common.spans.cut import Span, parse_span, read_span
from common.weights.model_files import read_model_config
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.commands.connection_options import Connection
from edge_agent.commands.draft_options import DraftChoice
from edge_agent.commands.prompts import check_text
from edge_agent.server.announcement import (
    Announcement,
    Route,
    TextSource,
    digest_files,
)
from edge_agent.text.sampling import SamplingSettings

# what a request may say, where that is less than a command may
MOST_SERVED_TEMPERATURE, LEAST_SERVED_TOP_P = 2.0, 1e-6
MOST_SERVED_PENALTY = 2.0  # of presence or frequency
MOST_SERVED_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be written on, and how its tokens are drawn."""

    prompt: str
    max_new_tokens: int
    drawing: SamplingSettings
    stops: tuple[str, ...]
    system: str = ""  # with it the prompt is what a user says in a chat

    def check(self) -> None:
        """Raises SettingsError for what no model could go on with."""
        if not self.prompt.strip():
            raise SettingsError("the prompt is empty; give a text, or - to read one from stdin")
        for stop in self.stops:
            if not stop:
                raise SettingsError("--stop is empty; expected a string before which the text ends")
            check_text("--stop", stop)
        check_text("--system", self.system)

    def can_be_served(self) -> bool:
        """Whether a request to an endpoint can say this, and means the same."""
        drawing = self.drawing
        return (
            not self.system
            and drawing.temperature <= MOST_SERVED_TEMPERATURE
            and drawing.top_p >= LEAST_SERVED_TOP_P
            and abs(drawing.presence_penalty) <= MOST_SERVED_PENALTY
            and abs(drawing.frequency_penalty) <= MOST_SERVED_PENALTY
            and (drawing.seed is None or drawing.seed >= 0)  # negative ones are counted otherwise
            and len(self.prompt) <= MOST_SERVED_CHARS
        )


@dataclass(frozen=True, slots=True)
class Means:
    """By which model and pool it is to be answered."""

    directory: Path
    span_text: str | None
    dtype: str
    codecs: CodecChoice
    connection: Connection
    pool_key: bytes | None
    timeout_s: float
    threads: int | None
    # fields of `Route` that somebody said, so that no others will do
    given: frozenset[str] = frozenset()
    tokenizer: Path | None = None  # instead of the model's
    loras: tuple[LoraChoice, ...] = ()
    span_seed: int | None = None  # which of several spans is drawn
    neurons: NeuronSettings | None = None  # which are loaded; None: all
    drafts: DraftChoice = field(default_factory=DraftChoice)
    exact: bool = False

    def check(self) -> None:
        """Raises SettingsError for options that mean nothing, CheckpointError for what is no model.

        How many layers there are not every family says under this name; loading finds out.
        """
        self.connection.check(self.timeout_s)
        self.codecs.split()
        if self.tokenizer is not None:
            check_file(self.tokenizer, "--tokenizer")
        for lists in self.neurons.files if self.neurons else ():
            check_file(lists, "--neurons")
        read_model_config(self.directory)
        self.read_spans()

    def read_spans(self) -> list[Span]:
        """What is asked for, one of them or nothing. Raises SettingsError, CheckpointError."""
        if self.span_text is None:
            return []
        layers = read_model_config(self.directory).get("num_hidden_layers")
        return [
            parse_span(text, layers) if type(layers) is int else read_span(text)
            for text in self.span_text.split(",")
        ]

    def fit(self, announcement: Announcement) -> bool:
        """Whether a running serve would answer as an engine with these would."""
        if self.tokenizer is not None or self.drafts != DraftChoice():
            return False
        spans = self.read_spans()
        if spans and ",".join(map(str, spans)) != announcement.span:
            return False
        source = describe_source(
            self.directory, self.dtype, self.codecs, self.loras, self.neurons, self.exact
        )
        if source != announcement.source:
            return False
        route = self.describe_route()
        return all(getattr(route, name) == getattr(announcement.route, name) for name in self.given)

    def describe_route(self) -> Route:
        return describe_route(
            self.connection.endpoints(), self.connection.keys(), self.pool_key, self.timeout_s
        )


def describe_source(
    directory: Path,
    dtype: str,
    codecs: CodecChoice,
    loras: Sequence[LoraChoice] = (),
    neurons: NeuronSettings | None = None,
    exact: bool = False,
) -> TextSource:
    """What a text depends on. Raises SettingsError for codecs that are none."""
    model, calibration = directory.resolve(), codecs.calibration
    if calibration is not None:
        calibration = calibration.expanduser().resolve()
    return TextSource(
        str(model),
        digest_files(model, calibration),
        dtype,
        codecs.split(),
        None if calibration is None else str(calibration),
        tuple(_describe_lora(lora) for lora in loras),
        describe_neurons(neurons),
        exact,
    )


def describe_neurons(neurons: NeuronSettings | None) -> str:
    """Settings and lists, in words that two processes can compare. Raises SettingsError."""
    if neurons is None:
        return ""
    from common.neurons.choice import choose_neurons  # with numpy, which most have no use for

    return choose_neurons(neurons).digest()


def _describe_lora(lora: LoraChoice) -> str:
    path = lora.path.resolve()
    return f"{path}@{lora.scale:g} {digest_files(path if path.is_dir() else path.parent, None)}"


def describe_route(
    brokers: list[str], keys: ClientKeys | None, pool_key: bytes | None, timeout_s: float
) -> Route:
    """How the pool is reached, in words that two processes can compare."""
    return Route(
        tuple(sorted(brokers)),
        keys.own.public.decode() if keys else None,
        keys.broker.decode() if keys else None,
        pool_key.decode() if pool_key else None,
        timeout_s,
    )
