"""`midspan serve` as a process: one command for everything, and an end that loses no answer."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from forks import error_line
from serving import ENDLESS, MODEL
from waiting import wait_until

from deploy.child import Child, midspan_command
from deploy.pool import LocalPool, PoolSettings

EXIT_LIMIT_S = 30.0  # a second is usual; whoever shares the machine may need the rest


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


def start(directory: Path, *options: str) -> tuple[Child, str]:
    child = Child("serve", midspan_command("serve", "--port", "0", *options), directory)
    try:
        return child, child.wait_for("serving ").rpartition(" at ")[2]
    except BaseException:
        child.stop()
        raise


def test_one_command_serves_texts_and_pictures_with_a_pool_of_its_own(tmp_path: Path) -> None:
    child, url = start(tmp_path, "--with-pool", "--workers", "1")
    try:
        client = openai.OpenAI(base_url=url, api_key="none")
        models = [model.id for model in client.models.list()]
        assert models == [MODEL, "landscapes-sdxl"]
        done = client.completions.create(model=MODEL, prompt="Once", max_tokens=3)
        assert done.usage is not None
        assert done.usage.completion_tokens == 3
        made = client.images.generate(prompt="a hill", extra_body={"steps": 1})
        assert len(made.data or []) == 1
        client.close()
        child.signal(signal.SIGTERM)
        wait_until(lambda: not child.is_running(), EXIT_LIMIT_S)
        *_, serving, page, broker, stopped = child.log_text().splitlines()
        assert (serving, stopped) == (f"serving {MODEL} at {url}", "stopped")
        assert page == f"a page at {url.removesuffix('/v1')}"
        assert broker.startswith("its pool, for midspan chat, image and status: --broker tcp://")
    finally:
        child.stop()
    with pytest.raises(Exception, match="serve ended with exit code 0"):
        child.check()


def test_running_answers_are_finished_and_new_requests_are_refused(
    pool: LocalPool, tmp_path: Path
) -> None:
    child, url = start(tmp_path, "--broker", pool.edge_endpoint, "--codec", "fp32")
    try:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": MODEL, "prompt": "Once", **ENDLESS, "max_tokens": 250}
        stream = client.completions.create(stream=True, **options)
        text = next(stream).choices[0].text
        child.signal(signal.SIGTERM)
        health = url.replace("/v1", "/health")
        wait_until(lambda: httpx.get(health).json() == {"status": "draining"})
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as no:
            client.completions.create(**options)
        assert (no.value.status_code, no.value.code) == (503, "shutting_down")
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert len(text + "".join(chunk.choices[0].text for chunk in rest)) > 500
        wait_until(lambda: not child.is_running(), EXIT_LIMIT_S)
        client.close()
    finally:
        child.stop()


def test_a_second_signal_ends_it_at_once(pool: LocalPool, tmp_path: Path) -> None:
    child, url = start(tmp_path, "--broker", pool.edge_endpoint)
    try:
        ended = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{url}/completions", json={
                "prompt": "Once", "stream": True, **ENDLESS, "n": 16,
            }, timeout=60) as response:  # fmt: skip
                for _ in response.iter_bytes():
                    ended.set()

        reader = threading.Thread(target=_quietly(read))
        reader.start()
        assert ended.wait(20)
        child.signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(url.replace("/v1", "/health")).json()["status"] == "draining")
        child.signal(signal.SIGTERM)
        wait_until(lambda: not child.is_running(), EXIT_LIMIT_S)
        reader.join()
    finally:
        child.stop()


def _quietly(work: Any) -> Any:
    def run() -> None:
        with contextlib.suppress(httpx.HTTPError):
            work()

    return run


def test_keys_are_read_and_what_is_typed_is_checked_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    assert "can be reached from other machines" in error_line("serve", "--host", "0.0.0.0")
    assert "--broker names another pool" in error_line(
        "serve", "--with-pool", "--broker", "tcp://127.0.0.1:1"
    )
    assert "--api-key-file" in error_line("serve", "--api-key-file", str(tmp_path / "none"))
    assert "no directory here" in error_line("serve", "--model", "gpt-9")
    assert "expected tcp://HOST:PORT" in error_line("serve", "--broker", "7301")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        line = error_line("serve", "--port", port)
    assert f"127.0.0.1:{port} cannot be bound: Address already in use by process" in line


def test_a_host_of_others_is_served_with_a_key(pool: LocalPool, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    child, url = start(
        tmp_path, "--broker", pool.edge_endpoint, "--host", "0.0.0.0", "--api-key-file", str(keys)
    )
    try:
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/models").status_code == 401
        client = openai.OpenAI(base_url=url, api_key="sesame")
        assert client.completions.create(model=MODEL, prompt="Once", max_tokens=1).choices
        client.close()
    finally:
        child.stop()
