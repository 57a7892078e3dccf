"""The commands of deploy/docker, run in fresh virtual environments.

No container engine is here. What the Dockerfiles do with pip is done as they say, then their
default commands are run with other addresses, and the commands by which a container engine asks for
their health. What is not run: the base image, its user, and a file system that cannot be written.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from test_manifests import DEPLOY, make_keys, read_dockerfile

from common.settings import REDIS_URL
from deploy.child import Child
from deploy.embedded_redis import EmbeddedRedis

ROOT = DEPLOY.parent
HOME = "/opt/midspan"  # of the environment in the images
INSTALL_LIMIT_S = 900


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `docker build` would send: what .dockerignore names."""
    directory = tmp_path_factory.mktemp("context")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        source = ROOT / line.removeprefix("!")
        if not line.startswith("!") or not source.exists():
            continue
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, directory / source.name, ignore=ignored)
        else:
            shutil.copy(source, directory)
    return directory


def build(name: str, context: Path, home: Path) -> None:
    """Run what a Dockerfile runs, into another directory, and with pip's own index for torch."""
    lines = "\n".join(read_dockerfile(name)).replace("\\\n", " ").splitlines()
    commands = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")]
    for command in commands:
        if "useradd" in command:
            continue
        told = command.replace(HOME, str(home)).replace(" --index-url ${TORCH}", "")
        told = told.replace("python -m venv", f"{shutil.which('python3.11') or 'python3'} -m venv")
        done = subprocess.run(
            shlex.split(told), cwd=context, capture_output=True, text=True, check=False,
            timeout=INSTALL_LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{told}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def read_commands(name: str, home: Path, others: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """An image's default command and its health check, with other words in some places."""
    lines = read_dockerfile(name)
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT "))
    (default,) = (line for line in lines if line.startswith("CMD "))
    (health,) = (line for line in lines if line.startswith("HEALTHCHECK "))
    run = json.loads(entry.removeprefix("ENTRYPOINT ")) + json.loads(default.removeprefix("CMD "))
    check = json.loads(health[health.index("[") :])

    def change(word: str) -> str:
        for old, new in {HOME: str(home), **others}.items():
            word = word.replace(old, new)
        return word

    return [change(word) for word in run], [change(word) for word in check]


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd="/",
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pool") / "keys"
    make_keys(directory)
    return directory


@pytest.fixture(scope="module")
def broker(
    context: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The broker's image, running; its environment and addresses."""
    home = tmp_path_factory.mktemp("broker") / "venv"
    build("broker", context, home)
    ports = {port: str(free_port()) for port in ("5555", "5556", "9100")}
    others = {"0.0.0.0": "127.0.0.1", "/keys": str(keys), **ports}
    command, check = read_commands("broker", home, others)
    child = Child("broker", command, home.parent)
    child.wait_for("broker ready")
    try:
        yield {
            "home": str(home), "check": json.dumps(check),
            "edges": f"tcp://127.0.0.1:{ports['5555']}",
            "workers": f"tcp://127.0.0.1:{ports['5556']}",
        }  # fmt: skip
    finally:
        child.stop()


@pytest.mark.long
def test_the_brokers_image_has_no_torch_and_says_that_it_is_well(broker: dict[str, str]) -> None:
    python = f"{broker['home']}/bin/python"
    assert "No module named 'torch'" in run([python, "-c", "import torch"]).stderr
    healthy = run(json.loads(broker["check"]))
    assert (healthy.returncode, healthy.stderr) == (0, "")


@pytest.mark.long
def test_status_in_the_brokers_image_shows_a_pool_to_who_has_a_key(
    broker: dict[str, str], keys: Path
) -> None:
    midspan = f"{broker['home']}/bin/midspan"
    edge = [
        "--broker", broker["edges"], "--key", str(keys / "edge.key_secret"),
        "--broker-key", str(keys / "broker.key"),
    ]  # fmt: skip
    done = run([midspan, "status", *edge, "--json"])
    assert json.loads(done.stdout)["workers"] == []


@pytest.mark.long
def test_a_worker_and_an_endpoint_from_their_image_answer_through_the_brokers(
    broker: dict[str, str], context: Path, keys: Path, tmp_path: Path
) -> None:
    home = tmp_path / "venv"
    build("worker", context, home)
    metrics = str(free_port())
    others = {
        "tcp://broker:5556": broker["workers"], "0.0.0.0": "127.0.0.1",
        "/keys": str(keys), "9100": metrics,
    }  # fmt: skip
    command, check = read_commands("worker", home, others)
    redis = EmbeddedRedis(tmp_path)
    environment = {REDIS_URL: redis.url, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    worker = Child("worker", command, tmp_path, environment)
    try:
        worker.wait_for(" ready: ", timeout_s=120)
        healthy = run(check)
        assert (healthy.returncode, healthy.stderr) == (0, "")
        asked = run(
            [
                str(home / "bin/midspan"), "ask", "Once upon a time", "-n", "8", "--threads", "1",
                "--broker", broker["edges"], "--key", str(keys / "edge.key_secret"),
                "--broker-key", str(keys / "broker.key"),
            ],
            HOME=str(tmp_path),
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.strip()
    finally:
        worker.stop()
        redis.child.stop()
