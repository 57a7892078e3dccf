"""`midspan chat`: turns that send only what is new, commands, and an answer that is stopped."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from pools import PROMPTS, reference_tokens

from common.errors import SettingsError
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.chat import Chat
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 16
CHAT = ("chat", "--threads", "1")  # in this process, whose other tests count on one
LIMIT_S = 40.0


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(demo_ends: ModelEnds) -> TextTokenizer:
    return TextTokenizer(demo_ends.directory)


@pytest.fixture
def engine(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Engine]:
    with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as running:
        yield running


def talk(engine: Engine, tokenizer: TextTokenizer, count: int = COUNT) -> Chat:
    return Chat(engine, tokenizer, SamplingSettings(), count)


def type_lines(pool: LocalPool, *lines: str, options: Sequence[str] = ()) -> Result:
    arguments = [*CHAT, "--broker", pool.edge_endpoint, "--codec", "fp32", "-n", str(COUNT)]
    arguments += options
    return CliRunner().invoke(midspan, arguments, input="\n".join(lines) + "\n")


def test_an_answer_is_the_unsplit_models(
    engine: Engine, tokenizer: TextTokenizer, whole_model: torch.nn.Module
) -> None:
    answer = "".join(talk(engine, tokenizer).ask(PROMPTS[0]))
    (wanted,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], COUNT)
    assert answer == tokenizer.decode(wanted)


def test_a_second_turn_sends_only_its_new_tokens(engine: Engine, tokenizer: TextTokenizer) -> None:
    chat = talk(engine, tokenizer)
    first = "".join(chat.ask(PROMPTS[0]))
    assert chat.stats is not None
    row_bytes = chat.stats.bytes_up / (len(tokenizer.encode(PROMPTS[0])) + COUNT - 1)
    "".join(chat.ask("Then it rained."))
    new_rows = len(tokenizer.encode("Then it rained.")) + COUNT
    assert chat.stats.prompt_tokens > len(tokenizer.encode(PROMPTS[0] + first))
    assert chat.stats.bytes_up < 1.5 * row_bytes * new_rows


def test_what_was_stopped_stays_and_what_failed_does_not(
    engine: Engine, tokenizer: TextTokenizer
) -> None:
    chat = talk(engine, tokenizer, count=200)
    answer = chat.ask(PROMPTS[1])
    said = "".join(next(answer) for _ in range(5))
    answer.close()
    assert [message["content"] for message in chat.messages] == [PROMPTS[1], said]
    with pytest.raises(SettingsError, match="has a context of 512"):
        "".join(chat.ask("word " * 600))
    assert len(chat.messages) == 2
    assert "".join(chat.ask("Then it rained."))
    chat.reset()
    assert chat.messages == []


def test_a_chat_over_a_pipe(pool: LocalPool, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    done = type_lines(
        pool, PROMPTS[0], "/stats", "/system Be brief.", "/nonsense", f"/save {file}", "/model",
        "/save /nowhere/x.json", "/reset", "/stats", "/help", "/quit", "never read",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{COUNT} new after" in done.output
    assert "there is no /nonsense; /help shows what there is" in done.output
    assert "stories-llama, layers 2-6 in the pool, fp32 on the wire" in done.output
    assert "/nowhere/x.json cannot be written: No such file or directory" in done.output
    assert "nothing was answered yet" in done.output
    assert "Ctrl-C stops an answer." in done.output
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"] in done.output


def test_stats_are_said_after_each_answer_to_stderr(pool: LocalPool) -> None:
    done = type_lines(pool, PROMPTS[0], "Then it rained.", options=["--stats"])
    assert done.stderr.count(f"{COUNT} new after") == 2
    assert "what it cost" not in done.stdout
    assert "what it cost" not in type_lines(pool, PROMPTS[0]).output


def test_a_template_from_a_file_and_one_that_is_none(pool: LocalPool, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bad.write_text("{% for %}")
    arguments = [*CHAT, "--broker", pool.edge_endpoint, "-n", "4", "--chat-template"]
    fine = CliRunner().invoke(midspan, [*arguments, str(good)], input="Once upon a time\n")
    assert fine.exit_code == 0
    broken = CliRunner().invoke(midspan, [*arguments, str(bad)], input="Once upon a time\n")
    assert "error: the chat template refuses this" in broken.output


def test_a_tokenizer_without_a_template_says_what_to_do(engine: Engine) -> None:
    class Bare:
        has_chat_template = False

    with pytest.raises(SettingsError, match="give one with --chat-template FILE"):
        Chat(engine, Bare(), SamplingSettings(), 1)  # type: ignore[arg-type]


class Terminal:
    """A terminal with `midspan chat` in it."""

    def __init__(self, pool: LocalPool, home: Path) -> None:
        self._main, side = pty.openpty()
        command = [
            sys.executable, "-m", "midspan", "chat", "--broker", pool.edge_endpoint, "-n", "400",
            "--draft", "off",  # stories would be over before they are stopped
        ]  # fmt: skip
        environment = {**os.environ, "HOME": str(home), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(side)
        self.shown = ""

    def type(self, keys: str) -> None:
        time.sleep(0.5)  # what comes while the terminal changes its mode is thrown away
        os.write(self._main, keys.encode())

    def wait_for(self, pattern: str) -> None:
        """Until what was shown since the last time has this; the rest is left for the next."""
        give_up_at = time.monotonic() + LIMIT_S
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < give_up_at, self.shown
            if not select.select([self._main], [], [], 0.1)[0]:
                continue
            try:
                self.shown += os.read(self._main, 4096).decode(errors="replace")
            except OSError:  # its other end is closed
                assert found, self.shown
        self.shown = self.shown[found.end() :]


def _take_terminal() -> None:
    """Ctrl-C is for whoever has the terminal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it


def test_ctrl_c_stops_an_answer_and_not_the_program(pool: LocalPool, tmp_path: Path) -> None:
    terminal = Terminal(pool, tmp_path)
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("Once upon a time, there was a fox\r")
    terminal.wait_for(r"named \w+\. ")  # the story goes on
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for("> ")
    terminal.type("half a line\x03")
    terminal.wait_for("> ")
    terminal.type("/model\r")
    terminal.wait_for("layers 2-6 in the pool")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(LIMIT_S) == 0
    history = tmp_path / ".midspan" / "chat_history"
    assert "+Once upon a time, there was a fox" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
