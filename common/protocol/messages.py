"""The messages of the protocol, one struct each. `common/protocol/wire.py` puts them on the wire.

    edge -> broker    Step (with its session's opening if need be), EndSession, StatusQuery
    edge -> broker    AskAgain, for a step that was sent
    broker -> edge    StepReply, Need, NeedOpening, NeedStep, StepPending, StepRefused, Busy,
                      StatusReport
    broker -> worker  Dispatch (in front of a step and its opening), CancelStep, EndSession,
                      Joined, NotJoined, DrainAccepted
    worker -> broker  Announce, Alive, Drain, Leave, StepReply, Need, StepFailed, StepDropped

A step passes the parts of a model that its session's `route` names, one after another: what the
worker of one answers, the broker hands to a worker of the next. Only the last answer goes to the
edge, and whatever a worker lacks: the edge then sends it again, from the first part on.

A peer is known by its connection (and its CURVE key, where keys are used), never by what it says
of itself: a message that names another worker, or another edge's session, is refused.

All are idempotent: whoever did not hear an answer asks again. `session_id` is 16 random bytes
drawn by the edge. Within one `generation` of a session its boundary rows are append-only, so the
KV cache at a position is the same whoever computes it; a cut back begins a new generation, whose
`fork` says how many rows it shares with the one before.
"""

import math
from typing import Annotated, get_args

from msgspec import Meta, Struct
from msgspec import field as struct_field

PROTOCOL = 2  # each kind's name on the wire ends with it, so no other version is ever read wrongly

StepKey = tuple[bytes, int, int]  # session_id, generation, step
BOUNDARY = ""  # names what crosses the cut itself: a text's rows, an image's sample
PROMPT = "prompt"  # rows of a text's prompt, where workers compute those otherwise

Count = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=4096)]
SessionId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Pulse = Annotated[bytes, Meta(min_length=16, max_length=16)]
Sealed = Annotated[bytes, Meta(max_length=256)]  # opaque to the broker; see security/sealing
Number = Annotated[float, Meta(ge=-(2**53), le=2**53)]
MAX_TIMESTEPS = 1000
Numbers = Annotated[list[Number], Meta(max_length=MAX_TIMESTEPS)]
CodecNames = Annotated[list[Text], Meta(min_length=1, max_length=8)]
Shape = Annotated[list[Count], Meta(min_length=1, max_length=4)]
MAX_HOPS = 64
SpanName = Annotated[str, Meta(pattern=r"^\d{1,6}-\d{1,6}e?$")]
Route = Annotated[list[SpanName], Meta(min_length=1, max_length=MAX_HOPS)]
UnetPart = Annotated[str, Meta(pattern=r"^(unet|inner)$")]
ImageRoute = Annotated[list[UnetPart], Meta(min_length=1, max_length=1)]
Names = Annotated[list[Text], Meta(max_length=MAX_HOPS)]
Stats = Annotated[dict[Text, bool | int | float | str], Meta(max_length=64)]


