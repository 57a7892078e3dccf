"""Parts of a model in words: `b 0-5 30-35 e`.

`b` is what comes before the first layer, `a-b` are layers (half-open, as spans are everywhere), `e`
is what comes after the last, `f`, alone, is all of it. Words stand in the model's own order, and
none says what another has said: a list of files to fetch had better not be guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass

from common.errors import SettingsError
from common.spans.cut import Cut, Span

BEGIN, END, FULL = "b", "e", "f"
BEGIN_FILE, END_FILE = "begin", "end"
WORDS = "expected b, e, layers as a-b, or f alone"


@dataclass(frozen=True, slots=True)
class Parts:
    """Whether a model's beginning and end, and which layers: spans that are apart, ascending."""

    begins: bool
    layers: tuple[Span, ...]
    ends: bool

    def __str__(self) -> str:
        words = [BEGIN] * self.begins + [str(span) for span in self.layers] + [END] * self.ends
        return " ".join(words) or "nothing"

    def file_names(self) -> list[str]:
        """What the files of these parts are called, without a suffix."""
        layers = [name_layer(i) for span in self.layers for i in range(span.first, span.last)]
        return [BEGIN_FILE] * self.begins + layers + [END_FILE] * self.ends

    def are_whole(self, num_layers: int) -> bool:
        return self == full(num_layers)

    def around(self, num_layers: int) -> Span | None:
        """The layers between those at both ends, which others compute for a device with these.

        None where that is all of them, or none.
        """
        first = self.layers[0].last if self.layers and self.layers[0].first == 0 else 0
        behind = self.layers[-1] if self.layers else None
        last = behind.first if behind is not None and behind.last == num_layers else num_layers
        if not 0 < last - first < num_layers:
            return None
        return Span(first, last, with_end=not self.ends and last == num_layers)

    def only_span(self, num_layers: int) -> Span | None:
        """The layers of a worker with these; None where that is all of them, or no one span."""
        if len(self.layers) != 1 or len(self.layers[0]) == num_layers:
            return None
        span = self.layers[0]
        return Span(span.first, span.last, with_end=self.ends and not self.begins)


def full(num_layers: int) -> Parts:
    """All of a model."""
    return Parts(True, (Span(0, num_layers),), True)


def ends_of(cut: Cut, num_layers: int) -> Parts:
    """What a device has of a model that is cut there."""
    spans = (cut.head(), cut.tail(num_layers))
    return Parts(True, tuple(span for span in spans if len(span)), cut.has_tail)


def middle_of(cut: Cut) -> Parts:
    """What a worker has of it."""
    return Parts(False, (Span(cut.begin, cut.end),), not cut.has_tail)


def name_layer(index: int) -> str:
    """What a layer's file is called: mid.00007."""
    return f"mid.{index:05d}"


def name_span(span: Span | None) -> str | None:
    """As a user writes it."""
    return None if span is None else str(span)


def parts_of_files(names: Set[str], num_layers: int) -> Parts:
    """The parts whose files are there."""
    held = [index for index in range(num_layers) if name_layer(index) in names]
    return Parts(BEGIN_FILE in names, tuple(_join(held)), END_FILE in names)


def _join(layers: Iterable[int]) -> list[Span]:
    """Ascending layers as the fewest spans."""
    spans: list[Span] = []
    for index in layers:
        if spans and spans[-1].last == index:
            spans[-1] = Span(spans[-1].first, index + 1)
        else:
            spans.append(Span(index, index + 1))
    return spans


def read_parts(text: str, num_layers: int) -> Parts:
    """The parts that words name, of a model of so many layers. Raises SettingsError."""
    words = text.split()
    if not words:
        raise SettingsError(f"parts {text!r} name nothing; {WORDS}")
    if words == [FULL]:
        return full(num_layers)
    begins, ends = words[0] == BEGIN, words[-1] == END
    spans = words[begins : len(words) - ends]
    layers: list[int] = []
    for word in spans:
        layers += _read_layers(word, text, num_layers, after=layers[-1] if layers else -1)
    return Parts(begins, tuple(_join(layers)), ends)


def _read_layers(word: str, text: str, num_layers: int, after: int) -> range:
    """The layers of one word. Raises SettingsError, with the word."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", word, re.ASCII)
    if match is None:
        raise SettingsError(f"parts {text!r}: {_refuse(word)}")
    span = Span(int(match[1]), int(match[2]))
    if not span.first < span.last <= num_layers:
        raise SettingsError(
            f"parts {text!r}: {word!r} is out of range; the model has {num_layers} layers, so "
            f"expected a-b with 0 <= a < b <= {num_layers}"
        )
    if span.first <= after:
        raise SettingsError(
            f"parts {text!r}: {word!r} begins before layer {after + 1}, where the word before it "
            "ends; expected layers once each, in ascending order"
        )
    return range(span.first, span.last)


def _refuse(word: str) -> str:
    places = {
        BEGIN: "'b' comes once, before all others",
        END: "'e' comes once, after all others",
        FULL: "'f' is the whole model and stands alone",
    }
    return places.get(word, f"{word!r} is no part; {WORDS}")
