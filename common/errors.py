"""Every error midspan raises on purpose: a class for each thing that a caller can do about it."""

from __future__ import annotations

from collections.abc import Sequence

MAX_REASON = 300  # characters
UNREADABLE: dict[type[Exception], str] = {
    FileNotFoundError: "there is no such file",
    IsADirectoryError: "it is a directory",
    NotADirectoryError: "its path leads through a file",
    PermissionError: "this user may not read it",
}


def in_one_line(error: BaseException) -> str:
    """What another library's error says, on one line of bounded length; its class if nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= MAX_REASON else words[:MAX_REASON] + " …"


def why_unreadable(error: Exception) -> str:
    """Why a file that somebody named could not be read, in their words: "it is a directory"."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is no text in UTF-8, byte {error.start} is 0x{byte:02x}"
    for kind, words in UNREADABLE.items():
        if isinstance(error, kind):
            return words
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return in_one_line(error)


class MidspanError(Exception):
    """The base class. The message is one line: what was wrong, what was expected, what to do."""


class SettingsError(MidspanError):
    """The user asked for something impossible: tell them, and stop."""


class CheckpointError(MidspanError):
    """A model directory is missing, broken or of a kind that cannot be cut: stop."""


class ProtocolError(MidspanError):
    """A message breaks the wire format: drop it and count it; the peer may be fine tomorrow."""


class NonFiniteError(MidspanError):
    """A boundary tensor holds NaN, an infinity or a value the codec cannot hold: fail the step."""


class StoreUnavailable(MidspanError):
    """Redis did not answer in time or refused to write: go on without it, try again later."""


class BrokerUnavailable(MidspanError):
    """No broker of the list answered within the time allowed: stop."""


class NoWorker(MidspanError):
    """No worker serves the model and span asked for. The message says what is being served.

    `detour` are other parts, one after another, that are served and compute the same.
    """

    def __init__(self, message: str, detour: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.detour = list(detour)


class StepRefused(MidspanError):
    """The pool gave a step up for good (three workers failed, or its deadline passed): stop."""


class StepOvertaken(StepRefused):
    """A broker heard of a later step of the session first: ask again for what lacks an answer."""


class TooManySessions(MidspanError):
    """An engine makes and keeps waiting all the answers that it may: try again later."""


class EngineClosed(MidspanError):
    """The engine was closed while, or before, it made an answer: stop."""


class ProcessFailed(MidspanError):
    """A process that midspan started ended before it was ready. The message has its last words."""
