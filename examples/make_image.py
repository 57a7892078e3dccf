"""A picture with the official client: text encoders and noise stay here, the pool has the UNet.

pip install openai
midspan serve --with-pool                                 # in another terminal
python examples/make_image.py [BASE_URL] [-o FILE.png]    # or OPENAI_BASE_URL
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

import openai

DEFAULT_URL = "http://127.0.0.1:8080/v1"
PROMPT = "a red house on a green hill under a blue sky"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a picture.")
    parser.add_argument("url", nargs="?", default=os.environ.get("OPENAI_BASE_URL", DEFAULT_URL))
    parser.add_argument("-o", "--output", type=Path, default=Path("picture.png"))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    wanted = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY", "none")
    with openai.OpenAI(base_url=wanted.url, api_key=key) as client:
        answer = client.images.generate(
            prompt=wanted.prompt,
            response_format="b64_json",
            extra_body={"seed": wanted.seed, "steps": wanted.steps},  # midspan's own
        )
    assert answer.data
    picture = base64.b64decode(answer.data[0].b64_json or "")
    wanted.output.write_bytes(picture)
    print(f"{wanted.output}: {len(picture)} bytes, seed {wanted.seed}")


if __name__ == "__main__":
    main()
