"""The grammar of codec names: what a user types, parsed into what a codec does.

    NAME   = fp32 | fp16 | bf16 | int8 | compact | smallest | SPEC
    SPEC   = FORMAT [: GRANULARITY] [: sym | affine] {+ OPTION}
    FORMAT = intN (N 1 to 8) | intN/M@F | bool | fp8-e4m3 | fp8-e5m2 | fpE.M
           | fp32 | fp16 | bf16 | fisherS | topK
    GRANULARITY = token | tensor | channel | group:G
    OPTION = norm | hadamardB | predict | zstd

For example `int4:token:affine+hadamard64+predict`. `intN/M@F` gives the fraction F of the rows
that would lose most N bits and the others M. `fisherS` quantizes in the calibrated Fisher metric,
with a step that is expected to cost S nats per token, and entropy-codes the result:
`fisher0.01+predict`. Of `smallest` that is the step only where a calibration has none of its own,
searched for a loss of 1%. norm, predict and fisher need a calibration. `topK` is for logits, which
workers send that hold the LM head: the K largest as they are, nothing of the others.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from common.errors import SettingsError

DEFAULT_CODEC = "int8"
EXACT = "fp32"
SMALLEST = "smallest"
AUTO = "auto"  # no codec: one is chosen by the link
PROMISED_LOSS = 0.01  # of perplexity, by `smallest`

SHORT_NAMES = {
    "int8": "int8:token:sym",
    "bool": "int1:token:sym",
    "compact": "int5:token:sym+norm+hadamard64+predict",
    SMALLEST: "fisher0.01+predict",
    "fp8-e4m3": "fp4.3",
    "fp8-e5m2": "fp5.2",
}
PLAIN_FORMATS = ("fp32", "fp16", "bf16")
MAX_NAME = 120
GRANULARITIES = ("token", "tensor", "channel", "group")


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """A codec in full. `kind` is cast, float, int, fisher or top."""

    name: str  # as typed
    kind: str
    bits: int = 0  # of an int
    low_bits: int = 0  # of the rows that matter less, 0 if there are none
    high_fraction: float = 1.0
    exponent: int = 0  # of a float
    mantissa: int = 0
    granularity: str = "token"
    group: int = 0
    affine: bool = False
    budget: float = 0.0  # of fisher, in nats per token
    is_searched: bool = False  # the calibration's budget counts, if it has one
    count: int = 0  # of top, values of a row
    norm: bool = False
    hadamard: int = 0  # block size, 0 for none
    predict: bool = False
    zstd: bool = False

    @property
    def needs_calibration(self) -> bool:
        return self.norm or self.predict or self.kind == "fisher"

    @property
    def multiplies(self) -> bool:
        """Whether rows go through a product of matrices; their number may move its last bits."""
        return bool(self.hadamard) or self.predict or self.kind == "fisher"


@functools.lru_cache(maxsize=256)  # workers ask again for each token; peers choose the names
def parse_codec(name: str) -> CodecSpec:
    """Read a codec's name. Raises SettingsError, which says what was not understood."""
    if len(name) > MAX_NAME:
        raise SettingsError(f"codec {name[:20]!r}… has {len(name)} characters; at most {MAX_NAME}")
    text = SHORT_NAMES.get(name, name)
    body, *options = text.split("+")
    head, *rest = body.split(":")
    values = _parse_format(name, SHORT_NAMES.get(head, head).split(":")[0])
    values["is_searched"] = name == SMALLEST
    if head in SHORT_NAMES and not rest:
        rest = SHORT_NAMES[head].split("+")[0].split(":")[1:]
    while rest:
        word = rest.pop(0)
        if word in ("sym", "affine"):
            values["affine"] = word == "affine"
        elif word == "group":
            if not rest or not re.fullmatch(r"[1-9][0-9]{0,5}", rest[0]):
                raise SettingsError(f"codec {name!r}: group needs a size, as in group:64")
            values |= {"granularity": "group", "group": int(rest.pop(0))}
        elif word in GRANULARITIES:
            values["granularity"] = word
        else:
            raise SettingsError(
                f"codec {name!r}: {word!r} is not known; expected token, tensor, channel, "
                "group:G, sym or affine"
            )
    for option in options:
        values |= _parse_option(name, option)
    spec = CodecSpec(name=name, **values)  # type: ignore[arg-type]
    _check(spec)
    return spec


def _parse_format(name: str, text: str) -> dict[str, object]:
    if text in PLAIN_FORMATS:
        return {"kind": "cast", "exponent": PLAIN_FORMATS.index(text)}
    match = re.fullmatch(r"int([1-8])(?:/([1-8])@(0?\.[0-9]{1,6}))?", text)
    if match:
        values: dict[str, object] = {"kind": "int", "bits": int(match[1])}
        if match[2]:
            values |= {"low_bits": int(match[2]), "high_fraction": float(match[3])}
        return values
    match = re.fullmatch(r"top([1-9][0-9]{0,4})", text)
    if match:
        return {"kind": "top", "count": int(match[1])}
    match = re.fullmatch(r"fp([1-8])\.([0-9])", text)
    if match and int(match[1]) + int(match[2]) <= 7:
        return {"kind": "float", "exponent": int(match[1]), "mantissa": int(match[2])}
    match = re.fullmatch(r"fisher([0-9]{0,6}\.?[0-9]{1,9})", text)
    if match and float(match[1]) > 0:
        return {"kind": "fisher", "budget": float(match[1])}
    if name == AUTO:
        raise SettingsError("codec 'auto' chooses one by the link; here a codec itself is expected")
    raise SettingsError(
        f"codec {name!r} is unknown; known are fp32, fp16, bf16, int8, compact, smallest, bool, "
        "fp8-e4m3, fp8-e5m2, what the grammar allows, as intN:token:affine+hadamard64 with N from "
        "1 to 8 (docs/codecs.md), auto for a session, and topK for the way down with --span A:"
    )


def _parse_option(name: str, option: str) -> dict[str, object]:
    if option in ("norm", "predict", "zstd"):
        return {option: True}
    match = re.fullmatch(r"hadamard([0-9]{1,4})", option)
    if match and int(match[1]) >= 2 and int(match[1]).bit_count() == 1:
        return {"hadamard": int(match[1])}
    raise SettingsError(
        f"codec {name!r}: option {option!r} is not known; expected norm, hadamardB with B a power "
        "of two, predict or zstd"
    )


def _check(spec: CodecSpec) -> None:
    if spec.kind == "fisher" and (spec.norm or spec.hadamard):
        raise SettingsError(f"codec {spec.name!r}: fisher takes +predict and +zstd only")
    if spec.kind in ("cast", "top") and (spec.needs_calibration or spec.hadamard):
        raise SettingsError(f"codec {spec.name!r}: {spec.name.split('+')[0]} takes +zstd only")
    if spec.low_bits and spec.granularity != "token":
        raise SettingsError(f"codec {spec.name!r}: two widths go with token granularity")
    if spec.low_bits >= spec.bits > 0:
        raise SettingsError(f"codec {spec.name!r}: the first width must be the larger one")
