"""CURVE keys: who may talk to a broker, and how an edge and a worker know that it is theirs.

A key is a pair of Curve25519 keys in the files that pyzmq writes: NAME.key (public, to hand out)
and NAME.key_secret (never leaves its machine). A broker's directory holds its own pair and the
public keys that it admits:

    DIR/broker.key  DIR/broker.key_secret
    DIR/authorized/edges/NAME.key
    DIR/authorized/workers/NAME.key

Keys guard the wire against the network. They hide nothing from whoever runs broker and workers.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from common.errors import SettingsError, why_unreadable

log = logging.getLogger("midspan.keys")

DEFAULT_KEYS = Path("~/.midspan/keys")
BROKER = "broker"
ROLES = ("edge", "worker")
KEY_TEXT = re.compile(rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Both halves in Z85, 40 characters each."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What an edge or a worker connects with: its own pair, and the broker's public key."""

    own: KeyPair
    broker: bytes

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket speak CURVE; before it connects."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.broker)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.own.secret)


def create_key(directory: Path, name: str) -> Path:
    """Write NAME.key and NAME.key_secret; returns the public file's path.

    Raises SettingsError for a bad name and for a key that is there: keys are never overwritten.
    """
    check_name(name)
    make_directory(directory)
    path = directory / f"{name}.key"
    if path.exists() or path.with_suffix(".key_secret").exists():
        raise SettingsError(f"{path} is there already; remove it first, or choose another name")
    before = os.umask(0o077)  # a secret must not be readable by others, not even for a moment
    try:
        zmq.auth.create_certificates(directory, name)
    finally:
        os.umask(before)
    path.chmod(0o644)
    return path


def make_directory(directory: Path) -> None:
    """Make a directory that only its owner can enter. Raises SettingsError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(f"the directory {directory} cannot be made: {error}") from error
    if not os.access(directory, os.W_OK):
        raise SettingsError(f"nothing can be written into {directory}")


def check_name(name: str) -> None:
    """Raises SettingsError unless `name` can be a file's name."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) is None:
        raise SettingsError(
            f"a key's name is {name!r}; expected letters, digits and _ . - (at most 64)"
        )


def read_pair(path: Path) -> KeyPair:
    """Read NAME.key_secret. Raises SettingsError."""
    if path.suffix == ".key" and path.with_suffix(".key_secret").exists():
        path = path.with_suffix(".key_secret")
    public, secret = _read(path)
    if secret is None:
        raise SettingsError(f"{path} has no secret key; give the file that ends in .key_secret")
    return KeyPair(public, secret)


def read_public(path_or_text: str) -> bytes:
    """A public key, from its file or as its 40 characters. Raises SettingsError."""
    text = path_or_text.encode()
    if is_key(text) and not Path(path_or_text).exists():
        return text
    public, _ = _read(Path(path_or_text))
    return public


def _read(path: Path) -> tuple[bytes, bytes | None]:
    path = path.expanduser()
    if path.is_dir():
        raise SettingsError(f"the key {path} cannot be read: it is a directory")
    if not path.is_file():
        raise SettingsError(f"the key {path} does not exist; `midspan keys new NAME` makes one")
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"the key {path} cannot be read: {why_unreadable(error)}") from error
    for half in (public, secret):
        if half is not None and not is_key(half):
            raise SettingsError(f"the key in {path} is not 40 characters of Z85")
    return public, secret


def is_key(text: bytes) -> bool:
    """Whether a text is 32 bytes in Z85."""
    if not KEY_TEXT.fullmatch(text):
        return False
    try:
        return len(z85.decode(text)) == 32
    except (KeyError, ValueError, struct.error):
        return False


def load_client_keys(own: Path | None, broker: str | None) -> ClientKeys | None:
    """From the options --key and --broker-key, which go together. Raises SettingsError."""
    if own is None and broker is None:
        return None
    if own is None or broker is None:
        raise SettingsError(
            "--key and --broker-key go together: yours, and the broker's public key"
        )
    return ClientKeys(read_pair(own), read_public(broker))


def authorized_directory(directory: Path, role: str) -> Path:
    """Where the public keys lie that a broker admits in a role."""
    return directory / "authorized" / f"{role}s"


def authorize(directory: Path, public: bytes, role: str, name: str) -> Path:
    """Admit a public key. Raises SettingsError if the name is taken by another key."""
    check_name(name)
    target = authorized_directory(directory, role)
    make_directory(target)
    path = target / f"{name}.key"
    if path.exists() and _read(path)[0] != public:
        raise SettingsError(f"another {role} is authorized as {name!r}; choose another --name")
    unfinished = path.with_suffix(".new")  # a broker may be reading
    unfinished.write_text(f'metadata\ncurve\n    public-key = "{public.decode()}"\n')
    unfinished.replace(path)
    return path


def revoke(directory: Path, role: str, name: str) -> None:
    """Admit a key no longer. Raises SettingsError if there is none of that name."""
    path = authorized_directory(directory, role) / f"{name}.key"
    try:
        path.unlink()
    except FileNotFoundError as error:
        known = ", ".join(list_authorized(directory, role).values()) or "none"
        raise SettingsError(f"no {role} is authorized as {name!r}; those are: {known}") from error


def list_authorized(directory: Path, role: str) -> dict[bytes, str]:
    """The admitted public keys of a role and their names; files that hold none are passed over."""
    admitted = {}
    for path in sorted(authorized_directory(directory, role).glob("*.key")):
        try:
            admitted[_read(path)[0]] = path.stem
        except SettingsError as error:
            log.warning("%s; it is passed over", error)
    return admitted


def ensure_member(directory: Path, name: str, role: str) -> ClientKeys:
    """A key on the broker's own machine, made and authorized when it is first needed."""
    path = directory / f"{name}.key"
    if not path.exists():
        create_key(directory, name)
    pair = read_pair(path)
    authorize(directory, pair.public, role, name)
    return ClientKeys(pair, read_public(str(directory / f"{BROKER}.key")))


def is_public(endpoint: str) -> bool:
    """Whether others than this machine can reach an address that is bound."""
    if endpoint.startswith("ipc://"):
        return False
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name or an interface: nobody knows where it leads
