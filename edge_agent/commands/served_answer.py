"""An answer that a running `midspan serve` makes, for `midspan ask`: no model is loaded for it.

Over plain HTTP to this machine, with the standard library alone: importing a client would take
longer than the first token.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from common.errors import MidspanError, SettingsError
from edge_agent.commands.question import Question
from edge_agent.server.announcement import Announcement

AWAKE_LIMIT_S = 2.0  # in which a serve says that it is there, however much it has to do
AWAKE = b'{"status":"ok"}'  # what it says at /health
SPARE_S = 30.0  # beyond the time that the server itself gives a step
MAX_LINE = 1 << 20  # bytes of an event
END = b"[DONE]"


class NotServed(MidspanError):
    """A running serve does not answer this: load the model and answer it here."""


class ServedAnswer:
    """One answer; text, tokens and figures grow while `stream` is read."""

    def __init__(self, announcement: Announcement, question: Question) -> None:
        """Returns when the first token is there. Raises NotServed, and SettingsError for a question
        that no engine would answer."""
        self.url = announcement.url
        self.text = ""
        self.token_ids: list[int] = []
        self.stats: dict[str, Any] | None = None  # complete with the answer's end, none before
        self.costs: list[dict[str, Any]] = []  # of each token
        try:
            parts = urlsplit(announcement.url)
            self._link = http.client.HTTPConnection(
                parts.hostname or "", parts.port, timeout=AWAKE_LIMIT_S
            )
        except (ValueError, http.client.HTTPException) as error:
            raise NotServed("that is no address") from error
        try:
            self._check_awake()
            self._response = self._ask(parts.path, announcement, question)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            raise NotServed(str(error)) from error
        except MidspanError:
            self.close()
            raise

    def close(self) -> None:
        """The server ends what nobody reads."""
        self._link.close()

    def _check_awake(self) -> None:
        """Raises NotServed for a serve that ends, and for somebody else who has its port by now: he
        gets neither the prompt nor the key. Raises OSError for one that hangs."""
        self._link.request("GET", "/health")
        if self._link.getresponse().read(MAX_LINE) != AWAKE:
            raise NotServed("it takes no questions")

    def _ask(
        self, path: str, announcement: Announcement, question: Question
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if announcement.api_key is not None:
            headers["Authorization"] = f"Bearer {announcement.api_key}"
        self._link.timeout = announcement.route.timeout_s + SPARE_S
        if self._link.sock is not None:  # None: the server closed it, another one will be opened
            self._link.sock.settimeout(self._link.timeout)
        body = json.dumps(make_request(question, announcement.name))
        self._link.request("POST", f"{path}/completions", body, headers)
        response = self._link.getresponse()
        if response.status == 200:
            return response
        message = read_message(response.read(MAX_LINE))
        if response.status == 400:
            raise SettingsError(message)
        raise NotServed(message)

    def stream(self) -> Iterator[str]:
        """Pieces of text as they come. Raises MidspanError when the server cannot go on."""
        try:
            for data in self._events():
                if data == END:
                    return
                piece = self._take(json.loads(data))
                self.text += piece
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise MidspanError(f"{self.url} ended in the middle of the answer: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise MidspanError(f"{self.url} sent what is no answer") from error
        finally:
            self.close()
        raise MidspanError(f"{self.url} ended in the middle of the answer")

    def _events(self) -> Iterator[bytes]:
        while line := self._response.readline(MAX_LINE):
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ").strip()

    def _take(self, event: dict[str, Any]) -> str:
        """The text of an event; what else it says is noted. Raises MidspanError for an error."""
        if "error" in event:
            raise MidspanError(event["error"]["message"])
        (choice,) = event["choices"]
        told = event.get("midspan")
        if choice["finish_reason"] is not None:
            said = {"finish_reason": choice["finish_reason"], "served_by": self.url}
            self.stats = (told or {}) | said
        elif told is not None:
            self.costs.append(told)
            self.token_ids.append(told["token_id"])
        return str(choice["text"])


def make_request(question: Question, model: str) -> dict[str, Any]:
    """The body of a request for completions, which says all of what the question leaves open."""
    drawing = question.drawing
    return {
        "model": model,
        "prompt": question.prompt,
        "max_tokens": question.max_new_tokens,
        "temperature": drawing.temperature,
        "top_k": drawing.top_k,
        "top_p": drawing.top_p,
        "min_p": drawing.min_p,
        "typical_p": drawing.typical_p,
        "repetition_penalty": drawing.repetition_penalty,
        "presence_penalty": drawing.presence_penalty,
        "frequency_penalty": drawing.frequency_penalty,
        "seed": drawing.seed,
        "stop": list(question.stops),
        "stream": True,
        "midspan": True,
    }


def read_message(body: bytes) -> str:
    """What an error in OpenAI's shape says."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server gave no reason"
