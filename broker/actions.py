"""What a BrokerState decides and its server performs, one dataclass each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.protocol.messages import Step, StepKey


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Send the step to the worker."""

    worker_id: str
    key: StepKey
    attempt: int
    queue_us: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Pass the worker's answer on to the edge that asked."""

    edge_id: bytes
    key: StepKey


@dataclass(frozen=True, slots=True)
class PassOn:
    """Keep the worker's answer as what the next part gets, under this header."""

    step: Step


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the edge that the step will not be computed."""

    edge_id: bytes
    key: StepKey
    code: str
    reason: str
    detour: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class TellPending:
    """Tell the edge that its step is known and being worked on."""

    edge_id: bytes
    key: StepKey


@dataclass(frozen=True, slots=True)
class AskOpening:
    """Ask the edge for the opening of a session that the broker does not know."""

    edge_id: bytes
    key: StepKey


@dataclass(frozen=True, slots=True)
class AskStep:
    """Ask the edge for a step that the broker does not have."""

    edge_id: bytes
    key: StepKey


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell the worker that it need not compute the step, or not any more."""

    worker_id: str
    key: StepKey
    attempt: int
    owner: str


@dataclass(frozen=True, slots=True)
class TellBusy:
    """Tell the edge to ask again later."""

    edge_id: bytes
    key: StepKey
    retry_ms: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the frames kept for a step."""

    key: StepKey


@dataclass(frozen=True, slots=True)
class ForwardEnd:
    """Tell the worker that a session is over at these parts of its model."""

    worker_id: str
    session_id: bytes
    owner: str
    route: list[str]


@dataclass(frozen=True, slots=True)
class TellJoined:
    """Tell a worker that it is known."""

    address: bytes


@dataclass(frozen=True, slots=True)
class TellNotJoined:
    """Tell a worker why its announcement is not taken."""

    address: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class AcceptDrain:
    """Tell the worker that nothing new will come."""

    address: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """Write a line to the log."""

    text: str
    is_warning: bool = False


Action = (
    Dispatched
    | Answer
    | PassOn
    | Refuse
    | TellPending
    | AskOpening
    | AskStep
    | Cancel
    | TellBusy
    | Forget
    | ForwardEnd
    | TellJoined
    | TellNotJoined
    | AcceptDrain
    | Note
)
