"""Put messages on the wire and take them off again: a MessagePack header frame, then raw bodies.

The header is an array: version, kind, then the message's fields in the order of its dataclass. (An
array rather than a map: a decode step of a small model would be half field names.) Everything is
checked before it is used: frame counts, sizes, kinds, types and ranges. Whatever
is wrong raises ProtocolError, which names it. No pickle, no code, nothing is allocated by size
fields that a peer sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from common.errors import ProtocolError
from common.messages import (
    Alive,
    Announce,
    AskAgain,
    Busy,
    CancelStep,
    Dispatch,
    Drain,
    DrainAccepted,
    EndSession,
    ImageOpening,
    ImageStep,
    Joined,
    Leave,
    Message,
    NeedOpening,
    NeedRows,
    NeedStep,
    NeedTensors,
    NotJoined,
    Opening,
    Part,
    Service,
    StatusQuery,
    StatusReport,
    Step,
    StepDropped,
    StepFailed,
    StepPending,
    StepRefused,
    StepReply,
    TensorPart,
)
from common.settings import MAX_BODY_BYTES, MAX_FRAMES, MAX_HEADER_BYTES

VERSION = 1
MAX_INTEGER = 2**53
MAX_TEXT = 4096
SESSION_ID_BYTES = 16
MAX_PARTS = 512
MAX_SEALED = 256
MAX_STATS = 64
MAX_TENSORS = 16
MAX_TIMESTEPS = 1000

KINDS: dict[str, type[Message]] = {
    message.kind: message
    for message in (
        Opening, Step, ImageOpening, ImageStep, StepReply, NeedRows, NeedTensors, NeedOpening,
        StepFailed, StepDropped, CancelStep, AskAgain, NeedStep, StepPending, StepRefused,
        Busy, EndSession, StatusQuery, StatusReport, Dispatch, Announce, Alive, Joined,
        NotJoined, Drain, DrainAccepted, Leave,
    )
}  # fmt: skip


def encode_header(message: Message) -> bytes:
    """The header frame of a message."""
    values = [getattr(message, name) for name, _ in FIELDS[message.kind]]
    if isinstance(message, Step):
        values[PARTS_AT] = [(part.codec, part.rows, part.body_bytes) for part in message.parts]
    elif isinstance(message, ImageStep):
        values[TENSORS_AT] = [(t.name, t.codec, t.shape, t.body_bytes) for t in message.tensors]
    elif isinstance(message, Announce):
        values[SERVICES_AT] = [
            (s.model, s.name, s.part, s.hidden, s.precision) for s in message.services
        ]
    packed: bytes = msgpack.packb((VERSION, message.kind, *values))
    return packed


def decode_header(frame: bytes) -> Message:
    """Read a header frame. Raises ProtocolError."""
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header has {len(frame)} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        fields = msgpack.unpackb(frame, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"header is not MessagePack: {type(error).__name__} {error}") from error
    if not isinstance(fields, list) or len(fields) < 2:
        raise ProtocolError(f"header is a {type(fields).__name__}; expected [version, kind, …]")
    version, kind, *values = fields
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"header has version {version!r:.40}; this midspan speaks {VERSION}")
    checks = FIELDS.get(kind) if isinstance(kind, str) else None
    if checks is None:
        raise ProtocolError(f"header has unknown kind {kind!r:.40}")
    if len(values) != len(checks):
        raise ProtocolError(f"{kind} message has {len(values)} fields; expected {len(checks)}")
    name = ""
    try:
        for index, (name, check) in enumerate(checks):  # noqa: B007 the name is for the error
            values[index] = check(values[index])
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{kind} message has a bad {name}: {error}") from error
    return KINDS[kind](*values)


def check_frames(frames: Sequence[bytes]) -> None:
    """Refuse messages with too many frames or frames that are too large. Raises ProtocolError."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"message has {len(frames)} frames; expected 1 to {MAX_FRAMES}")
    for index, frame in enumerate(frames[1:], start=1):
        if len(frame) > MAX_BODY_BYTES:
            raise ProtocolError(f"frame {index} has {len(frame)} bytes; limit {MAX_BODY_BYTES}")


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise ValueError(f"expected an integer from 0 to 2**53, got {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"expected a text of at most {MAX_TEXT} characters, got {value!r:.40}")
    return value


def _session_id(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) != SESSION_ID_BYTES:
        raise ValueError(f"expected {SESSION_ID_BYTES} bytes, got {value!r:.40}")
    return value


def _sealed(value: Any) -> bytes:
    if not isinstance(value, bytes) or len(value) > MAX_SEALED:
        raise ValueError(f"expected at most {MAX_SEALED} bytes, got {value!r:.40}")
    return value


def _services(value: Any) -> list[Service]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError("expected a list of at most 64 services")
    services = []
    for item in value:
        if not isinstance(item, list) or len(item) != 5:
            raise ValueError(f"expected [model, name, part, hidden, precision], got {item!r:.40}")
        model, name, part = _text(item[0]), _text(item[1]), _text(item[2])
        services.append(Service(model, name, part, _integer(item[3]), _text(item[4])))
    return services


def _parts(value: Any) -> list[Part]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise ValueError(f"expected 1 to {MAX_PARTS} parts")
    parts = []
    for item in value:
        if not isinstance(item, list) or len(item) != 3:
            raise ValueError(f"expected [codec, rows, bytes], got {item!r:.40}")
        parts.append(Part(_integer(item[0]), _integer(item[1]), _integer(item[2])))
    return parts


def _tensors(value: Any) -> list[TensorPart]:
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        raise ValueError(f"expected a list of at most {MAX_TENSORS} tensors")
    tensors = []
    for item in value:
        if not isinstance(item, list) or len(item) != 4:
            raise ValueError(f"expected [name, codec, shape, bytes], got {item!r:.40}")
        shape = item[2]
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
            raise ValueError(f"expected a shape of 1 to 4 numbers, got {shape!r:.40}")
        sizes = [_integer(size) for size in shape]
        tensors.append(TensorPart(_text(item[0]), _integer(item[1]), sizes, _integer(item[3])))
    return tensors


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value)


def _floats(value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) > MAX_TIMESTEPS:
        raise ValueError(f"expected at most {MAX_TIMESTEPS} numbers")
    return [_float(item) for item in value]


def _codec_names(value: Any) -> list[str]:
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ValueError("expected a list of 1 to 8 codec names")
    return [_text(item) for item in value]


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_STATS:
        raise ValueError(f"expected a map of at most {MAX_STATS} entries, got {value!r:.40}")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, int | float | str):
            raise ValueError(f"expected names and plain values, got {key!r:.40}: {item!r:.40}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r:.40}")
    return value


CHECKS: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "str": _text,
    "bytes": _session_id,
    "Sealed": _sealed,
    "bool": _bool,
    "float": _float,
    "list[float]": _floats,
    "list[TensorPart]": _tensors,
    "list[Service]": _services,
    "list[Part]": _parts,
    "list[str]": _codec_names,
    "dict[str, Any]": _map,
}

# kind -> (field, check) in order, from the dataclasses' own annotations
FIELDS: dict[str, list[tuple[str, Callable[[Any], Any]]]] = {
    kind: [(field.name, CHECKS[str(field.type)]) for field in dataclasses.fields(message)]
    for kind, message in KINDS.items()
}
PARTS_AT = [name for name, _ in FIELDS[Step.kind]].index("parts")
TENSORS_AT = [name for name, _ in FIELDS[ImageStep.kind]].index("tensors")
SERVICES_AT = [name for name, _ in FIELDS[Announce.kind]].index("services")