class Item(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What messages have lists of."""


class WireMessage(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A header: an array of the kind's name with the protocol's number, then the fields."""

    @property
    def kind(self) -> str:
        """Its name, without the number."""
        return str(self.__struct_config__.tag).partition("/")[0]


class Opening(WireMessage, frozen=True, tag=f"open/{PROTOCOL}"):
    """What stays the same in a session. Sent with its first step, and again when asked for.

    It names no session, so sessions that are set up alike have the same bytes.
    """

    model: Text  # fingerprint
    route: Route  # parts of the model in a row: spans a-b of its middle layers
    hidden: Count  # D
    codecs: CodecNames  # steps name them by their index
    calibration: Text  # fingerprint, or empty if no codec needs one
    sealed_key: Sealed = b""  # of the session's KV at rest, for the workers only
    precision: Text = ""  # of the workers that began the session; empty until one has answered
    between: Count = 0  # codec of rows on their way from one part of the route to the next
    exact: bool = False  # no bit depends on what is computed beside what was encoded together


class Part(Item, frozen=True):
    """Values of a step's body that were encoded together."""

    codec: Count  # index into the opening's codecs
    shape: Shape  # of a tensor; of a text's rows only how many, each of the opening's `hidden`
    body_bytes: Count
    # else prompt; or latents, history0, prompt_embeds, text_embeds or time_ids
    name: Text = BOUNDARY


MOST_PARTS = 512
Parts = Annotated[list[Part], Meta(max_length=MOST_PARTS)]
Units = Annotated[list[Count], Meta(max_length=MOST_PARTS)]


class Step(WireMessage, frozen=True, tag=f"step/{PROTOCOL}"):
    """Compute what a session has at its boundary from `position` on; one body frame.

    For text that is rows of a sequence, for images the denoising step of that index.
    """

    session_id: SessionId
    generation: Count
    fork: Count  # rows below this are the same as in generation - 1
    step: Count  # rises with every request of a session
    position: Count  # of the first row in the body; of images, index into the timesteps
    parts: Parts  # one after another in the body
    reply_rows: Count  # of text: how many of the last rows to answer with; 0 for a replay
    reply_codec: Count  # index into the opening's codecs
    deadline_ms: Count  # time left to the whole step when it was sent
    shun: Text = ""  # a worker whose answer could not be used: rather not that one
    tentative: Count = 0  # how many of its last rows may be taken back: those below never change

    @property
    def final(self) -> int:
        """Rows below this never change in this generation."""
        return max(0, self.end - self.tentative)

    @property
    def rows(self) -> int:
        """Of text."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def end(self) -> int:
        return self.position + self.rows

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


class ImageOpening(WireMessage, frozen=True, tag=f"open_image/{PROTOCOL}"):
    """What stays the same while an image is made. Its route is one part, `unet` or `inner`."""

    model: Text  # fingerprint of the UNet
    route: ImageRoute
    codecs: CodecNames  # steps name them by their index
    images: Count  # B, made at once
    guidance: Number  # scale; at most 1 is none, and the batch is not doubled
    timesteps: Numbers
    keeps_latents: bool  # the worker steps latents of its own (part unet only)
    scheduler: Text  # name and digest, where the worker needs one
    latents_dtype: Text  # in which the edge steps them
    sealed_key: Sealed = b""  # of what the session leaves in the store, for the workers only
    precision: Text = ""  # of the workers that began the session; empty until one has answered

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.guidance, *self.timesteps))):
            raise ValueError("guidance and timesteps must be finite")


AnyOpening = Opening | ImageOpening


class OfStep(WireMessage, frozen=True):
    """What names a step."""

    session_id: SessionId
    generation: Count
    step: Count

    @property
    def key(self) -> StepKey:
        return (self.session_id, self.generation, self.step)


class StepReply(OfStep, frozen=True, tag=f"reply/{PROTOCOL}"):
    """A step, computed: the last `rows` rows of text, or a tensor, in one body frame.

    From a part of the route that is not the last come all rows, for the next.
    """

    attempt: Count
    rows: Count
    committed: Count  # rows of this session known to be in the store
    worker_id: Text
    queue_us: Count  # waited in the broker and in the workers of all parts
    compute_us: Count  # in the middle layers, with decoding and encoding
    precision: Text = ""  # the worker's, as long as the session's is not known


class Need(OfStep, frozen=True, tag=f"need/{PROTOCOL}"):
    """A worker lacks something of the session: send it, with the step or before it.

    That is the rows from `have` on, or if there are `names`, the tensors that these stand for.
    """

    attempt: Count
    have: Count
    names: Names
    worker_id: Text
    precision: Text = ""  # as in StepReply


class StepFailed(OfStep, frozen=True, tag=f"failed/{PROTOCOL}"):
    """The worker could not compute the step; another one may."""

    attempt: Count
    worker_id: Text
    reason: Text


class StepDropped(OfStep, frozen=True, tag=f"dropped/{PROTOCOL}"):
    """The worker does not compute the step, because it was cancelled or a newer one came."""

    attempt: Count
    worker_id: Text


class CancelStep(OfStep, frozen=True, tag=f"cancel/{PROTOCOL}"):
    """Nobody waits for this step any more, or another worker has it; confirmed by StepDropped."""

    attempt: Count
    owner: Text  # as in Dispatch


class AskAgain(OfStep, frozen=True, tag=f"again/{PROTOCOL}"):
    """The edge still waits for a step that it has sent: StepPending, or NeedStep, answers it."""


class NeedStep(OfStep, frozen=True, tag=f"need_step/{PROTOCOL}"):
    """The broker does not have the step: send it."""


class StepPending(OfStep, frozen=True, tag=f"pending/{PROTOCOL}"):
    """The broker has the step, queued or in flight: wait, no need to look for another broker."""


class StepRefused(OfStep, frozen=True, tag=f"refused/{PROTOCOL}"):
    """The step will not be computed. `code` is no_worker, failed, deadline, invalid or stale.

    Steps that go on from one that is refused are refused as well, each by itself. Those that go on
    from one for which a worker has a Need are stale, as any is that a newer one has overtaken.

    When nobody serves a part of the session's route, others may be served that make up the same
    layers: that is the `detour`, which a session of another id may take.
    """

    code: Text
    reason: Text
    detour: Names = struct_field(default_factory=list)


class NeedOpening(OfStep, frozen=True, tag=f"need_open/{PROTOCOL}"):
    """The broker does not know the session: send the step again with its opening."""


class Busy(OfStep, frozen=True, tag=f"busy/{PROTOCOL}"):
    """The broker's queue is full: ask again in `retry_ms`."""

    retry_ms: Count


class EndSession(WireMessage, frozen=True, tag=f"end/{PROTOCOL}"):
    """The session is over: whoever holds something of it may forget it."""

    session_id: SessionId
    owner: Text = ""  # filled in by the broker, as `route`; an edge is not believed
    route: Names = struct_field(default_factory=list)


class StatusQuery(WireMessage, frozen=True, tag=f"status?/{PROTOCOL}"):
    """Asks for a StatusReport."""


class StatusReport(WireMessage, frozen=True, tag=f"status/{PROTOCOL}"):
    """Workers, queues and counters: one body frame, a MessagePack map (broker/report.py)."""


class Dispatch(WireMessage, frozen=True, tag=f"dispatch/{PROTOCOL}"):
    """Goes in front of a Step on its way to a worker. `attempt` comes back with the answer."""

    attempt: Count
    queue_us: Count  # waited until now, and in the workers of earlier parts
    owner: Text  # the edge's public key, or empty where keys are not used
    edge: Count = 0  # a number for it, so that a worker can take edges in turn
    precision: Text = ""  # in which the session was begun, once a worker has answered
    compute_us: Count = 0  # that the workers of earlier parts took
    hop: Count = 0  # index into the opening's route: whose turn it is
    # rows of each part that the edge sent, for an exact session's later parts of the route: what
    # comes from the part before is one part
    units: Units = struct_field(default_factory=list)


class Service(Item, frozen=True):
    """What a worker can compute: one part of one model."""

    model: Text  # fingerprint
    name: Text  # for people
    part: Text  # a span a-b of layers; unet or inner of an image model
    hidden: Count  # D; 0 for images
    precision: Text = ""  # in which its weights and their state are: sessions stay in theirs


Services = Annotated[list[Service], Meta(max_length=64)]


class Announce(WireMessage, frozen=True, tag=f"announce/{PROTOCOL}"):
    """Everything about a worker, said again and again: a broker that has just started knows all.

    It comes over the connection that takes the worker's steps, and makes it the way to reach it.
    """

    worker_id: Text
    services: Services
    capacity: Count  # steps that may be in flight at once
    heartbeat_ms: Count
    ready: bool = True
    pid: Count = 0
    host: Text = ""
    stats: Stats = struct_field(default_factory=dict)
    pulse: Pulse = bytes(16)  # random: heartbeats prove by it whose they are


class Alive(WireMessage, frozen=True, tag=f"alive/{PROTOCOL}"):
    """A heartbeat from a thread of its own: the worker may be busy, but it is not dead."""

    worker_id: Text
    pulse: Pulse  # as in Announce


class Joined(WireMessage, frozen=True, tag=f"joined/{PROTOCOL}"):
    """The broker has taken a worker's announcement: steps may come."""


class NotJoined(WireMessage, frozen=True, tag=f"not_joined/{PROTOCOL}"):
    """The broker does not take a worker's announcement, or an edge at the workers' address.

    `is_final`: it never will.
    """

    reason: Text
    is_final: bool


class OtherProtocol(WireMessage, frozen=True, tag=f"other_protocol/{PROTOCOL}"):
    """What came was of another protocol than this; `reason` names both."""

    reason: Text


class Drain(WireMessage, frozen=True, tag=f"drain/{PROTOCOL}"):
    """Send me nothing new; I finish what I have."""

    worker_id: Text


class DrainAccepted(WireMessage, frozen=True, tag=f"drain_accepted/{PROTOCOL}"):
    """Nothing was dispatched to the worker after this."""


class Leave(WireMessage, frozen=True, tag=f"leave/{PROTOCOL}"):
    """The worker is gone from now on."""

    worker_id: Text


Message = (
    Opening | Step | ImageOpening | StepReply | Need | NeedOpening | NeedStep | StepFailed
    | StepDropped | CancelStep | AskAgain | StepPending | StepRefused | Busy
    | EndSession | StatusQuery | StatusReport | Dispatch | Announce | Alive | Joined | NotJoined
    | OtherProtocol | Drain | DrainAccepted | Leave
)  # fmt: skip

KINDS: dict[str, type[Message]] = {
    str(message.__struct_config__.tag).partition("/")[0]: message for message in get_args(Message)
}
