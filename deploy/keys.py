"""`midspan keys`: make CURVE keys, and say which ones a broker admits."""

from __future__ import annotations

from pathlib import Path

import click

from common.console.renamed import RenamedOption
from common.console.tables import format_table
from common.errors import SettingsError
from common.security.keys import (
    DEFAULT_KEYS,
    ROLES,
    authorize,
    create_key,
    list_authorized,
    read_public,
    revoke,
)

directory_option = click.option(
    "--keys",
    "directory",
    cls=RenamedOption,
    old=["--dir"],
    type=click.Path(path_type=Path),
    default=DEFAULT_KEYS,
    show_default=True,
    help="Directory of keys.",
)
role_option = click.option(
    "--as", "role", type=click.Choice(ROLES), required=True, help="Whose key it is."
)


@click.group()
def keys() -> None:
    """Make keys, and say who is admitted.

    \b
    On the broker's machine:  midspan keys new broker
                              midspan broker --keys ~/.midspan/keys
                                             --edge-endpoint tcp://0.0.0.0:5555 …
    On a device:              midspan keys new phone       hand out phone.key, keep .key_secret
    On the broker's machine:  midspan keys authorize phone.key --as edge
    On the device:            midspan ask … --key ~/.midspan/keys/phone.key_secret
                                            --broker-key broker.key
    Workers the same with --as worker.
    """


@keys.command()
@click.argument("name")
@directory_option
def new(name: str, directory: Path) -> None:
    """Make the pair NAME.key and NAME.key_secret."""
    path = create_key(directory.expanduser(), name)
    click.echo(f"{path}: public, hand it out")
    click.echo(f"{path.with_suffix('.key_secret')}: secret, it stays here")
    click.echo(f"public key: {read_public(str(path)).decode()}")


@keys.command("authorize")
@click.argument("public_key")
@role_option
@click.option("--name", help="What to call it.  [default: the file's name]")
@directory_option
def authorize_command(public_key: str, role: str, name: str | None, directory: Path) -> None:
    """Admit PUBLIC_KEY, a .key file or its 40 characters, to the broker with these keys.

    A file is looked for where the keys lie, too.
    """
    directory = directory.expanduser()
    file = find_key(public_key, directory)
    public = read_public(public_key if file is None else str(file))
    if name is None:
        if file is None:
            raise SettingsError("a key given as text needs a --name")
        name = file.stem
    authorize(directory, public, role, name)
    click.echo(
        f"{role} {name} is admitted from now on; `midspan keys revoke {name} --as {role}` takes "
        "that back"
    )


@keys.command("revoke")
@click.argument("name")
@role_option
@directory_option
def revoke_command(name: str, role: str, directory: Path) -> None:
    """Admit the key that was authorized as NAME no longer; its connections end within a second."""
    revoke(directory.expanduser(), role, name)
    click.echo(f"{role} {name} is not admitted any more")


def find_key(path_or_text: str, directory: Path) -> Path | None:
    """The file that is meant: a path, or else a name in `directory`. None if there is neither."""
    for file in (Path(path_or_text).expanduser(), directory / path_or_text):
        if file.is_file():
            return file
    return None


@keys.command("list")
@directory_option
def list_command(directory: Path) -> None:
    """Show the keys that are here and those that are admitted."""
    directory = directory.expanduser()
    rows = [
        ("here", path.stem, read_public(str(path)).decode())
        for path in sorted(directory.glob("*.key"))
    ]
    for role in ROLES:
        admitted = list_authorized(directory, role).items()
        rows += [(f"admitted as {role}", name, public.decode()) for public, name in admitted]
    if not rows:
        raise SettingsError(f"there are no keys in {directory}; `midspan keys new NAME` makes one")
    click.echo(format_table(("what", "name", "public key"), rows))
