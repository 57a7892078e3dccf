"""The plot of `midspan eval codec`: what it says can be read."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

from evaluation.command import Measurement, draw_rate_distortion, find_frontier

MEASURED = Path(__file__).resolve().parent.parent / "docs" / "codecs" / "stories-llama.csv"


def point(codec: str, bits: float, loss: float) -> Measurement:
    return Measurement(codec, "2:6", 512, bits, 1.0, loss)


@pytest.fixture
def measured() -> list[Measurement]:
    with MEASURED.open() as file:
        return [
            Measurement(
                row["codec"], row["span"], int(row["window_tokens"]),
                float(row["wire_bits_per_value"]), float(row["perplexity"]),
                float(row["loss_percent"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def test_no_label_lies_over_another_and_every_codec_has_one(measured: list[Measurement]) -> None:
    mpl.use("Agg")
    figure = draw_rate_distortion(measured)
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    labels = [text.get_text() for text in axes.texts]
    plt.close(figure)
    for (one, label), (other, beside) in itertools.combinations(zip(boxes, labels, strict=True), 2):
        assert not one.overlaps(other), f"{label} and {beside}"
    *numbers, legend = sorted(labels, key=len)
    shown = [int(number) for label in numbers for number in label.split(", ")]
    assert sorted(shown) == list(range(1, len(measured)))
    names = [match[1] for match in re.finditer(r"\d+  (.+)", legend)]
    assert names == [m.codec for m in measured if m.codec != "fp32"]


def test_the_frontier_has_what_no_other_codec_beats() -> None:
    small, good, same, worse = (
        point("small", 2, 5.0), point("good", 4, 1.0), point("same", 5, 1.0), point("worse", 6, 3.0)
    )  # fmt: skip
    assert find_frontier([worse, same, good, small]) == [small, good]
