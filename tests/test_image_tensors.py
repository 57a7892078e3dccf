"""Image tensors as bytes: the codecs of text on channels, and Lambda-Split's formulas."""

from __future__ import annotations

import pytest
import torch

from common.codecs.lambda_split import LambdaSplitCodec
from common.diffusion.tensors import (
    check_image_codec,
    decode_tensor,
    encode_tensor,
    from_blob,
    pack_tensors,
    to_blob,
    unpack_tensors,
)
from common.errors import NonFiniteError, ProtocolError, SettingsError

SHAPE = (2, 4, 6, 10)


def make_tensor() -> torch.Tensor:
    scale = torch.tensor([0.01, 1.0, 30.0, 500.0])[None, :, None, None]
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize(
    "codec",
    ["fp32", "fp16", "int8", "int4:tensor", "int4:group:8+zstd", "int3:token:affine", "bool",
     "fp8-e4m3", "int5+hadamard4", "lambda-int8", "lambda-int5", "lambda-e4m3", "lambda-e5m2"],
)  # fmt: skip
def test_a_tensor_comes_back_in_its_shape(codec: str) -> None:
    tensor = make_tensor() / (2 if codec == "lambda-e4m3" else 1)
    tensor = tensor.clamp(-400, 400)
    back = decode_tensor(encode_tensor(tensor, codec), SHAPE, codec)
    assert back.shape == SHAPE
    if codec == "fp32":
        assert torch.equal(back, tensor)


def test_a_scale_belongs_to_a_channel_or_to_the_tensor() -> None:
    tensor = make_tensor()
    quiet = tensor[:, 0]
    by_channel, by_tensor = (
        decode_tensor(encode_tensor(tensor, codec), SHAPE, codec)[:, 0]
        for codec in ("int8", "int8:tensor")
    )
    assert (by_channel - quiet).abs().max() < 0.001
    assert torch.equal(by_tensor, torch.zeros_like(quiet))


@pytest.mark.parametrize("bits", range(1, 9))
def test_lambda_splits_integers_follow_its_formulas(bits: int) -> None:
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(bits)) + 0.3
    codec = LambdaSplitCodec(f"lambda-int{bits}")
    low, high = values.min().double(), values.max().double()
    s = (2**bits - 1) / (high - low)
    z = -torch.round(low * s) - 2 ** (bits - 1)
    q = torch.round(values.double() * s + z).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    want = ((q - z) / s).float()
    back = codec.decode(codec.encode(values), 3, 50)
    assert torch.allclose(back, want, atol=1e-6)
    assert (back - values).abs().max() <= 1.01 / s


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_lambda_splits_floats_are_casts(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    codec = LambdaSplitCodec(f"lambda-{name}")
    assert torch.equal(codec.decode(codec.encode(values), 3, 50), values.to(dtype).float())


def test_lambda_splits_constant_tensor() -> None:
    codec = LambdaSplitCodec("lambda-int8")
    back = codec.decode(codec.encode(torch.full((1, 8), 3.0)), 1, 8)
    assert torch.equal(back, torch.full((1, 8), 3.0))


@pytest.mark.parametrize("name", ["lambda-int9", "lambda-", "lambda-fp4", "int8:channel", "nope"])
def test_unknown_codecs_are_named(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        check_image_codec(name)


def test_what_has_no_code_is_refused() -> None:
    bad = torch.full(SHAPE, float("nan"))
    for codec in ("fp32", "int8", "lambda-int8", "lambda-e4m3"):
        with pytest.raises(NonFiniteError):
            encode_tensor(bad, codec)
    with pytest.raises(NonFiniteError, match="cannot hold 1e"):
        encode_tensor(torch.full(SHAPE, 1e6), "lambda-e4m3")


def test_wrong_bodies_are_refused() -> None:
    names = ["fp32", "int8"]
    parts, body = pack_tensors({"sample": make_tensor()}, {"sample": "int8"}, names)
    assert unpack_tensors(parts, body, names)["sample"].shape == SHAPE
    with pytest.raises(ProtocolError, match="its tensors need"):
        unpack_tensors(parts, body[:-1], names)
    with pytest.raises(ProtocolError, match="codec beyond the 1"):
        unpack_tensors(parts, body, names[:1])
    with pytest.raises(ProtocolError, match="has shape"):
        decode_tensor(b"", [2**20, 2**20, 4, 4], "int8")
    with pytest.raises(ProtocolError, match="needs"):
        decode_tensor(b"1234", SHAPE, "lambda-int8")


def test_blobs_come_back_and_garbage_is_none() -> None:
    tensors = {"latents": make_tensor(), "history0": torch.zeros(1)}
    back = from_blob(to_blob(tensors))
    assert torch.equal(back["latents"], tensors["latents"])
    assert from_blob(b"") == {}
    assert from_blob(b"garbage that is no safetensors") == {}
