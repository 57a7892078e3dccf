"""Draw the contact sheet of the demo image model's card, with diffusers' own pipeline.

python training/contact_sheet.py models/landscapes-sdxl
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw

PROMPTS = (
    "a red house on a green hill under a blue sky with the sun",
    "a boat with a red sail on the sea under an orange sunset",
    "a mountain behind a snowy field under a blue sky with clouds",
    "two trees on a yellow desert under a night sky with the moon",
    "a lighthouse on the sea under a night sky with stars",
    "a yellow house on a snowy field under a grey sky",
    "a red house and a tree on a green hill under an orange sunset with the sun",
    "a boat with a white sail on the sea under a blue sky with clouds",
)
SEEDS = range(6)
STEPS, GUIDANCE, SIDE, HEAD = 15, 2.5, 128, 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    model = parser.parse_args().model
    torch.set_num_threads(1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        model, torch_dtype=torch.float32, add_watermarker=False
    )
    sheet = Image.new("RGB", (len(SEEDS) * SIDE, len(PROMPTS) * (SIDE + HEAD)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(PROMPTS):
        y = row * (SIDE + HEAD)
        pen.text((4, y + 3), prompt, fill="black")
        for column, seed in enumerate(SEEDS):
            picture = pipeline(
                prompt,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            sheet.paste(picture.resize((SIDE, SIDE)), (column * SIDE, y + HEAD))
    sheet.save(model / "contact-sheet.png", optimize=True)


if __name__ == "__main__":
    main()
