"""A picture that grows, as server-sent events: OpenAI's, and if wanted what each step costs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from edge_agent.image.maker import ImageMaker, ImageSettings, Progress
from edge_agent.image.noise_pictures import draw_channels
from edge_agent.image.remote_unet import Travelled
from edge_agent.server.json_bodies import as_event

Tell = Callable[[dict[str, Any]], None]


def to_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def as_base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def as_named_event(content: dict[str, Any]) -> bytes:
    """A server-sent event under the name of its type, as OpenAI sends pictures."""
    name: str = content["type"]
    return b"event: " + name.encode() + b"\n" + as_event(content)


def preview_steps(steps: int, previews: int) -> dict[int, int]:
    """After which steps there is a preview, and which one it is: evenly, and none at the end."""
    at = [round((index + 1) * steps / (previews + 1)) for index in range(previews)]
    return {step: index for index, step in enumerate(sorted(set(at) - {0, steps}))}


@dataclass(slots=True)
class Growth:
    """Follows one picture while it is made, in the maker's thread, and tells what happens."""

    maker: ImageMaker
    settings: ImageSettings
    index: int  # of the picture in its request
    previews: int
    with_costs: bool
    tell: Tell
    _travelled: str = field(default="", init=False)  # of the last step, a picture in base64
    _due: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self._due = preview_steps(self.settings.steps, self.previews)

    def on_travel(self, travelled: Travelled) -> None:
        if self.with_costs:
            self._travelled = as_base64(to_png(draw_channels(travelled.down[0])))

    def on_step(self, progress: Progress) -> None:
        event: dict[str, Any] = {"type": "midspan.step", "index": self.index}
        preview = self._due.get(progress.step)
        if preview is not None:
            picture = self.maker.decode(progress.latents)[0]
            event |= {
                "type": "image_generation.partial_image",
                "partial_image_index": preview,
                "b64_json": as_base64(to_png(picture)),
            }
        if self.with_costs:
            self.tell(event | {"midspan": self._cost(progress.step)})
        elif preview is not None:
            self.tell(event)

    def on_done(self, file: bytes) -> None:
        event = {
            "type": "image_generation.completed",
            "index": self.index,
            "b64_json": as_base64(file),
            "output_format": "png",
        }
        self.tell(event | ({"midspan": self._cost(self.settings.steps)} if self.with_costs else {}))

    def _cost(self, step: int) -> dict[str, Any]:
        stats = self.maker.stats
        return {
            "step": step,
            "steps": self.settings.steps,
            "seed": self.settings.seed,
            "worker": self.maker.unet.last_worker_id,
            "bytes_up": stats.bytes_up,
            "bytes_down": stats.bytes_down,
            "travelled": self._travelled,
        }
