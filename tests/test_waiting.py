"""What moves on a terminal while a command works; nobody else gets to see it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import ROOT

from deploy.pool import LocalPool, PoolSettings

AT_ONCE = "import common.console.waiting as w; w.PATIENCE_S = 0.0; w.FRAME_S = 0.01\n"
SLOWLY = AT_ONCE + "import sys, time\n"


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


def run_at_terminal(
    script: str, home: Path, *, columns: int = 80, term: str = "xterm"
) -> tuple[str, str]:
    """What a script writes to stdout, which is a pipe, and to stderr, which is a terminal."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # its other end is closed
            while data := os.read(main, 4096):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stderr=side, stdout=subprocess.PIPE, check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home), "TERM": term, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    os.close(side)
    reader.join()
    os.close(main)
    assert done.returncode == 0, bytes(shown)
    return done.stdout.decode(), shown.decode()


def run_command(home: Path, *arguments: str) -> tuple[str, str]:
    return run_at_terminal(f"{AT_ONCE}from deploy.cli import midspan; midspan({arguments})", home)


def test_a_spinner_turns_and_leaves_nothing(tmp_path: Path) -> None:
    script = SLOWLY + "with w.waiting('loading x') as spinner:\n    time.sleep(0.2)\nprint('done')"
    printed, shown = run_at_terminal(script, tmp_path)
    assert printed == "done\n"
    assert "⠋ loading x, 0 s" in shown
    assert "⠙ loading x, 0 s" in shown
    assert shown.endswith("\r\033[K")


def test_a_spinner_keeps_to_one_line_of_a_narrow_terminal(tmp_path: Path) -> None:
    script = SLOWLY + "with w.waiting('loading ' + 'x' * 60):\n    time.sleep(0.2)"
    _, shown = run_at_terminal(script, tmp_path, columns=20)
    lines = shown.split("\r\033[K")
    assert "⠋ loading " in shown
    assert max(map(len, lines)) < 20


def test_a_terminal_that_cannot_wipe_out_a_line_shows_nothing(tmp_path: Path) -> None:
    script = SLOWLY + "with w.waiting('loading x'): time.sleep(0.1)\n"
    assert run_at_terminal(script, tmp_path, term="dumb") == ("", "")


def test_a_command_whose_stderr_is_closed_waits_without_a_word() -> None:
    script = (
        "import common.console.waiting as w\nwith w.waiting('loading x'): print('done')\n"
        "with w.progress_bar(2, 'steps') as bar: bar.update(2)\n"
    )
    shell = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    done = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_what_is_quick_shows_nothing(tmp_path: Path) -> None:
    script = "import common.console.waiting as w\nwith w.waiting('loading x'): pass"
    assert run_at_terminal(script, tmp_path) == ("", "")


def test_a_bar_and_a_spinner_that_nobody_wants_show_nothing(tmp_path: Path) -> None:
    script = (
        SLOWLY + "with w.waiting('loading x', is_shown=False): time.sleep(0.1)\n"
        "with w.progress_bar(2, 'steps', is_shown=False) as bar: bar.update(1)\n"
    )
    assert run_at_terminal(script, tmp_path) == ("", "")
    seen = script.replace("False", "True")
    assert "steps" in run_at_terminal(seen, tmp_path)[1]
    piped = subprocess.run([sys.executable, "-c", seen], cwd=ROOT, capture_output=True, check=True)
    assert (piped.stdout, piped.stderr) == (b"", b"")


def test_ask_says_that_it_loads_a_model(pool: LocalPool, tmp_path: Path) -> None:
    options = ["ask", "Once", "--broker", pool.edge_endpoint, "-n", "5", "--threads", "1"]
    printed, shown = run_command(tmp_path, *options)
    assert "loading stories-llama, " in shown
    assert printed.strip()
    assert "\033" not in printed
    _, shown = run_command(tmp_path, *options, "--json")
    assert shown == ""


@pytest.mark.long
def test_the_steps_of_a_picture_are_counted(tmp_path: Path) -> None:
    with LocalPool(PoolSettings(workers=1, image_model="landscapes-sdxl")) as images:
        options = ["image", "a hill", "-o", str(tmp_path / "a.png"), "--steps", "2",
                   "--broker", images.edge_endpoint, "--threads", "1"]  # fmt: skip
        _, shown = run_command(tmp_path, *options)
        assert "loading landscapes-sdxl" in shown
        assert "100%" in shown
        assert run_command(tmp_path, *options, "--json", "--seed", "1")[1] == ""
