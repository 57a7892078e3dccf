"""The wire format: every message comes back whole, and whatever is wrong is refused by name."""

from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from common.errors import ProtocolError
from common.protocol.messages import (
    KINDS,
    Announce,
    AnyOpening,
    CodecNames,
    Count,
    ImageOpening,
    ImageRoute,
    Names,
    Number,
    Numbers,
    Opening,
    Part,
    Parts,
    Route,
    Sealed,
    Service,
    Services,
    SessionId,
    Shape,
    Stats,
    Step,
    StepReply,
    Text,
    Units,
)  # fmt: skip
from common.protocol.wire import check_frames, decode_header, encode_header
from common.settings import MAX_FRAMES, MAX_HEADER_BYTES

STEP = Step(b"s" * 16, 0, 0, 7, 11, [Part(0, [1], 130)], 1, 0, 60000)
NAMES = list(Step.__struct_fields__)

INTEGERS = st.integers(0, 2**53)
TEXTS = st.text(max_size=50)
VALUES = {
    Count: INTEGERS,
    Text: TEXTS,
    SessionId: st.binary(min_size=16, max_size=16),
    Sealed: st.binary(max_size=256),
    bool: st.booleans(),
    Number: INTEGERS.map(float),
    Numbers: st.lists(st.integers(0, 999).map(float), max_size=5),
    Shape: st.lists(INTEGERS, min_size=1, max_size=4),
    Units: st.lists(INTEGERS, max_size=4),
    Names: st.lists(TEXTS, max_size=3),
    Route: st.just(["2-4", "4-6"]),
    ImageRoute: st.sampled_from([["unet"], ["inner"]]),
    CodecNames: st.lists(st.text(max_size=9), min_size=1, max_size=3),
    Stats: st.dictionaries(st.text(max_size=9), INTEGERS, max_size=3),
}


def any_struct(kind: type[Any]) -> st.SearchStrategy[Any]:
    types = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: VALUES[types[name]] for name in kind.__struct_fields__})


VALUES[Parts] = st.lists(any_struct(Part), min_size=1, max_size=4)
VALUES[Services] = st.lists(any_struct(Service), max_size=3)


def any_message() -> st.SearchStrategy[Any]:
    return st.one_of([any_struct(kind) for kind in KINDS.values()])


@given(any_message())
def test_every_message_comes_back_as_it_was_sent(message: Any) -> None:
    assert decode_header(encode_header(message)) == message


@pytest.mark.parametrize(
    "opening",
    [
        ImageOpening("f" * 16, ["2-6"], ["int8"], 1, 1.0, [1.0], False, "", "float32"),
        ImageOpening("f" * 16, ["unet", "unet"], ["int8"], 1, 1.0, [1.0], False, "", "float32"),
        Opening("f" * 16, ["unet"], 8, ["int8"], ""),
        Opening("f" * 16, ["2-4"] * 65, 8, ["int8"], ""),
        Opening("f" * 16, [], 8, ["int8"], ""),
    ],
)
def test_a_route_goes_through_parts_of_its_own_kind_of_model(opening: AnyOpening) -> None:
    with pytest.raises(ProtocolError, match=f"{opening.kind} message has a bad route"):
        decode_header(encode_header(opening))


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
    st.one_of(st.none(), st.integers(-5, -1), st.just(0.5), st.lists(st.just("a"), min_size=1)),
)
def test_a_field_of_the_wrong_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match=rf"step message has a bad {name}"):
        decode_header(_with(**{name: value}))


def _with(**changes: Any) -> bytes:
    fields = msgpack.unpackb(encode_header(STEP))
    for name, value in changes.items():
        fields[NAMES.index(name) + 1 if name in NAMES else 0] = value
    return msgpack.packb(fields)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (_with(kind="step/3"), "header is of protocol 3; this midspan speaks protocol 2"),
        (msgpack.packb([1, "step", 0]), "header is of protocol 1; this midspan speaks protocol 2"),
        (_with(kind=True), r"header is a list; expected \[kind/2"),
        (_with(kind="bogus/2"), "unknown kind 'bogus'"),
        (_with(session_id=b"short"), "bad session_id: Expected `bytes` of length >= 16"),
        (_with(position=True), "bad position: Expected `int`, got `bool`"),
        (_with(position=-1), "bad position: Expected `int` >= 0"),
        (_with(parts=[[0, [], 9]]), "bad parts: Expected `array` of length >= 1"),
        (_with(parts=[[0, 1]]), "bad parts: Expected `array` of "),
        (msgpack.packb({"v": 1}), "header is a dict; expected"),
        (msgpack.packb(["step/2", b"s" * 16]), "Expected `array` of at least length 10"),
        (encode_header(STEP) + b"x", "not MessagePack"),
        (b"\x00" * (MAX_HEADER_BYTES + 1), "at most"),
        (b"\x91" * 2000, "not MessagePack"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(frame: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode_header(frame)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1e300])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    opening = ImageOpening("f" * 16, ["unet"], ["int8"], 1, 7.5, [999.0], False, "", "float32")
    for name, value in (("guidance", number), ("timesteps", [1.0, number])):
        fields = msgpack.unpackb(encode_header(opening))
        fields[ImageOpening.__struct_fields__.index(name) + 1] = value
        with pytest.raises(ProtocolError, match="open_image message"):
            decode_header(msgpack.packb(fields))


def test_a_decode_step_has_a_small_header() -> None:
    long = structs.replace(STEP, step=5000, position=5000, parts=[Part(0, [1], 4098)])
    assert len(encode_header(long)) <= 50
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
