"""LangChain in front of a split model: one answer, one that streams, several at once.

    pip install langchain-openai
    midspan serve --with-pool                       # in another terminal
    python examples/langchain_chat.py [BASE_URL]    # or OPENAI_BASE_URL

LangChain itself may send what passes through it to LangSmith if LANGSMITH_TRACING is set.
"""

from __future__ import annotations

import os
import sys

from langchain_openai import ChatOpenAI

DEFAULT_URL = "http://127.0.0.1:8080/v1"
PROMPTS = (
    "Once upon a time, there was a brave fox named Mia.",
    "One sunny morning, a little duck named Max went to the river.",
    "Long ago, near a quiet forest, there lived a kind bear named Tom.",
)


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OPENAI_BASE_URL", DEFAULT_URL)
    model = ChatOpenAI(
        model=os.environ.get("OPENAI_MODEL", "stories-llama"),
        base_url=url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        temperature=0,
        max_tokens=40,
    )
    print("invoke:", model.invoke(PROMPTS[0]).text)
    print("stream:", end=" ")
    for chunk in model.stream(PROMPTS[0]):
        print(chunk.text, end="", flush=True)
    print()
    for answer in model.batch(list(PROMPTS)):
        print("batch:", answer.text)


if __name__ == "__main__":
    main()
