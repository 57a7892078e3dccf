"""A live endpoint for tests: uvicorn in a thread, on a port of its own, in front of a real pool."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai

from deploy.pool import LocalPool
from edge_agent.server.app import Services, make_app
from edge_agent.server.opening import PoolAccess, open_services
from edge_agent.server.running import DrainingServer, bind
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session_settings import uniform_settings

MODEL = "stories-llama"
EXACT = uniform_settings("fp32")
ENDLESS: dict[str, Any] = {"max_tokens": 500, "logit_bias": {"1": -100}}  # no end of text


class Endpoint:
    """Where it listens, and clients for it."""

    def __init__(self, services: Services, port: int) -> None:
        self.services = services
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def refusal(self, path: str, **body: Any) -> tuple[int, str | None, str]:
        """Status, field and message of an error in OpenAI's shape."""
        response = self.post(path, **body)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error["param"], error["message"]

    def chat(self, content: str, **options: Any) -> Any:
        """As the official client has it."""
        messages: Any = [{"role": "user", "content": content}]
        return self.openai.chat.completions.create(model=MODEL, messages=messages, **options)

    def complete(self, prompt: Any, **options: Any) -> Any:
        return self.openai.completions.create(model=MODEL, prompt=prompt, **options)

    def metric(self, line: str) -> float:
        """The value of a metric that is named with its labels."""
        values = [row.rpartition(" ") for row in self.http.get("/metrics").text.splitlines()]
        return next((float(value) for name, _, value in values if name == line), 0.0)


@contextlib.contextmanager
def open_endpoint(pool: LocalPool | str, ends: ModelEnds, **options: Any) -> Iterator[Endpoint]:
    """An endpoint until the end of the block; `options` are those of open_services."""
    broker = pool if isinstance(pool, str) else pool.edge_endpoint
    timeout_s = options.pop("timeout_s", 60.0)
    services = open_services(ends, PoolAccess([broker], timeout_s=timeout_s), EXACT, **options)
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    server = DrainingServer(make_app(services), services.drain, ready.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert ready.wait(10)
    endpoint = Endpoint(services, listener.getsockname()[1])
    try:
        yield endpoint
    finally:
        endpoint.openai.close()
        endpoint.http.close()
        services.drain.is_asked = True
        thread.join(10)
        assert not thread.is_alive()
        services.close()


def count_sessions(pool: LocalPool) -> int:
    client = pool.connect()
    try:
        return int(client.status()["sessions"])
    finally:
        client.close()
