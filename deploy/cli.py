"""The front door: `midspan COMMAND`. A command's module is imported when the command is run."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from common.console.processes import end_with_parent
from common.errors import MidspanError
from deploy.config import check_names, make_defaults, name_options, read_config

COMMANDS = {
    "ask": ("edge_agent.commands.ask:ask", "Answer a prompt with the pool's help."),
    "autoscale": (
        "deploy.scaling.command:autoscale",
        "Run as many workers as a pool needs.",
    ),
    "broker": ("broker.cli:broker", "Run the broker."),
    "calibrate": ("evaluation.calibrate:calibrate", "Measure what calibrated codecs need to know."),
    "chat": ("edge_agent.commands.chat:chat", "Talk with a model."),
    "chaos": ("chaos.command:chaos", "Break a pool on purpose and compare every token."),
    "check": ("evaluation.check:check", "Say whether a model can be cut, and what it needs."),
    "completion": ("deploy.completion:completion", "Print what a shell needs to complete this."),
    "demo": ("deploy.demo:demo", "See it all work in a minute."),
    "eval": ("evaluation.command:evaluate", "Measure quality against bytes."),
    "image": ("edge_agent.commands.image:image", "Make a picture with the pool's help."),
    "keys": ("deploy.keys:keys", "Make keys, and say who is admitted."),
    "loadtest": ("loadtest.command:loadtest", "Put many sessions on a pool and measure."),
    "model": ("deploy.model:model", "Take a model apart, and convert it."),
    "neurons": ("evaluation.neurons:neurons", "Find the active neurons of a model."),
    "plan": ("evaluation.plan:plan", "Propose which spans fit on which devices."),
    "score": ("edge_agent.commands.score:score", "Say which continuation of a prompt is likelier."),
    "serve": ("deploy.serve:serve", "Answer any OpenAI client with the pool's help."),
    "status": ("deploy.status:status", "Show workers, sessions and queues."),
    "train-drafter": (
        "evaluation.drafting.command:train_drafter",
        "Make what guesses a model's next tokens.",
    ),
    "up": ("deploy.up:up", "Run a whole pool on this machine."),
    "worker": ("cloud_worker.cli:worker", "Run a worker."),
}


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def drop_output() -> None:
    """Python would try once more to write what stdout still holds when it exits, and fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class LazyGroup(click.Group):
    """Lists commands without importing them, and turns our errors into one line and exit code 1."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        name_options(command, (name,))
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, arguments)
        if name is not None and command is not None:
            config = read_config()
            check_names(config, COMMANDS)
            context.default_map = {name: make_defaults(command, (name,), config)}
        return name, command, rest

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except MidspanError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            drop_output()
            where = error.filename or "the output"
            raise click.ClickException(f"{where} cannot be written: {error.strerror}") from error


@click.group(cls=LazyGroup)
@click.version_option(package_name="midspan")
def midspan() -> None:
    """Split inference: the ends of a model here, its middle on a pool of stateless workers."""
    end_with_parent()


if __name__ == "__main__":
    midspan()
