"""However `midspan up` ends, what it started ends too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_until

from deploy.child import Child, guarded_command, midspan_command
from deploy.pool import LocalPool, PoolSettings

pytestmark = pytest.mark.usefixtures("unforked")  # who is whose child, and command lines

GONE_WITHIN_S = 20.0  # they need a fraction of a second; the machine may be busy


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process, and theirs."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    children = [int(line) for line in found.stdout.split()]
    return [*children, *(each for child in children for each in children_of(child))]


def wait_until_gone(pids: list[int]) -> None:
    give_up_at = time.monotonic() + GONE_WITHIN_S
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < give_up_at, f"{alive} of {pids} live on"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return state_of(pid) != "Z"
    except OSError:
        return False


def state_of(pid: int) -> str:
    """R for one that runs, T for one that is stopped, Z for one that has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def is_worker(pid: int) -> bool:
    return b"worker\0" in command_line(pid)


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a paused process will get this signal when it goes on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return bool(mask >> (number - 1) & 1)


def start_up(directory: Path, *wrapper: str) -> Child:
    command = midspan_command(
        "up", "--workers", "1", "--model", "stories-llama",
        "--edge-endpoint", f"ipc://{directory}/edges", "--worker-endpoint", f"ipc://{directory}/workers",
    )  # fmt: skip
    up = Child("up", [*wrapper, *command], directory)
    up.wait_for("ready: edges at")
    return up


def test_a_kill_9_of_up_ends_its_broker_workers_and_redis(tmp_path: Path) -> None:
    up = start_up(tmp_path)
    pids = children_of(up.pid)
    assert len(pids) >= 3
    up.kill()
    wait_until_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_ends_when_it_is_told_to_while_its_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = midspan_command(
        "up", "--workers", "1", "--edge-endpoint", f"ipc://{tmp_path}/edges",
        "--worker-endpoint", f"ipc://{tmp_path}/workers", "--redis-url", "redis://127.0.0.1:9",
    )  # fmt: skip
    up = Child("up", command, tmp_path / "logs")
    wait_until(lambda: any(map(is_worker, children_of(up.pid))))
    pids = children_of(up.pid)
    (worker,) = filter(is_worker, pids)
    os.kill(worker, signal.SIGSTOP)  # so that it is never there
    wait_until(lambda: state_of(worker) == "T")  # till then SIGTERM would end it at once
    up.signal(number)
    try:
        wait_until(lambda: has_pending(worker, signal.SIGTERM))
    finally:
        os.kill(worker, signal.SIGCONT)
    wait_until_gone([up.pid, *pids])
    assert up.log_text().splitlines()[-1] == "stopped"
    assert not list(tmp_path.glob("midspan-*"))


@pytest.mark.long
def test_a_serve_that_is_told_to_end_again_and_again_leaves_nothing_of_its_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--with-pool", "--workers", "1", "--threads", "1", "--port", "0"]
    serve = Child("serve", midspan_command("serve", *options), tmp_path / "logs")
    serve.wait_for("serving ")
    pids = children_of(serve.pid)
    assert list(tmp_path.glob("midspan-*"))
    give_up_at = time.monotonic() + GONE_WITHIN_S
    while serve.is_running():
        serve.signal(signal.SIGTERM)
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    wait_until_gone(pids)
    assert not list(tmp_path.glob("midspan-*"))
    assert not list(tmp_path.glob(".midspan/serves/*"))


def test_a_child_that_was_started_again_ends_with_up_as_well(tmp_path: Path) -> None:
    up = start_up(tmp_path)
    for child in children_of(up.pid):
        if is_worker(child) or b"redis-server" in command_line(child):
            os.kill(child, signal.SIGKILL)
    up.wait_for("redis was killed by signal 9 (SIGKILL); started an empty one")
    up.wait_for("w1 was killed by signal 9 (SIGKILL); starting w2")
    pids = children_of(up.pid)
    up.kill()
    wait_until_gone(pids)


def test_a_closed_terminal_stops_up_in_order(tmp_path: Path) -> None:
    up = start_up(tmp_path)
    pids = children_of(up.pid)
    up.signal(signal.SIGHUP)
    wait_until_gone([up.pid, *pids])
    assert up.log_text().endswith("stopped\n")


def test_up_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    up = start_up(tmp_path, "nohup")
    up.signal(signal.SIGHUP)
    children = children_of(up.pid)
    os.kill(next(pid for pid in children if is_worker(pid)), signal.SIGKILL)
    up.wait_for("starting w2")  # it looked after the pool when it had had the signal
    up.stop()
    wait_until_gone(children)


def test_a_guarded_command_has_the_process_id_and_its_guardian_goes_with_it(tmp_path: Path) -> None:
    child = Child("sleeper", guarded_command("sleep", "600"), tmp_path)
    while not (guardians := children_of(child.pid)):
        child.check()
    while b"sleep\0" not in command_line(child.pid):
        child.check()
    child.kill()
    wait_until_gone(guardians)


def test_a_paused_redis_ends_with_its_pool(tmp_path: Path) -> None:
    script = (
        "import os, signal; from deploy.embedded_redis import EmbeddedRedis; "
        "from pathlib import Path; "
        f"redis = EmbeddedRedis(Path({str(tmp_path)!r})); redis.child.signal(signal.SIGSTOP); "
        "print(redis.child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    wait_until_gone([int(done.stdout)])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_child_can_write_to_the_lifeline() -> None:
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as pool:
        pool.wait_for_workers(1)
        assert pool.broker is not None
        assert pool.redis is not None
        ours = {os.stat(fd).st_ino for fd in _lifeline_fds()}
        for child in (pool.broker, pool.redis.child, *pool.workers.values()):
            flags = [
                fd
                for fd in Path(f"/proc/{child.pid}/fd").iterdir()
                if _inode(fd) in ours and _is_writable(child.pid, fd.name)
            ]
            assert not flags, f"{child.name} holds the writing end"


def _lifeline_fds() -> tuple[int, int]:
    from deploy.child import lifeline

    return lifeline()


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def _is_writable(pid: int, fd: str) -> bool:
    text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
    flags = next(line.split()[1] for line in text.splitlines() if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
