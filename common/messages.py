"""The messages of the protocol, one dataclass each. `common/wire.py` puts them on the wire.

    edge -> broker    Step or ImageStep (with its opening if need be), EndSession, StatusQuery
    edge -> broker    AskAgain, for a step that was sent
    broker -> edge    StepReply, NeedRows, NeedTensors, NeedOpening, NeedStep, StepPending,
                      StepRefused, Busy, StatusReport
    broker -> worker  Dispatch (in front of a step and its opening), CancelStep, EndSession,
                      Joined, NotJoined, DrainAccepted
    worker -> broker  Announce, Alive, Drain, Leave, StepReply, NeedRows, NeedTensors, StepFailed,
                      StepDropped

A peer is known by its connection (and its CURVE key, where keys are used), never by what it says
of itself: a message that names another worker, or another edge's session, is refused.

All are idempotent: whoever did not hear an answer asks again. `session_id` is 16 random bytes
drawn by the edge. Within one `generation` of a session its boundary rows are append-only, so the
KV cache at a position is the same whoever computes it; a cut back begins a new generation, whose
`fork` says how many rows it shares with the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

Sealed = bytes  # opaque to the broker; see common/sealing.py


@dataclass(frozen=True, slots=True)
class Opening:
    """What stays the same in a session. Sent with its first step, and again when asked for.

    It names no session, so sessions that are set up alike have the same bytes.
    """

    kind: ClassVar[str] = "open"
    model: str  # fingerprint
    part: str  # of the model: for text the middle layers, a-b
    hidden: int  # D
    codecs: list[str]  # steps name them by their index
    calibration: str  # fingerprint, or empty if no codec needs one
    sealed_key: Sealed = b""  # of the session's KV at rest, for the workers only
    precision: str = ""  # of the workers that began the session; empty until one has answered


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a step's body that were encoded together."""

    codec: int  # index into the opening's codecs
    rows: int
    body_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """Compute boundary rows of a session from row `position` on; one body frame."""

    kind: ClassVar[str] = "step"
    session_id: bytes
    generation: int
    fork: int  # rows below this are the same as in generation - 1
    step: int  # rises with every request of a session
    position: int  # index of the first row in the body
    parts: list[Part]  # one after another in the body
    reply_rows: int  # how many of the last rows to answer with; 0 for rows that are replayed
    reply_codec: int  # index into the opening's codecs
    deadline_ms: int  # time left to the whole step when it was sent
    shun: str = ""  # a worker whose answer could not be used: rather not that one

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def end(self) -> int:
        return self.position + self.rows

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


StepKey = tuple[bytes, int, int]  # session_id, generation, step


@dataclass(frozen=True, slots=True)
class ImageOpening:
    """What stays the same while an image is made. `part` of the model is `unet` or `inner`."""

    kind: ClassVar[str] = "open_image"
    model: str  # fingerprint of the UNet
    part: str
    codecs: list[str]  # steps name them by their index
    images: int  # B, made at once
    guidance: float  # scale; at most 1 is none, and the batch is not doubled
    timesteps: list[float]
    keeps_latents: bool  # the worker steps latents of its own (part unet only)
    scheduler: str  # name and digest, where the worker needs one
    latents_dtype: str  # in which the edge steps them
    sealed_key: Sealed = b""  # of what the session leaves in the store, for the workers only
    precision: str = ""  # of the workers that began the session; empty until one has answered


@dataclass(frozen=True, slots=True)
class TensorPart:
    """One encoded tensor of an image step's body."""

    name: str  # sample, latents, history0, prompt_embeds, text_embeds or time_ids
    codec: int  # index into the opening's codecs
    shape: list[int]
    body_bytes: int


@dataclass(frozen=True, slots=True)
class ImageStep:
    """Compute one denoising step of an image session; one body frame with its tensors."""

    kind: ClassVar[str] = "image"
    session_id: bytes
    generation: int
    step: int  # rises with every request of a session
    position: int  # index into the opening's timesteps
    tensors: list[TensorPart]  # one after another in the body
    reply_codec: int  # index into the opening's codecs
    deadline_ms: int  # time left to the whole step when it was sent
    shun: str = ""  # a worker whose answer could not be used: rather not that one

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


AnyStep = Step | ImageStep
AnyOpening = Opening | ImageOpening


