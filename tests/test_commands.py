"""What commands say and do around the main job: what to type next, who is in the way."""

from __future__ import annotations

from pathlib import Path

import redis

from deploy.embedded_redis import EmbeddedRedis
from deploy.pool import LocalPool, PoolSettings


def test_redis_passwords_are_in_no_argument_of_a_pools_processes(
    redis_server: EmbeddedRedis,
) -> None:
    server = redis.Redis.from_url(redis_server.url)
    server.config_set("requirepass", "open-sesame")
    url = redis_server.url.replace("unix://", "unix://:open-sesame@")
    try:
        with LocalPool(PoolSettings(workers=1, model="stories-llama", redis_url=url)) as pool:
            pool.wait_for_workers(1)
            for child in pool.workers.values():
                assert b"open-sesame" not in Path(f"/proc/{child.pid}/cmdline").read_bytes()
    finally:
        redis.Redis.from_url(url).config_set("requirepass", "")
