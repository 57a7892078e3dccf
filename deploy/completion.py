"""`midspan completion`: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_MIDSPAN_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that completes midspan's commands and options.

    \b
    bash:  eval "$(midspan completion bash)"     in ~/.bashrc
    zsh:   eval "$(midspan completion zsh)"      in ~/.zshrc
    fish:  midspan completion fish > ~/.config/fish/completions/midspan.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "midspan", VARIABLE).source())
