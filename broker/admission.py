"""Who may connect: a ZAP handler that admits the authorized keys and nobody else."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from common.console.log_limit import LogLimit
from common.protocol.sockets import Context
from common.security.keys import BROKER, ROLES, authorized_directory, list_authorized, read_pair

log = logging.getLogger("midspan.broker")


class Admission:
    """The broker's keys, and a thread that checks those of its peers.

    A key's file is looked for whenever someone connects, so that `midspan keys authorize` holds at
    once; so does `midspan keys revoke`, for the broker asks what has `changed`.

    Raises SettingsError without keys.
    """

    def __init__(self, context: Context, directory: Path) -> None:
        self.refused: Counter[str] = Counter()
        self._directory = directory
        self._complaints = LogLimit(log)
        self._changed_at: list[int] = []
        self._pair = read_pair(directory / f"{BROKER}.key_secret")
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        for role in ROLES:
            self._authenticator.configure_curve_callback(
                domain=role, credentials_provider=_Provider(self, role)
            )

    def guard(self, socket: zmq.Socket[bytes], role: str) -> None:
        """Make a socket admit only keys of one role; before it binds."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._pair.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._pair.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, role.encode())

    def admits(self, role: str, public: bytes) -> bool:
        if public in list_authorized(self._directory, role):
            return True
        self.refused[role] += 1
        self._complaints.warning(
            "refused the %s with key %s: it is not in %s",
            role, public.decode(errors="replace"), authorized_directory(self._directory, role),
        )  # fmt: skip
        return False

    def changed(self) -> dict[str, frozenset[bytes]] | None:
        """The keys that are admitted in each role, if that may have changed since the last call."""
        times = [_changed_at(authorized_directory(self._directory, role)) for role in ROLES]
        if times == self._changed_at:
            return None
        self._changed_at = times
        return {role: frozenset(list_authorized(self._directory, role)) for role in ROLES}

    def stop(self) -> None:
        self._authenticator.stop()


def _changed_at(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        return 0


class _Provider:
    """What pyzmq's authenticator asks."""

    def __init__(self, admission: Admission, role: str) -> None:
        self._admission = admission
        self._role = role

    def callback(self, domain: str, public: bytes) -> bool:
        return self._admission.admits(self._role, public)
