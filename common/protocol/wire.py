"""Put messages on the wire and take them off again: a MessagePack header frame, then raw bodies.

The header is an array: the message's kind with the protocol's number, then its fields in order. (An
array rather than a map: a decode step of a small model would be half field names.) msgspec checks
types and bounds as `common/protocol/messages.py` states them, while it decodes. Whatever is wrong
raises ProtocolError, which names it. No pickle, no code, nothing is allocated by size fields that
a peer sent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from common.errors import ProtocolError
from common.protocol.messages import KINDS, PROTOCOL, Message, OtherProtocol
from common.settings import MAX_BODY_BYTES, MAX_FRAMES, MAX_HEADER_BYTES

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_anything = msgspec.msgpack.Decoder()


def encode_header(message: Message) -> bytes:
    """The header frame of a message."""
    return _encoder.encode(message)


def decode_header(frame: bytes) -> Message:
    """Read a header frame. Raises ProtocolError."""
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header has {len(frame)} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(_say_what_is_wrong(frame, error)) from error


def read_protocol(frame: bytes) -> int | None:
    """Which protocol a header is of; None if it is no header of any."""
    try:
        fields = _anything.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    return _protocol_of(fields)


def is_of_other_protocol(frame: bytes) -> bool:
    """Whether this is a header that another midspan has written."""
    return read_protocol(frame) not in (None, PROTOCOL)


def refuse_protocol(frame: bytes) -> bytes | None:
    """The answer to a header of another protocol, in the words of whoever sent it if we know them.

    None if it is of ours, or no header at all. Later protocols will know ours by its number.
    """
    protocol = read_protocol(frame)
    if protocol is None or protocol == PROTOCOL:
        return None
    reason = (
        f"this header is of protocol {protocol} and the broker speaks protocol {PROTOCOL}; "
        "install the same midspan on both sides"
    )
    fields = _anything.decode(frame)
    step_at = {"step": 5, "image": 4}.get(fields[1]) if protocol == 1 else None
    if step_at is not None and len(fields) > step_at:
        refusal = [1, "refused", fields[2], fields[3], fields[step_at], "invalid", reason]
        return msgspec.msgpack.encode(refusal)
    return encode_header(OtherProtocol(reason))


def _protocol_of(fields: Any) -> int | None:
    if not isinstance(fields, list) or not fields:
        return None
    if type(fields[0]) is int:  # the first protocol had its number in front
        is_header = 0 < fields[0] < PROTOCOL and len(fields) > 1 and isinstance(fields[1], str)
        return fields[0] if is_header else None
    named = re.fullmatch(r"\w+\?*/(\d{1,6})", fields[0]) if isinstance(fields[0], str) else None
    return int(named[1]) if named else None


def _say_what_is_wrong(frame: bytes, error: Exception) -> str:
    try:
        fields = _anything.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
        return f"header is not MessagePack: {type(error).__name__} {error}"
    protocol = _protocol_of(fields)
    if protocol is None:
        return f"header is a {type(fields).__name__}; expected [kind/{PROTOCOL}, …]"
    if protocol != PROTOCOL:
        return f"header is of protocol {protocol}; this midspan speaks protocol {PROTOCOL}"
    kind = fields[0].partition("/")[0]
    message = KINDS.get(kind)
    if message is None:
        return f"header has unknown kind {kind!r:.40}"
    at = re.search(r" - at `\$\[(\d+)\]", str(error))
    names = message.__struct_fields__
    if at is None or int(at[1]) > len(names):
        return f"{kind} message is wrong: {error}"
    words = str(error).partition(" - at ")[0]
    return f"{kind} message has a bad {names[int(at[1]) - 1]}: {words}"


def check_frames(frames: Sequence[bytes]) -> None:
    """Refuse messages with too many frames or frames that are too large. Raises ProtocolError."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ProtocolError(f"message has {len(frames)} frames; expected 1 to {MAX_FRAMES}")
    for index, frame in enumerate(frames[1:], start=1):
        if len(frame) > MAX_BODY_BYTES:
            raise ProtocolError(f"frame {index} has {len(frame)} bytes; limit {MAX_BODY_BYTES}")
