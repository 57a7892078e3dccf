"""Boundary codecs against their stated errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import CODECS, find_codec
from common.errors import NonFiniteError, ProtocolError, SettingsError

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 67))


def make_rows(shape: tuple[int, int], seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


@given(SHAPES, st.integers(0, 1000), st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 3e4]))
@settings(deadline=None)
def test_int8_is_within_half_a_step_of_each_rows_scale(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    rows = make_rows(shape, seed, scale)
    codec = find_codec("int8")
    back = codec.decode(codec.encode(rows), *shape, torch.float32)
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    # half a quantization step, and the rounding of float32 arithmetic around it
    assert ((back - rows).abs() <= step * 0.5001 + 1e-38).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_a_float_codec_is_exact_for_rows_of_its_dtype(name: str, dtype: torch.dtype) -> None:
    rows = make_rows((3, 65), 1, 10.0).to(dtype)
    codec = find_codec(name)
    assert torch.equal(codec.decode(codec.encode(rows), 3, 65, dtype), rows)


@pytest.mark.parametrize("name", CODECS)
def test_the_size_of_a_body_is_known_beforehand(name: str) -> None:
    codec = find_codec(name)
    for shape in ((1, 1), (1, 33), (7, 128)):
        assert len(codec.encode(make_rows(shape, 0, 1.0))) == shape[0] * codec.row_bytes(shape[1])


@pytest.mark.parametrize("name", CODECS)
def test_a_rows_bytes_do_not_depend_on_its_neighbours(name: str) -> None:
    rows = make_rows((9, 40), 2, 5.0)
    codec = find_codec(name)
    alone = b"".join(codec.encode(row[None]) for row in rows)
    assert codec.encode(rows) == alone


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(name: str, bad: float) -> None:
    rows = torch.zeros(2, 8)
    rows[1, 3] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        find_codec(name).encode(rows)


def test_float16_overflow_is_refused_with_the_value() -> None:
    with pytest.raises(NonFiniteError, match=r"fp16 cannot hold 1e\+05"):
        find_codec("fp16").encode(torch.full((1, 4), 1e5))


def test_nan_on_the_wire_is_refused() -> None:
    body = torch.full((1, 4), float("nan")).numpy().tobytes()
    with pytest.raises(NonFiniteError, match="fp32 body decodes to NaN"):
        find_codec("fp32").decode(body, 1, 4, torch.float32)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_body_of_the_wrong_size_is_refused(name: str, change: int) -> None:
    codec = find_codec(name)
    size = 2 * codec.row_bytes(8) + change
    with pytest.raises(ProtocolError, match=rf"body has {size} bytes; {name} \(2, 8\) needs"):
        codec.decode(b"\0" * size, 2, 8, torch.float32)


def test_an_unknown_codec_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'int9' is unknown; known are fp32, fp16, bf16, int8"):
        find_codec("int9")
