"""Boundary codecs against their stated errors, and against bad values and bad bodies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.codecs.bits import pack_bits, packed_bytes, unpack_bits
from common.codecs.calibration import (
    Calibration,
    fit_calibration,
    load_calibration,
    save_calibration,
)
from common.codecs.codec import Codec, make_codec
from common.codecs.quantize import decode_float, encode_float, largest_float
from common.codecs.spec import CodecSpec, parse_codec
from common.errors import CheckpointError, NonFiniteError, ProtocolError, SettingsError

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 67))
SCALES = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 3e4, 1e30])
CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNCALIBRATED = [
    *CASTS, "int8", "int8:token:affine", "int6", "int5:group:16:affine", "int4:tensor:affine",
    "int3:channel", "int2:group:7", "int4:token:affine+hadamard64", "int5+hadamard16+zstd",
    "bool", "bool:channel", "fp8-e4m3", "fp8-e5m2", "fp3.2", "fp2.1:tensor", "fp1.0", "fp5.0",
    "int5/2@0.25", "int8/4@.5:affine+zstd", "fp32+zstd", "int1:token:affine",
]  # fmt: skip
CALIBRATED = ["compact", "smallest", "int4:token:affine+norm", "fisher0.002+zstd",
              "int5/2@0.3+norm+hadamard64+predict"]  # fmt: skip
D = 48


def make_rows(shape: tuple[int, int], seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Rows with outlier channels, a mean, and a downlink that resembles the uplink."""
    channel = torch.ones(D)
    channel[5] = 30
    up = make_rows((600, D), 1) * channel + 3
    down = up * 1.1 + make_rows((600, D), 2) * 0.3 + up[:, :1] * 0.2
    fitted = fit_calibration("m" * 16, (2, 6), up, down, make_rows((600, D), 3),
                             make_rows((600, D), 4))  # fmt: skip
    return dataclasses.replace(fitted, fingerprint="c" * 16)


def round_trip(
    codec: Codec, rows: torch.Tensor, uplink: torch.Tensor | None = None
) -> torch.Tensor:
    body = codec.encode(rows, uplink)
    codec.check_body(len(body), *rows.shape)
    return codec.decode(body, *rows.shape, torch.float32, uplink)


# --- bits


