"""Pictures: one at a time in a thread of its own, a few that wait, and where finished ones are.

Picture k of a request is the one of seed + k alone. Whoever has the address of a picture may fetch
it, which is why nobody can guess it; the oldest go when there are too many.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image
from pydantic import ValidationError
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from common.adapters.choice import LoraChoice
from common.errors import MidspanError, SettingsError, TooManySessions
from edge_agent.engine.client import BrokerClient
from edge_agent.image.init_picture import DEFAULT_STRENGTH, read_picture
from edge_agent.image.maker import ImageMaker, ImageSettings, Progress
from edge_agent.server.errors import RequestFault, fault_of, refuse
from edge_agent.server.forms import FormPart, read_form, to_json
from edge_agent.server.image_events import Growth, Tell, as_base64, as_named_event, to_png
from edge_agent.server.json_bodies import JsonResponse, as_event
from edge_agent.server.metrics import Metrics
from edge_agent.server.schema import EditRequest, ImageRequest
from edge_agent.server.streaming import cancelled_with
from edge_agent.server.text_service import no_such_model

log = logging.getLogger("midspan.serve")

MAX_WAITING = 16
MAX_KEPT = 64  # pictures that can be fetched
MAX_SIDE = 2048
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 2.5
SEEDS = 1 << 64
EDIT_TEXTS = {  # fields of a form that are no numbers
    "prompt", "negative_prompt", "model", "size", "response_format", "output_format", "cut",
}  # fmt: skip


class ClientGone(MidspanError):
    """Nobody waits for the picture any more."""


@dataclass(slots=True)
class Job:
    """The pictures of one request."""

    wanted: list[ImageSettings]
    request: ImageRequest
    gone: threading.Event = field(default_factory=threading.Event)
    tell: Tell = lambda event: None  # what happens, from the thread that makes the pictures

    def cancel(self) -> None:
        self.gone.set()

    def check(self) -> None:
        if self.gone.is_set():
            raise ClientGone("the client went away")


class ImageService:
    """Makes pictures with one model. Loads it when the first is asked for."""

    def __init__(
        self,
        directory: Path,
        connect: Callable[[], BrokerClient],
        metrics: Metrics,
        *,
        timeout_s: float = 120.0,
        pool_key: bytes | None = None,
        max_waiting: int = MAX_WAITING,
        loras: Sequence[LoraChoice] = (),
        weights: Path | None = None,
    ) -> None:
        self.name = weights.stem if weights else directory.resolve().name
        self._directory = directory
        self._connect = connect
        self._metrics = metrics
        self._timeout_s, self._pool_key = timeout_s, pool_key
        self._loras, self._weights = loras, weights
        self._most_jobs = 1 + max_waiting
        self._thread = ThreadPoolExecutor(1, "midspan-images")
        self._client: BrokerClient | None = None  # of the thread, as the makers are
        self._makers: dict[str, ImageMaker] = {}
        self._jobs: list[Job] = []
        self._pictures: OrderedDict[str, bytes] = OrderedDict()

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    async def edit(self, http: Request) -> Response:
        """As `generate`, of a form with a picture to begin with."""
        parts = read_form(http.headers.get("content-type", ""), await http.body())
        request = read_edit(parts)
        picture = await asyncio.to_thread(read_init_image, parts)
        return await self.generate(http, request, picture)

    async def generate(
        self, http: Request, request: ImageRequest, init_image: Image | None = None
    ) -> Response:
        """OpenAI's response, or its events where they are asked for.

        Raises RequestFault, TooManySessions and what ImageMaker raises.
        """
        if request.model is not None and request.model != self.name:
            raise RequestFault(no_such_model(request.model, self.name))
        job = Job(list_wanted(request, init_image), request)
        if len(self._jobs) >= self._most_jobs:
            raise TooManySessions(f"{len(self._jobs)} requests for pictures wait; try again later")
        self._jobs.append(job)
        if request.stream:
            return StreamingResponse(
                self._stream(job),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
                background=BackgroundTask(self._end, job),
            )
        try:
            async with cancelled_with(http, [job]):
                files = await asyncio.wrap_future(self._thread.submit(self._make, job))
        finally:
            self._end(job)
        return JsonResponse({"created": int(time.time()), "data": self._list(http, job, files)})

    def _list(self, http: Request, job: Job, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """The pictures of a response, each with its seed."""
        base = f"{http.base_url}images/"
        return [
            (
                {"b64_json": as_base64(file)}
                if job.request.response_format == "b64_json"
                else {"url": f"{base}{self._keep(file)}.png"}
            )
            | {"seed": settings.seed}
            for settings, file in zip(job.wanted, files, strict=True)
        ]

    async def _stream(self, job: Job) -> AsyncIterator[bytes]:
        """Events while the pictures grow; an error is one of them, and the last."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def tell(event: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job.tell = tell
        making = self._thread.submit(self._make, job)
        making.add_done_callback(lambda _: tell(None))
        try:
            while (event := await events.get()) is not None:
                yield as_named_event(event)
            await asyncio.wrap_future(making)
        except Exception as error:
            if not isinstance(error, MidspanError):
                log.exception("a stream of pictures failed")
            yield as_event(fault_of(error).body)
        finally:
            self._end(job)

    def _end(self, job: Job) -> None:
        """A request is over, however it ended."""
        job.cancel()
        if job in self._jobs:
            self._jobs.remove(job)

    def find(self, name: str) -> bytes | None:
        """A finished picture's PNG, while it is kept."""
        return self._pictures.get(name)

    def _keep(self, file: bytes) -> str:
        name = secrets.token_urlsafe(24)
        self._pictures[name] = file
        while len(self._pictures) > MAX_KEPT:
            self._pictures.popitem(last=False)
        return name

    def close(self) -> None:
        for job in self._jobs:
            job.cancel()
        self._thread.shutdown()
        if self._client is not None:
            self._client.close()

    # --- the thread

    def _make(self, job: Job) -> list[bytes]:
        files = []
        for index, settings in enumerate(job.wanted):
            job.check()
            maker = self._find_maker(settings.cut)
            request = job.request
            previews = (request.partial_images or 0) if request.stream else 0
            growth = Growth(maker, settings, index, previews, bool(request.midspan), job.tell)

            def on_step(progress: Progress, growth: Growth = growth) -> None:
                job.check()
                growth.on_step(progress)

            (picture,) = maker.make(settings, on_step, growth.on_travel)
            files.append(to_png(picture))
            growth.on_done(files[-1])
            for way, count in (("up", maker.stats.bytes_up), ("down", maker.stats.bytes_down)):
                self._metrics.bytes.labels(way).inc(count)
        self._metrics.images.inc(len(files))
        return files

    def _find_maker(self, cut: str) -> ImageMaker:
        if self._client is None:
            self._client = self._connect()
        if cut not in self._makers:
            self._makers[cut] = ImageMaker(
                self._directory, self._client, cut,
                deadline_s=self._timeout_s, pool_key=self._pool_key, loras=self._loras,
                weights=self._weights,
            )  # fmt: skip
        return self._makers[cut]


