"""Chat and completions: what a request asks for is begun in one engine, all of it or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from common.errors import TooManySessions
from edge_agent.engine.engine import Engine
from edge_agent.server.answers import Answer, Wish
from edge_agent.server.errors import Fault, RequestFault, refuse
from edge_agent.server.json_bodies import JsonResponse
from edge_agent.server.kept import KeptConversations
from edge_agent.server.metrics import Metrics
from edge_agent.server.prompts import ALL_THAT_FIT, PromptReader
from edge_agent.server.responses import ChatShape, CompletionShape, TextResponse
from edge_agent.server.sampling import choose_settings
from edge_agent.server.schema import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    CompletionRequest,
    Sampled,
)
from edge_agent.server.streaming import Event, EventStream, cancelled_with, merge
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import BAN, SamplingDefaults, SamplingSettings
from edge_agent.text.tokenizer import TextTokenizer


class TextService:
    """One model's texts, for everybody who asks. In the thread of the event loop."""

    def __init__(
        self,
        ends: ModelEnds,
        tokenizer: TextTokenizer,
        engine: Engine,
        defaults: SamplingDefaults,
        metrics: Metrics,
        *,
        template: str | None,
        keep: int,
        most_answers: int,
    ) -> None:
        """`keep` conversations between turns; a request has at most `most_answers` choices."""
        self.ends = ends
        self.engine = engine
        self.kept = KeptConversations(engine, keep)
        self._tokenizer = tokenizer
        self._prompts = PromptReader(ends, tokenizer, template)
        self._defaults = defaults
        self._metrics = metrics
        self._most_answers = most_answers

    async def chat(self, http: Request, request: ChatRequest) -> Response:
        """Raises RequestFault and what the engine raises."""
        self._check_model(request.model)
        prompt_ids = await self._prompts.read_chat(request.messages)
        limit = request.max_completion_tokens or request.max_tokens or ALL_THAT_FIT
        wishes = [
            Wish(
                index, prompt_ids, limit, self._read_sampling(request, index),
                request.stop, request.top,
            )
            for index in range(request.choices)
        ]  # fmt: skip
        answers = self._begin(request, wishes, "messages", keep=True)
        return await self._respond(
            http,
            TextResponse(
                request, answers, self.ends.name, self.ends.fingerprint, len(prompt_ids),
                lambda: ChatShape(self._tokenizer, request.top),
            ),
        )  # fmt: skip

    async def complete(self, http: Request, request: CompletionRequest) -> Response:
        """Raises RequestFault and what the engine raises."""
        self._check_model(request.model)
        prompts = [await self._prompts.read(prompt) for prompt in request.prompt]
        limit = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        n, echo = request.choices, bool(request.echo)
        wishes = [
            Wish(
                place * n + choice, prompt_ids, limit, self._read_sampling(request, choice),
                request.stop, request.logprobs, echo,
            )
            for place, prompt_ids in enumerate(prompts)
            for choice in range(n)
        ]  # fmt: skip
        answers = self._begin(request, wishes, "prompt", keep=False)
        return await self._respond(
            http,
            TextResponse(
                request, answers, self.ends.name, self.ends.fingerprint, sum(map(len, prompts)),
                lambda: CompletionShape(self._tokenizer, request.logprobs),
            ),
        )  # fmt: skip

    def _read_sampling(self, request: Sampled, choice: int) -> SamplingSettings:
        settings = choose_settings(request, self._defaults, choice)
        if not request.ignore_eos:
            return settings
        bias = {**settings.logit_bias, **dict.fromkeys(self.ends.eos_ids, BAN)}
        return replace(settings, logit_bias=bias)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.ends.name:
            raise RequestFault(no_such_model(model, self.ends.name))

    def _begin(
        self, request: Sampled, wishes: Sequence[Wish], field: str, keep: bool
    ) -> list[Answer]:
        """Submit all wishes, or none. The first of a chat goes on in a kept conversation."""
        if len(wishes) > self._most_answers:
            raise refuse(
                f"{len(wishes)} choices in one request; this server takes {self._most_answers}",
                "n" if request.choices > 1 else field,
            )
        self._prompts.check_bias(request.logit_bias)
        for wish in wishes:
            self._prompts.check(wish.prompt_ids, wish.max_new_tokens, wish.score_prompt, field)
        answers: list[Answer] = []
        try:
            for wish in wishes:
                answers.append(self._begin_one(wish, keep and not answers))
        except TooManySessions:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _begin_one(self, wish: Wish, keep: bool) -> Answer:
        conversation = self.kept.take(wish.prompt_ids) if keep else None
        stream = (conversation or self.engine).submit(
            wish.prompt_ids, wish.max_new_tokens, wish.sampling,
            top_logprobs=wish.top_logprobs, score_prompt=wish.score_prompt,
        )  # fmt: skip
        return Answer(wish, stream, self._tokenizer, self._metrics.meter(len(wish.prompt_ids)))

    async def _respond(self, http: Request, response: TextResponse) -> Response:
        """A stream begins when the first token is there: until then an error is a status."""
        events = merge(response.answers)
        async with cancelled_with(http, response.answers):
            if not response.request.stream:
                return JsonResponse(await response.collect(events))
            first = await anext(events)

        async def all_events() -> AsyncIterator[Event]:
            yield first
            async for event in events:
                yield event

        return EventStream(response.answers, response.stream(all_events()))


def no_such_model(model: str, served: str) -> Fault:
    """A 404 that says what there is."""
    return Fault(
        404,
        f"the model {model[:100]!r} is not served here; {served} is",
        param="model",
        code="model_not_found",
    )
