"""`--task` and `--example`: prompts that come with midspan, or its words around one's own text."""

from __future__ import annotations

from dataclasses import dataclass

import click

from common.console.option_types import COUNT
from common.console.options import Decorator, group_options
from common.errors import SettingsError
from edge_agent.commands.prompts import read_prompt
from edge_agent.text.tasks import TASKS


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """As it was given."""

    task: str | None
    example: int | None

    def read_prompt(self, argument: str | None) -> str:
        """What the model is given. Raises SettingsError for nothing, or for too much."""
        if self.task is None:
            if self.example is not None:
                raise SettingsError("--example is of a task; name it: --task")
            if argument is None:
                raise SettingsError("give a PROMPT, or --task with --example")
            return read_prompt(argument)
        task = TASKS[self.task]
        if argument is not None and self.example is not None:
            raise SettingsError("a PROMPT and --example are two texts; give one")
        if argument is not None:
            return task.ask(read_prompt(argument))
        return task.ask(task.example(1 if self.example is None else self.example).given)


def task_option(more: str) -> Decorator:
    """--task; `more` is the end of its help."""
    return click.option("--task", type=click.Choice(list(TASKS)), help=f"Kind of task: {more}")


task_options = group_options(
    "task_choice",
    TaskChoice,
    task_option("its words are put around PROMPT, or around an example."),
    click.option(
        "--example",
        type=COUNT,
        metavar="N",
        help="Which of the task's examples.  [default: 1, without a PROMPT]",
    ),
)
