"""`midspan chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console.options import (
    answer_tokens_option,
)
from common.console.processes import freeze_loaded_objects
from common.console.waiting import waiting
from common.errors import MidspanError, SettingsError
from edge_agent.commands.cost_tables import format_stats
from edge_agent.commands.means_options import means_options
from edge_agent.commands.own_engine import open_engine
from edge_agent.commands.prompts import read_template
from edge_agent.commands.question import Means
from edge_agent.commands.run_options import (
    print_stats,
    stats_option,
    system_option,
    template_option,
)
from edge_agent.commands.sampling_options import Sampling, sampling_options
from edge_agent.text.sampling import read_defaults

if TYPE_CHECKING:
    from edge_agent.text.chat import Chat

HISTORY = Path("~/.midspan/chat_history")  # of what was typed, for the arrow keys
HELP = """\
/reset           forget what was said
/system [TEXT]   the system prompt; without TEXT shows it, with - takes it away
/stats           what the last answer cost
/model           which model this is, and where it is cut
/save FILE       write the chat as JSON
/help            this
/quit            end, as Ctrl-D does
Ctrl-C stops an answer."""


@click.command()
@means_options
@answer_tokens_option(400)
@sampling_options
@system_option
@template_option
@stats_option
def chat(
    means: Means,
    max_new_tokens: int,
    sampling: Sampling,
    system: str,
    chat_template: Path | None,
    with_stats: bool,
) -> None:
    """Talk with a model; /help shows the commands. Lines may also come from a pipe.

    Text is not sent. Rows of numbers are, and who holds the model's weights can turn those back
    into what was said.
    """
    drawing = sampling.read_settings(read_defaults(means.directory))
    sampling.warn_of_greedy(drawing)
    template = read_template(chat_template) if chat_template else None
    with open_engine(means) as own:
        from edge_agent.text.chat import Chat

        talk = Chat(own.engine, own.tokenizer, drawing, max_new_tokens, system, template)
        freeze_loaded_objects()
        about = f"{own.name}, layers {own.choice} in the pool, {means.codecs.codec} on the wire"
        Terminal(talk, about, with_stats).run()
        talk.close()


class Terminal:
    """Reads lines, answers them or does what their command says."""

    def __init__(self, talk: Chat, about: str, with_stats: bool) -> None:
        """`with_stats`: what an answer has cost is said after each."""
        self._talk = talk
        self._about = about
        self._with_stats = with_stats
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._set_system,
            "/stats": lambda _: self._show_stats(),
            "/model": lambda _: click.echo(self._about),
            "/save": self._save,
            "/help": lambda _: click.echo(HELP),
        }

    def run(self) -> None:
        """Until the input ends."""
        if sys.stdin.isatty():
            click.echo(f"{self._about}\n/help shows the commands, Ctrl-D ends")
        for line in read_lines():
            text = line.strip()
            command, _, rest = text.partition(" ")
            if command in ("/quit", "/exit"):
                return
            try:
                if command in self._commands:
                    self._commands[command](rest.strip())
                elif text.startswith("/"):
                    click.echo(f"there is no {command}; /help shows what there is", err=True)
                elif text:
                    self._answer(text)
            except MidspanError as error:
                click.echo(f"error: {error}", err=True)

    def _answer(self, text: str) -> None:
        answer = self._talk.ask(text)
        try:
            with waiting("waiting for the first token"):
                click.echo(next(answer, ""), nl=False)
            for piece in answer:
                click.echo(piece, nl=False)
            click.echo()
        except KeyboardInterrupt:
            answer.close()
            click.echo(" [stopped]")
        if self._with_stats and self._talk.stats is not None:
            print_stats(format_stats(self._talk.stats.to_json()))

    def _reset(self, _: str) -> None:
        self._talk.reset()
        click.echo("forgotten")

    def _set_system(self, text: str) -> None:
        if text:
            self._talk.system = "" if text == "-" else text
        click.echo(f"system prompt: {self._talk.system or 'none'}")

    def _show_stats(self) -> None:
        if self._talk.stats is None:
            click.echo("nothing was answered yet")
        else:
            click.echo(format_stats(self._talk.stats.to_json()))

    def _save(self, name: str) -> None:
        if not name:
            raise SettingsError("/save wants the name of a file")
        path = Path(name).expanduser()
        try:
            path.write_text(json.dumps({"messages": self._talk.messages}, indent=1) + "\n")
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}") from error
        click.echo(f"saved to {path}")


def read_lines() -> Iterator[str]:
    """What is typed, with a history; or what comes through a pipe. Ctrl-C drops a line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    path = HISTORY.expanduser()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(path)))
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