@dataclass(frozen=True, slots=True)
class StepReply:
    """The last `rows` rows of a step, computed; one body frame (none when rows is 0)."""

    kind: ClassVar[str] = "reply"
    session_id: bytes
    generation: int
    step: int
    attempt: int
    rows: int
    committed: int  # rows of this session known to be in the store
    worker_id: str
    queue_us: int  # waited in the broker and in the worker
    compute_us: int  # in the middle layers, with decoding and encoding
    precision: str = ""  # the worker's, as long as the session's is not known

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class NeedRows:
    """The worker has KV up to `have` only: send the rows from there on."""

    kind: ClassVar[str] = "need_rows"
    session_id: bytes
    generation: int
    step: int
    attempt: int
    have: int
    worker_id: str
    precision: str = ""  # as in StepReply

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class NeedTensors:
    """The worker lacks these tensors of an image session: send the step again with them."""

    kind: ClassVar[str] = "need_tensors"
    session_id: bytes
    generation: int
    step: int
    attempt: int
    names: list[str]
    worker_id: str
    precision: str = ""  # as in StepReply

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The worker could not compute the step; another one may."""

    kind: ClassVar[str] = "failed"
    session_id: bytes
    generation: int
    step: int
    attempt: int
    worker_id: str
    reason: str

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class StepDropped:
    """The worker does not compute the step, because it was cancelled or a newer one came."""

    kind: ClassVar[str] = "dropped"
    session_id: bytes
    generation: int
    step: int
    attempt: int
    worker_id: str

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class CancelStep:
    """Nobody waits for this step any more, or another worker has it; confirmed by StepDropped."""

    kind: ClassVar[str] = "cancel"
    session_id: bytes
    generation: int
    step: int
    attempt: int
    owner: str  # as in Dispatch

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class AskAgain:
    """The edge still waits for a step that it has sent: StepPending, or NeedStep, answers it."""

    kind: ClassVar[str] = "again"
    session_id: bytes
    generation: int
    step: int

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


@dataclass(frozen=True, slots=True)
class NeedStep:
    """The broker does not have the step: send it."""

    kind: ClassVar[str] = "need_step"
    session_id: bytes
    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class StepPending:
    """The broker has the step, queued or in flight: wait, no need to look for another broker."""

    kind: ClassVar[str] = "pending"
    session_id: bytes
    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class StepRefused:
    """The step will not be computed. `code` is no_worker, failed, deadline or invalid."""

    kind: ClassVar[str] = "refused"
    session_id: bytes
    generation: int
    step: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class NeedOpening:
    """The broker does not know the session: send the step again with its opening."""

    kind: ClassVar[str] = "need_open"
    session_id: bytes
    generation: int
    step: int


@dataclass(frozen=True, slots=True)
class Busy:
    """The broker's queue is full: ask again in `retry_ms`."""

    kind: ClassVar[str] = "busy"
    session_id: bytes
    generation: int
    step: int
    retry_ms: int


@dataclass(frozen=True, slots=True)
class EndSession:
    """The session is over: whoever holds something of it may forget it."""

    kind: ClassVar[str] = "end"
    session_id: bytes
    owner: str = ""  # filled in by the broker; what an edge says here is not believed


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """Asks for a StatusReport."""

    kind: ClassVar[str] = "status?"


@dataclass(frozen=True, slots=True)
class StatusReport:
    """Workers, queues and counters: one body frame, a MessagePack map (broker/report.py)."""

    kind: ClassVar[str] = "status"


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Goes in front of a Step on its way to a worker. `attempt` comes back with the answer."""

    kind: ClassVar[str] = "dispatch"
    attempt: int
    queue_us: int
    owner: str  # the edge's public key, or empty where keys are not used
    edge: int = 0  # a number for it, so that a worker can take edges in turn
    precision: str = ""  # in which the session was begun, once a worker has answered


@dataclass(frozen=True, slots=True)
class Service:
    """What a worker can compute: one part of one model."""

    model: str  # fingerprint
    name: str  # for people
    part: str  # a span a-b of layers; unet or inner of an image model
    hidden: int  # D; 0 for images
    precision: str = ""  # in which its weights and their state are: sessions stay in theirs


@dataclass(frozen=True, slots=True)
class Announce:
    """Everything about a worker, said again and again: a broker that has just started knows all.

    It comes over the connection that takes the worker's steps, and makes it the way to reach it.
    """

    kind: ClassVar[str] = "announce"
    worker_id: str
    services: list[Service]
    capacity: int  # steps that may be in flight at once
    heartbeat_ms: int
    ready: bool = True
    pid: int = 0
    host: str = ""
    stats: dict[str, Any] = field(default_factory=dict)
    pulse: bytes = bytes(16)  # random: heartbeats prove by it whose they are


@dataclass(frozen=True, slots=True)
class Alive:
    """A heartbeat from a thread of its own: the worker may be busy, but it is not dead."""

    kind: ClassVar[str] = "alive"
    worker_id: str
    pulse: bytes  # as in Announce


@dataclass(frozen=True, slots=True)
class Joined:
    """The broker has taken a worker's announcement: steps may come."""

    kind: ClassVar[str] = "joined"


@dataclass(frozen=True, slots=True)
class NotJoined:
    """The broker does not take a worker's announcement. `is_final`: it never will."""

    kind: ClassVar[str] = "not_joined"
    reason: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class Drain:
    """Send me nothing new; I finish what I have."""

    kind: ClassVar[str] = "drain"
    worker_id: str


@dataclass(frozen=True, slots=True)
class DrainAccepted:
    """Nothing was dispatched to the worker after this."""

    kind: ClassVar[str] = "drain_accepted"


@dataclass(frozen=True, slots=True)
class Leave:
    """The worker is gone from now on."""

    kind: ClassVar[str] = "leave"
    worker_id: str


Message = (
    Opening | Step | ImageOpening | ImageStep | StepReply | NeedRows | NeedTensors | NeedOpening
    | NeedStep | StepFailed | StepDropped | CancelStep | AskAgain | StepPending | StepRefused | Busy
    | EndSession | StatusQuery | StatusReport | Dispatch | Announce | Alive | Joined | NotJoined
    | Drain | DrainAccepted | Leave
)  # fmt: skip
