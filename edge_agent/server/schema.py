"""Requests as OpenAI has them, with types and bounds. Fields that are not here are passed over.

A number is no text and true is no number. What is refused outright (tools, formats of answers) is
refused here, so that nobody takes an answer for something that it is not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from edge_agent.text.sampling import MAX_PENALTY

MAX_N = 128
MAX_PROMPTS = 2048
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI has it
Prompt = str | list[int]


def check_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(check_utf8)]


def join_parts(content: object) -> object:
    """Content as a list of parts to one text; other parts than text are refused."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"a part is of type {kind!r}; expected text parts only")
        texts.append(text)
    return "".join(texts)


def list_prompts(value: object) -> list[Prompt]:
    """A text, token ids, or a list of either, to a list."""
    if isinstance(value, str):
        return [check_utf8(value)]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text, token ids, or a list of either that is not empty")
    if _are_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"{len(value)} prompts; expected at most {MAX_PROMPTS}")
    for index, each in enumerate(value):
        if isinstance(each, str):
            check_utf8(each)
        elif not (isinstance(each, list) and each and _are_ids(each)):
            raise ValueError(f"prompt {index} is neither a text nor a list of token ids")
    return value


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def list_stops(value: object) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    return stops


def read_bias(value: object) -> dict[int, float]:
    """Token ids, which are strings in JSON, to what is added to their logits."""
    if not isinstance(value, dict):
        raise ValueError("expected an object of token ids and numbers")
    bias = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise ValueError(f"{key[:40]!r} is not the number of a token")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise ValueError(f"the bias of token {key} is not a number from -100 to 100")
        bias[int(key)] = float(number)
    return bias


def refuse_tools(value: object) -> None:
    if value:
        raise ValueError("this server calls no tools; leave the field out")


def check_format(value: object) -> None:
    if value is not None and not (isinstance(value, dict) and value.get("type") == "text"):
        raise ValueError("this server answers in plain text only; leave the field out")


NUMBER = {"type": "number"}
STRINGS = {"type": "array", "items": {"type": "string"}}
ANYTHING: dict[str, Any] = {}
Prompts = Annotated[
    list[Prompt], PlainValidator(list_prompts), WithJsonSchema({"type": ["string", "array"]})
]
Stops = Annotated[list[str], PlainValidator(list_stops), WithJsonSchema(STRINGS)]
Bias = Annotated[
    dict[int, float],
    PlainValidator(read_bias),
    WithJsonSchema({"type": "object", "additionalProperties": NUMBER}),
]
NoTools = Annotated[None, PlainValidator(refuse_tools), WithJsonSchema(ANYTHING)]
PlainText = Annotated[None, PlainValidator(check_format), WithJsonSchema(ANYTHING)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(Body):
    """What chat and completions have in common."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stops = []
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="Not OpenAI's: 0 is all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Not OpenAI's: 0 is all.")
    typical_p: float | None = Field(default=None, gt=0, le=1, description="Not OpenAI's: 1 is all.")
    repetition_penalty: float | None = Field(
        default=None, ge=1 / MAX_PENALTY, le=MAX_PENALTY, description="Not OpenAI's."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Bias | None = None
    ignore_eos: bool | None = Field(
        default=None, description="Not OpenAI's: only max_tokens ends the text."
    )
    midspan: bool | None = Field(default=None, description="Say of each token what it cost.")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        return self


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(join_parts)] = ""
    name: Text | None = None


class ChatRequest(Sampled):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: PlainText = None
    tools: NoTools = None
    functions: NoTools = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to name; None is no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self


class CompletionRequest(Sampled):
    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 goes with echo only")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of: expected to be n; this server sorts no answers")
        if self.suffix:
            raise ValueError("suffix: this server writes on from a prompt only")
        return self


class ImageRequest(Body):
    """OpenAI's, and what `midspan image` can do beyond."""

    prompt: Text = Field(min_length=1)
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=10)
    size: str | None = Field(default=None, description="As 512x512; auto is the model's own.")
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png"] | None = None
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    negative_prompt: Text | None = None
    cut: Literal["unet", "inner"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=16, description="While streaming.")
    midspan: bool | None = Field(default=None, description="Say of each step what it cost.")


class EditRequest(ImageRequest):
    """A picture that begins with one; the fields of a form that are no files."""

    strength: float | None = Field(default=None, gt=0, le=1, description="1 leaves nothing of it.")
