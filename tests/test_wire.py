"""The wire format: every message comes back whole, and whatever is wrong is refused by name."""

import dataclasses
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ProtocolError
from common.messages import Announce, Part, Service, Step, StepReply, TensorPart
from common.settings import MAX_FRAMES, MAX_HEADER_BYTES
from common.wire import KINDS, VERSION, check_frames, decode_header, encode_header

STEP = Step(b"s" * 16, 0, 0, 7, 11, [Part(0, 1, 130)], 1, 0, 60000)
NAMES = [field.name for field in dataclasses.fields(Step)]

INTEGERS = st.integers(0, 2**53)
VALUES = {
    "int": INTEGERS,
    "str": st.text(max_size=50),
    "bytes": st.binary(min_size=16, max_size=16),
    "Sealed": st.binary(max_size=256),
    "bool": st.booleans(),
    "float": st.integers(0, 2**53).map(float),
    "list[float]": st.lists(st.integers(0, 999).map(float), max_size=5),
    "list[TensorPart]": st.lists(
        st.builds(
            TensorPart,
            st.text(max_size=9),
            INTEGERS,
            st.lists(INTEGERS, min_size=1, max_size=4),
            INTEGERS,
        ),
        max_size=3,
    ),
    "list[Service]": st.lists(
        st.builds(Service, st.text(max_size=9), st.text(max_size=9), st.text(max_size=9), INTEGERS),
        max_size=3,
    ),
    "list[Part]": st.lists(st.builds(Part, INTEGERS, INTEGERS, INTEGERS), min_size=1, max_size=4),
    "list[str]": st.lists(st.text(max_size=9), min_size=1, max_size=3),
    "dict[str, Any]": st.dictionaries(st.text(max_size=9), INTEGERS, max_size=3),
}


def any_message() -> st.SearchStrategy[Any]:
    return st.one_of(
        [
            st.builds(kind, **{f.name: VALUES[str(f.type)] for f in dataclasses.fields(kind)})
            for kind in KINDS.values()
        ]
    )


@given(any_message())
def test_every_message_comes_back_as_it_was_sent(message: Any) -> None:
    assert decode_header(encode_header(message)) == message


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_and_nothing_else(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(garbage)


@given(st.data())
def test_a_truncated_header_is_refused(data: st.DataObject) -> None:
    header = encode_header(STEP)
    with pytest.raises(ProtocolError):
        decode_header(header[: data.draw(st.integers(0, len(header) - 1))])


@given(
    st.sampled_from(NAMES),
    st.one_of(st.none(), st.integers(-5, -1), st.floats(), st.lists(st.integers(0, 9), max_size=3)),
)
def test_a_field_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"step message has a bad {name}"):
        decode_header(_with(**{name: value}))


def _with(**changes: Any) -> bytes:
    fields = msgpack.unpackb(encode_header(STEP))
    for name, value in changes.items():
        fields[{"v": 0, "k": 1}.get(name, NAMES.index(name) + 2 if name in NAMES else 0)] = value
    return msgpack.packb(fields)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (_with(v=VERSION + 1), f"version {VERSION + 1}; this midspan speaks {VERSION}"),
        (_with(v=True), "version True"),
        (_with(k="bogus"), "unknown kind 'bogus'"),
        (_with(session_id=b"short"), "bad session_id: expected 16 bytes"),
        (_with(position=True), "bad position"),
        (_with(parts=[]), "bad parts: expected 1 to 512 parts"),
        (_with(parts=[[0, 1]]), r"bad parts: expected \[codec, rows, bytes\]"),
        (msgpack.packb({"v": 1}), "header is a dict; expected"),
        (msgpack.packb([VERSION, "step", 1]), "step message has 1 fields; expected 10"),
        (b"\x00" * (MAX_HEADER_BYTES + 1), "at most"),
        (b"\x91" * 2000, "not MessagePack"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(frame: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode_header(frame)


def test_a_decode_step_has_a_small_header() -> None:
    long = dataclasses.replace(STEP, step=5000, position=5000, parts=[Part(0, 1, 4098)])
    assert len(encode_header(long)) <= 48
    reply = StepReply(b"s" * 16, 0, 5000, 1, 1, 5000, "w-12345678", 3000, 90_000)
    assert len(encode_header(reply)) <= 60


def test_too_many_frames_are_refused() -> None:
    with pytest.raises(ProtocolError, match=f"{MAX_FRAMES + 1} frames"):
        check_frames([b""] * (MAX_FRAMES + 1))


def test_a_message_with_no_frames_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0 frames"):
        check_frames([])


def test_reply_and_announce_survive_with_nested_values() -> None:
    announce = Announce("w1", [Service("f" * 16, "m", "2-6", 8)], 8, 100, True, 1, "h", {"a": 1})
    reply = StepReply(b"s" * 16, 0, 7, 1, 1, 12, "w1", 30, 900)
    assert [decode_header(encode_header(m)) for m in (announce, reply)] == [announce, reply]
