"""A chat that streams, and the log-probabilities of an answer, with the official client.

pip install openai
midspan serve --with-pool                      # in another terminal
python examples/openai_client.py [BASE_URL]    # or OPENAI_BASE_URL
"""

from __future__ import annotations

import math
import os
import sys

import openai

DEFAULT_URL = "http://127.0.0.1:8080/v1"
PROMPT = "Once upon a time, there was a brave fox named Mia."


def stream_chat(client: openai.OpenAI, model: str) -> None:
    """Write an answer as it comes, and what it took."""
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chat:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} tokens, then {chunk.usage.completion_tokens}")


def show_logprobs(client: openai.OpenAI, model: str) -> None:
    """Write each token of an answer with how likely it and the two best were."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    found = answer.choices[0].logprobs
    for token in (found.content if found else None) or []:
        best = ", ".join(f"{top.token!r} {math.exp(top.logprob):.2f}" for top in token.top_logprobs)
        print(f"{token.token!r} {math.exp(token.logprob):.2f} of {best}")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", DEFAULT_URL)
    with openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        model = client.models.list().data[0].id
        stream_chat(client, model)
        show_logprobs(client, model)


if __name__ == "__main__":
    main()
