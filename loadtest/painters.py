"""Pictures that are painted on the same pool, one after another, while texts are asked for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import MidspanError
from edge_agent.engine.client import BrokerClient
from edge_agent.image.maker import ImageMaker, ImageSettings, Progress
from loadtest.percentiles import summarize

PROMPT = "a red house on a green hill under a blue sky"
STEPS = 10


class LoadIsOver(Exception):
    """A picture that is not done yet is not wanted any more."""


@dataclass(slots=True)
class Pictures:
    """What became of them. Threads add to it; each addition is one operation."""

    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    failures: list[MidspanError] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return {
            "made": len(self.seconds),
            "failed": len(self.failures),
            "failures": dict(Counter(type(error).__name__ for error in self.failures)),
            "steps": STEPS,
            "image_s": summarize(self.seconds),
            "step_s": summarize(self.step_seconds),
        }


@dataclass(frozen=True, slots=True)
class Painter:
    """Paints on a connection of its own until it is told to stop."""

    maker: ImageMaker
    seed: int
    pictures: Pictures
    is_over: threading.Event

    def run(self) -> None:
        settings = ImageSettings(PROMPT, steps=STEPS, seed=self.seed)
        while not self.is_over.is_set():
            begun_at = time.monotonic()
            steps_at = [begun_at]

            def note(_: Progress, steps_at: list[float] = steps_at) -> None:
                steps_at.append(time.monotonic())
                self.pictures.step_seconds.append(steps_at[-1] - steps_at[-2])
                if self.is_over.is_set():
                    raise LoadIsOver

            try:
                self.maker.make(settings, note)
                self.pictures.seconds.append(time.monotonic() - begun_at)
            except LoadIsOver:
                return
            except MidspanError as error:
                self.pictures.failures.append(error)
                time.sleep(0.5)  # before it is tried again


@contextlib.contextmanager
def painting(
    count: int, directory: Path, connect: Callable[[], BrokerClient], seed: int
) -> Iterator[Callable[[], Pictures]]:
    """Load so many painters; they begin when the function that is given is called."""
    pictures, is_over = Pictures(), threading.Event()
    threads: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:
        painters = []
        for index in range(count):
            client = connect()
            stack.callback(client.close)
            painters.append(Painter(ImageMaker(directory, client), seed + index, pictures, is_over))

        def begin() -> Pictures:
            threads.extend(threading.Thread(target=each.run, name="painter") for each in painters)
            for thread in threads:
                thread.start()
            return pictures

        try:
            yield begin
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
