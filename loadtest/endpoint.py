"""Ask an OpenAI endpoint, of `midspan serve` or any other: completions, streamed, over HTTP.

Prompts are token ids, so a prompt has just as many tokens as were asked for. `ignore_eos` is not
OpenAI's, but what many servers know: an answer then has its whole length. An event is taken for a
token in the gaps between them; how many tokens there were the server is asked for, because a piece
of text may be several (half of a character is none).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from loadtest.answers import Answer
from loadtest.demand import draw_prompt
from loadtest.http_stream import Address, Response, post
from loadtest.pacing import AskFailed, Clock

LOWEST_ID, HIGHEST_ID = 3, 900  # of a prompt's tokens: below are marks of many vocabularies


class EndpointTarget:
    """`limit_s` is how long an answer may take in all."""

    def __init__(
        self, address: Address, model: str, api_key: str | None, seed: int, limit_s: float
    ) -> None:
        self._address, self._model, self._api_key = address, model, api_key
        self._rng = random.Random(seed)
        self._token_ids = range(LOWEST_ID, HIGHEST_ID)
        self._limit_s = limit_s

    async def ask(self, answer: Answer, clock: Clock) -> None:
        """Raises AskFailed."""
        body = self._make_body(answer)
        answer.sent_s = clock.now()
        answer.bytes_up, answer.bytes_down = len(body), 0
        try:
            async with (
                asyncio.timeout(self._limit_s),
                post(self._address, "/completions", body, self._api_key) as response,
            ):
                await self._read(response, answer, clock)
        except TimeoutError as error:
            raise AskFailed("timeout", f"no end within {self._limit_s:g} s") from error
        except (OSError, EOFError, ValueError, IndexError, LookupError) as error:
            raise AskFailed(type(error).__name__, str(error) or "the connection ended") from error

    def _make_body(self, answer: Answer) -> bytes:
        request = answer.request
        prompt = draw_prompt(request.prompt_tokens, self._token_ids, self._rng)
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": request.tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }  # fmt: skip
        return json.dumps(body).encode()

    async def _read(self, response: Response, answer: Answer, clock: Clock) -> None:
        if response.status != 200:
            text = (await response.read()).decode(errors="replace")
            raise AskFailed(f"HTTP {response.status}", text[:200])
        counted: int | None = None
        async for data in response.events():
            came_at = time.monotonic()
            answer.bytes_down = (answer.bytes_down or 0) + len(data)
            if data == b"[DONE]":
                break
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise AskFailed("error event", str(event["error"])[:200])
            if event.get("choices") and event["choices"][0].get("text"):
                answer.token_s.append(clock.since(came_at))
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
        answer.tokens_counted = counted