def read_edit(parts: Sequence[FormPart]) -> EditRequest:
    """What a form asks for besides its picture. Raises RequestFault, which names the field."""
    body = to_json([part for part in parts if not part.is_file], EDIT_TEXTS)
    try:
        return EditRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        where = str(problem["loc"][0]) if problem["loc"] else None
        raise refuse(f"{where}: {problem['msg'].removeprefix('Value error, ')}", where) from error


def read_init_image(parts: Sequence[FormPart]) -> Image:
    """The one picture of a form. Raises RequestFault."""
    if any(part.name == "mask" for part in parts):
        raise refuse("this server makes whole pictures anew; leave the mask out", "mask")
    pictures = [part.content for part in parts if part.name == "image" and part.is_file]
    if len(pictures) != 1:
        raise refuse(f"the form has {len(pictures)} pictures called image; expected one", "image")
    try:
        return read_picture(io.BytesIO(pictures[0]), "image")
    except SettingsError as error:
        raise refuse(str(error), "image") from error


def list_wanted(request: ImageRequest, init_image: Image | None = None) -> list[ImageSettings]:
    """Settings for each picture of a request. Raises RequestFault, which names the field."""
    width, height = parse_size(request.size)
    first = request.seed if request.seed is not None else random.getrandbits(32)
    wanted = [
        ImageSettings(
            request.prompt,
            request.negative_prompt or "",
            steps=request.steps or DEFAULT_STEPS,
            guidance=DEFAULT_GUIDANCE if request.guidance is None else request.guidance,
            seed=(first + index) % SEEDS,
            height=height,
            width=width,
            cut=request.cut or "unet",
            init_image=init_image,
            strength=read_strength(request),
        )
        for index in range(request.n or 1)
    ]
    try:
        wanted[0].check()
    except SettingsError as error:
        fields = {
            "prompt": "prompt", "guidance": "guidance", "height": "size", "width": "size",
            "strength": "strength",
        }  # fmt: skip
        param = next((param for word, param in fields.items() if f"the {word}" in str(error)), None)
        raise refuse(str(error), param) from error
    return wanted


def read_strength(request: ImageRequest) -> float:
    given = request.strength if isinstance(request, EditRequest) else None
    return DEFAULT_STRENGTH if given is None else given


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`512x768` to width and height in pixels. Raises RequestFault."""
    if text is None or text == "auto":
        return None, None
    match = re.fullmatch("([0-9]{1,4})x([0-9]{1,4})", text)
    if match is None or max(int(match[1]), int(match[2])) > MAX_SIDE:
        raise refuse(
            f"size is {text[:40]!r}; expected WIDTHxHEIGHT of at most {MAX_SIDE} pixels, as "
            "512x512, or auto",
            "size",
        )
    return int(match[1]), int(match[2])