@given(st.integers(1, 8), SHAPES, st.integers(0, 99))
@settings(deadline=None)
def test_packed_codes_come_back_and_take_no_more_bits_than_they_must(
    bits: int, shape: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.shape == (shape[0], packed_bytes(shape[1], bits))
    assert packed_bytes(8 * 5, bits) == 5 * bits
    assert torch.equal(unpack_bits(packed, shape[1], bits), codes)


def test_packing_is_as_documented() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    want = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    assert pack_bits(codes, 3).numpy().tobytes() == want.to_bytes(3, "little")


# --- what is lost


def scale_groups(rows: torch.Tensor, spec: CodecSpec) -> torch.Tensor:
    """For every value the values that share its scale: (T, D, values of one scale)."""
    count, width = rows.shape
    if spec.granularity == "tensor":
        return rows.flatten().expand(count, width, -1)
    if spec.granularity == "channel":
        return rows.T.expand(count, width, count)
    if spec.granularity == "group":
        index = torch.arange(width) // spec.group * spec.group
        columns = (index[:, None] + torch.arange(spec.group)).clamp_max(width - 1)
        return rows[:, columns]
    return rows[:, None, :].expand(count, width, width)


@given(
    SHAPES, st.integers(0, 1000), SCALES, st.integers(2, 8), st.booleans(),
    st.sampled_from(["token", "tensor", "channel", "group:5", "group:16"]),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_int_is_within_half_a_step(
    shape: tuple[int, int], seed: int, scale: float, bits: int, affine: bool, granularity: str
) -> None:
    rows = make_rows(shape, seed, scale)
    codec = make_codec(f"int{bits}:{granularity}:{'affine' if affine else 'sym'}", "up")
    groups = scale_groups(rows, codec.spec)
    if affine:
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        step = torch.maximum((high - low) / (2**bits - 2), groups.abs().amax(dim=2) / 30000)
    else:
        step = groups.abs().amax(dim=2) / (2 ** (bits - 1) - 1)
    # half a step, up to 1/128 larger as bfloat16, and float32 rounding of values and products
    allowed = step * (1 + 2**-7) * 0.5001 + groups.abs().amax(dim=2) * 1e-6 + 1e-36
    assert ((round_trip(codec, rows) - rows).abs() <= allowed).all()


@given(SHAPES, st.integers(0, 1000), SCALES)
@settings(deadline=None)
def test_bool_keeps_the_sign_and_the_mean_size(
    shape: tuple[int, int], seed: int, scale: float
) -> None:
    rows = make_rows(shape, seed, scale)
    back = round_trip(make_codec("bool", "up"), rows)
    size = rows.abs().mean(dim=1, keepdim=True).expand_as(rows)
    # the scale travels as bfloat16, rounded to the nearest
    torch.testing.assert_close(back.abs(), size, rtol=2**-8, atol=1e-37)
    assert ((rows >= 0) == (back >= 0)).all()


@given(
    SHAPES, st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e4]),
    st.sampled_from([(4, 3), (5, 2), (3, 4), (2, 3), (3, 2), (2, 1), (4, 0), (1, 4)]),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_a_small_float_is_within_half_a_unit_of_its_last_place(
    shape: tuple[int, int], seed: int, scale: float, size: tuple[int, int]
) -> None:
    exponent, mantissa = size
    rows = make_rows(shape, seed, scale)
    back = round_trip(make_codec(f"fp{exponent}.{mantissa}", "up"), rows)
    top = rows.abs().amax(dim=1, keepdim=True) * (1 + 2**-7)
    smallest_normal = top / largest_float(exponent, mantissa) * 2.0 ** (2 - 2 ** (exponent - 1))
    allowed = torch.maximum(rows.abs(), smallest_normal) * 2.0 ** -(mantissa + 1)
    # float32 rounding; a scale that was rounded up may leave the top value one place lower
    assert ((back - rows).abs() <= allowed * 1.0001 + 1e-30).all()


@pytest.mark.parametrize("size", [(3, 4), (2, 1), (4, 0), (1, 6), (5, 1)])
def test_every_code_of_a_small_float_is_its_own_number(size: tuple[int, int]) -> None:
    codes = torch.arange(2 ** (1 + sum(size)), dtype=torch.int32).to(torch.uint8)
    values = decode_float(codes, *size)
    assert torch.equal(encode_float(values, *size), codes)
    assert len(values.unique()) == len(codes) - 1  # 0 and -0


@pytest.mark.parametrize(("name", "dtype"), CASTS.items())
def test_a_cast_is_exact_for_rows_of_its_dtype(name: str, dtype: torch.dtype) -> None:
    rows = make_rows((3, 65), 1, 10.0).to(dtype)
    codec = make_codec(name, "up")
    assert torch.equal(codec.decode(codec.encode(rows), 3, 65, dtype), rows)


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_codecs_absorb_outlier_channels_and_use_the_uplink(
    name: str, calibration: Calibration
) -> None:
    channel = torch.ones(D)
    channel[5] = 30
    up = make_rows((64, D), 7) * channel + 3
    down = up * 1.1 + make_rows((64, D), 8) * 0.3 + up[:, :1] * 0.2
    quiet = torch.arange(D) != 5
    up_codec = make_codec(name, "up", calibration)
    up_back = round_trip(up_codec, up)
    down_back = round_trip(make_codec(name, "down", calibration), down, up_back)
    # a plain 4-bit token code loses the quiet channels beside the loud one
    plain = round_trip(make_codec("int4", "up"), up)
    assert (up_back - up)[:, quiet].std() < 0.6 * (plain - up)[:, quiet].std()
    assert (down_back - down)[:, quiet].std() < 0.6 * (plain - up)[:, quiet].std()


def test_prediction_makes_the_error_smaller(calibration: Calibration) -> None:
    up = make_rows((64, D), 7) + 3
    down = up * 1.1 + make_rows((64, D), 8) * 0.3 + up[:, :1] * 0.2
    errors = [
        (round_trip(make_codec(name, "down", calibration), down, up) - down).std()
        for name in ("int4+norm+predict", "int4+norm")
    ]
    assert errors[0] < 0.6 * errors[1]


def test_two_widths_keep_the_large_rows_better() -> None:
    rows = make_rows((8, 64), 3)
    rows[::4] *= 10
    back = round_trip(make_codec("int6/2@0.25", "up"), rows)
    error = (back - rows).abs().amax(dim=1) / rows.abs().amax(dim=1)
    assert (error[::4] < 0.02).all()
    assert (error[1::4] > 0.1).all()


# --- what must hold for all


@pytest.mark.parametrize("name", UNCALIBRATED + CALIBRATED)
@pytest.mark.parametrize("shape", [(1, D), (5, D), (0, D)])
def test_every_codec_takes_zeros_constants_and_nothing_at_all(
    name: str, shape: tuple[int, int], calibration: Calibration
) -> None:
    codec = make_codec(name, "down", calibration)
    for value in (0.0, 1.0, -7.5):
        rows = torch.full(shape, value)
        back = round_trip(codec, rows, rows.clone())
        assert back.shape == rows.shape
        assert torch.isfinite(back).all()
        if value == 0 and name not in CALIBRATED:
            assert (back.abs() <= 1e-37).all()


@pytest.mark.parametrize("name", UNCALIBRATED + CALIBRATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_codec_takes_every_dtype(
    name: str, dtype: torch.dtype, calibration: Calibration
) -> None:
    rows = make_rows((5, D), 1).to(dtype)
    codec = make_codec(name, "down", calibration)
    back = codec.decode(codec.encode(rows, rows), 5, D, dtype, rows)
    assert back.dtype == dtype


@pytest.mark.parametrize(
    "name",
    [n for n in UNCALIBRATED + CALIBRATED if not any(w in n for w in ("tensor", "channel", "/"))],
)
def test_a_rows_values_do_not_depend_on_its_neighbours(name: str, calibration: Calibration) -> None:
    rows = make_rows((9, D), 2, 5.0)
    codec = make_codec(name, "up", calibration)
    together = round_trip(codec, rows)
    alone = torch.cat([round_trip(codec, row[None]) for row in rows])
    # float32 matrix products of another number of rows may differ in the last bits
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", UNCALIBRATED + CALIBRATED)
@pytest.mark.parametrize("columns", [D, D - 3])
def test_rows_of_many_sessions_have_the_bodies_that_each_has_alone(
    name: str, columns: int, calibration: Calibration
) -> None:
    if columns != D and name in CALIBRATED:
        pytest.skip("a calibration is of one width")
    torch.manual_seed(3)
    largest = 2.0 if name in CALIBRATED else 1e4
    rows = torch.randn(7, columns) * torch.tensor([1, 5, 0.01, 3, largest, 0, 1])[:, None]
    uplinks = torch.randn(7, columns)
    for direction in ("up", "down"):
        codec = make_codec(name, direction, calibration)
        pairs = zip(torch.split(rows, 1), torch.split(uplinks, 1), strict=True)
        alone = [codec.encode(row, up) for row, up in pairs]
        assert codec.encode_each(rows, uplinks) == alone
        if not codec.needs_uplink:
            want = torch.cat([codec.decode(body, 1, columns) for body in alone])
            assert torch.equal(codec.decode_each(alone, columns), want)


@pytest.mark.parametrize("name", UNCALIBRATED + CALIBRATED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(name: str, bad: float, calibration: Calibration) -> None:
    rows = torch.zeros(2, D)
    rows[1, 3] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        make_codec(name, "up", calibration).encode(rows)


def test_float16_overflow_is_refused_with_the_value() -> None:
    with pytest.raises(NonFiniteError, match=r"fp16 cannot hold 1e\+05"):
        make_codec("fp16", "up").encode(torch.full((1, 4), 1e5))


def test_what_is_too_far_from_the_calibrated_mean_is_refused(calibration: Calibration) -> None:
    with pytest.raises(NonFiniteError, match="quantization steps away"):
        make_codec("smallest", "up", calibration).encode(torch.full((1, D), 1e8))


@pytest.mark.parametrize("name", ["int1", "int4:tensor", "fp3.2", "int2:token:affine"])
def test_a_scale_beyond_bfloat16_is_refused_by_the_sender(name: str) -> None:
    with pytest.raises(NonFiniteError, match="cannot hold"):
        make_codec(name, "up").encode(torch.tensor([[3.4e38, -3.4e38, 3.4e38, 3.4e38]]))


def test_a_group_larger_than_a_row_is_the_row() -> None:
    rows = make_rows((3, 10), 1)
    assert torch.equal(
        round_trip(make_codec("int5:group:999999", "up"), rows),
        round_trip(make_codec("int5:token", "up"), rows),
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("up.mean", torch.zeros(1), "up.mean has shape"),
        ("up.deviation", torch.full((D,), float("nan")), "finite"),
        ("down.scale", torch.zeros(D), "not positive"),
    ],
)
def test_a_calibration_that_cannot_be_computed_with_is_refused(
    name: str, value: torch.Tensor, words: str, calibration: Calibration, tmp_path: Path
) -> None:
    save_calibration(calibration, tmp_path)
    tensors = load_file(tmp_path / "calibration.safetensors") | {name: value}
    save_file(tensors, tmp_path / "calibration.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_calibration(tmp_path)


def test_nan_on_the_wire_is_refused() -> None:
    body = torch.full((1, 4), float("nan")).numpy().tobytes()
    with pytest.raises(NonFiniteError, match="fp32 body decodes to NaN"):
        make_codec("fp32", "up").decode(body, 1, 4, torch.float32)


@pytest.mark.parametrize("name", [n for n in UNCALIBRATED if "zstd" not in n])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_body_of_the_wrong_size_is_refused(name: str, change: int) -> None:
    codec = make_codec(name, "up")
    body = codec.encode(make_rows((2, 8), 0))
    wrong = body + b"\0" if change > 0 else body[:-1]
    with pytest.raises(ProtocolError, match=rf"body has {len(wrong)} bytes; "):
        codec.check_body(len(wrong), 2, 8)
    with pytest.raises(ProtocolError, match=rf"body has {len(wrong)} bytes; "):
        codec.decode(wrong, 2, 8, torch.float32)


@given(st.sampled_from(UNCALIBRATED + CALIBRATED), st.binary(max_size=400), st.integers(0, 9))
@settings(deadline=None, max_examples=400)
def test_a_corrupt_body_is_an_error_or_finite_rows(name: str, body: bytes, rows: int) -> None:
    calibration = fit_calibration(
        "m", (0, 1), make_rows((99, D), 1), make_rows((99, D), 2), make_rows((99, D), 3),
        make_rows((99, D), 4),
    )  # fmt: skip
    codec = make_codec(name, "down", calibration)
    try:
        back = codec.decode(body, rows, D, torch.float32, torch.zeros(rows, D))
    except (ProtocolError, NonFiniteError):
        return
    assert back.shape == (rows, D)
    assert torch.isfinite(back).all()


def test_a_zstd_body_that_lies_about_its_size_allocates_nothing() -> None:
    import zstandard

    bomb = b"\x01" + zstandard.ZstdCompressor().compress(bytes(50_000_000))
    codec = make_codec("fp32+zstd", "up")
    with pytest.raises(ProtocolError, match="holds more than 32 bytes"):
        codec.decode(bomb, 1, 8, torch.float32)


# --- names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int9", "'int9' is unknown; known are fp32, fp16, bf16, int8, compact, smallest"),
        ("", "is unknown"),
        ("nosuch", "auto for a session, and topK for the way down with --span A:"),
        ("auto", "here a codec itself is expected"),
        ("int8:row", "'row' is not known; expected token, tensor, channel"),
        ("int8:group", "group needs a size"),
        ("int8:group:\u00b2", "group needs a size"),
        ("int8:group:1" + "0" * 30, "group needs a size"),
        ("int8+hadamard1" + "0" * 9, "a power of two"),
        ("fisher" + "1" * 5000, "5006 characters; at most 120"),
        ("int8+hadamard3", "a power of two"),
        ("int8+magic", "option 'magic' is not known"),
        ("fp6.5", "is unknown"),
        ("fisher0.1+norm", "takes .predict and .zstd only"),
        ("int2/5@0.5", "the first width must be the larger one"),
        ("int5/2@0.5:tensor", "two widths go with token granularity"),
        ("fp16+norm", "takes .zstd only"),
    ],
)
def test_a_name_that_is_not_understood_says_why(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_codec(name)


def test_the_example_of_the_grammar_is_parsed() -> None:
    spec = parse_codec("int4:token:affine+hadamard64+predict")
    assert (spec.bits, spec.granularity, spec.affine) == (4, "token", True)
    assert (spec.hadamard, spec.predict, spec.norm) == (64, True, False)


def test_int8_is_per_token_and_symmetric() -> None:
    spec = parse_codec("int8")
    assert (spec.bits, spec.granularity, spec.affine) == (8, "token", False)


# --- calibration


def test_a_calibrated_codec_without_calibration_says_how_to_get_one() -> None:
    with pytest.raises(SettingsError, match="midspan calibrate"):
        make_codec("compact", "up")


def test_a_calibration_is_saved_and_loaded(calibration: Calibration, tmp_path: Path) -> None:
    fingerprint = save_calibration(calibration, tmp_path)
    loaded = load_calibration(tmp_path)
    assert loaded.fingerprint == fingerprint
    assert torch.equal(loaded.residual.fisher, calibration.residual.fisher)
    assert torch.equal(loaded.predictor.expand, calibration.predictor.expand)


@pytest.mark.parametrize("harm", ["delete", "garbage", "other"])
def test_a_broken_calibration_is_refused(
    harm: str, calibration: Calibration, tmp_path: Path
) -> None:
    save_calibration(calibration, tmp_path)
    file = tmp_path / "calibration.safetensors"
    if harm == "delete":
        file.unlink()
    elif harm == "garbage":
        file.write_bytes(b"garbage")
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_calibration(tmp_path)


def test_a_name_is_read_once_however_often_it_comes() -> None:
    """Workers ask again for each step of a session."""
    assert parse_codec("int5:group:24:affine") is parse_codec("int5:group:24:affine")


def test_a_bad_name_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(SettingsError, match="'int9'"):
            parse_codec("int9")
