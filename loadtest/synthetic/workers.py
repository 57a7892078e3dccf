"""Some workers with a stand-in for a model, all in one process: `python -m` this.

Each has its thread, its connections to broker and Redis and its heartbeat, as a worker that is a
process of its own; while their batches take their time, they sleep.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from pathlib import Path

import click

from common.console.option_types import COUNT, FiniteRange
from common.console.processes import end_with_parent, freeze_loaded_objects, set_up_torch
from common.settings import REDIS_URL

CACHE_BYTES = 64 << 20  # of each worker
HEARTBEAT_S = 0.5  # one Python runs all of them: one that must wait for it is not dead


@click.command()
@click.option("--broker", required=True)
@click.option("--redis-url", envvar=REDIS_URL, required=True)
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--cut", "cut_text")
@click.option("--ms", type=FiniteRange(0, 1e6), required=True, help="That a batch takes.")
@click.option("--count", type=COUNT, required=True)
@click.option("--name", required=True, help="Of one worker; several are called NAME.1, NAME.2, …")
def main(
    broker: str, redis_url: str, model: Path, cut_text: str | None, ms: float, count: int, name: str
) -> None:
    """Run workers until SIGTERM, which drains them."""
    end_with_parent()
    set_up_torch(threads=1)
    from cloud_worker.loop.batcher import Batcher
    from cloud_worker.loop.worker import Worker, WorkerSettings
    from cloud_worker.state.redis_store import RedisKvStore
    from cloud_worker.state.stage_cache import CacheBudget
    from cloud_worker.text.executor import TextExecutor
    from cloud_worker.text.service import TextService
    from loadtest.synthetic.model import SyntheticSpan, read_shape

    shape = read_shape(model, cut_text)
    executor = TextExecutor(
        SyntheticSpan(shape, len(shape.cut.middle), batch_s=ms / 1e3), shape.context
    )
    workers = []
    for index in range(count):
        store = RedisKvStore(redis_url, must_answer=False)
        make = functools.partial(
            TextService, executor, shape.service(), store, batcher=Batcher(512, 32),
            budget=CacheBudget(CACHE_BYTES), pool_key=None,
        )  # fmt: skip
        workers.append(
            Worker(
                store,
                lambda outbox, make=make: [make(outbox)],  # type: ignore[misc]
                WorkerSettings([broker], heartbeat_s=HEARTBEAT_S),
                name if count == 1 else f"{name}.{index + 1}",
            )
        )
    threads = [threading.Thread(target=worker.run, name=worker.worker_id) for worker in workers]

    def drain(*_: object) -> None:
        for worker in workers:
            worker.request_drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)
    freeze_loaded_objects()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
