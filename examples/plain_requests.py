"""What travels between a client and `midspan serve`, with nothing but Python's own library.

    midspan serve --with-pool                       # in another terminal
    python examples/plain_requests.py [BASE_URL]    # or OPENAI_BASE_URL

With curl:

    curl BASE_URL/completions -H 'Content-Type: application/json' -d '{"prompt": "Once"}'
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

DEFAULT_URL = "http://127.0.0.1:8080/v1"
PROMPT = "Once upon a time, there was a brave fox named Mia."


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Post a body, or get. Raises urllib.error.HTTPError, whose body says why."""
    data = None if body is None else json.dumps(body).encode()
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
    }
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60)  # noqa: S310


def read_events(response: Any) -> Iterator[dict[str, Any]]:
    """The server-sent events of a stream: lines `data: JSON`, the last one `data: [DONE]`."""
    for line in response:
        data = line.decode().removeprefix("data: ").strip()
        if data and data != "[DONE]":
            yield json.loads(data)


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", DEFAULT_URL)
    with ask(f"{url}/models") as response:
        print("models:", ", ".join(model["id"] for model in json.load(response)["data"]))

    wanted = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    with ask(f"{url}/completions", wanted) as response:
        answer = json.load(response)
    print(answer["choices"][0]["text"])
    print(answer["usage"]["total_tokens"], "tokens")

    workers = set()
    with ask(f"{url}/completions", wanted | {"stream": True, "midspan": True}) as response:
        for event in read_events(response):
            print(event["choices"][0]["text"], end="", flush=True)
            workers.add(event.get("midspan", {}).get("worker"))
    print("\ncomputed by", ", ".join(sorted(filter(None, workers))))

    try:
        ask(f"{url}/completions", {"prompt": PROMPT, "max_tokens": -1})
    except urllib.error.HTTPError as error:
        print(f"refused with {error.code}:", json.load(error)["error"]["message"])


if __name__ == "__main__":
    main()
