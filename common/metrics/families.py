"""Numbers as Prometheus's families of metrics, all of them named midspan_…"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from common.metrics.histogram import Histogram

Labelled = Iterable[tuple[Sequence[str], float]]  # values of the labels, then the number


def gauge(name: str, help_text: str, value: float) -> Metric:
    """A number that goes up and down."""
    return GaugeMetricFamily(f"midspan_{name}", help_text, value=value)


def gauges(name: str, help_text: str, labels: Sequence[str], values: Labelled) -> Metric:
    """Such numbers, told apart by labels."""
    family = GaugeMetricFamily(f"midspan_{name}", help_text, labels=labels)
    for of_labels, value in values:
        family.add_metric(of_labels, value)
    return family


def counters(name: str, help_text: str, labels: Sequence[str], values: Labelled) -> Metric:
    """Numbers that only go up; Prometheus calls the metric `name`_total."""
    family = CounterMetricFamily(f"midspan_{name}", help_text, labels=labels)
    for of_labels, value in values:
        family.add_metric(of_labels, value)
    return family


def histograms(
    name: str,
    help_text: str,
    labels: Sequence[str],
    values: Mapping[tuple[str, ...], Histogram],
) -> Metric:
    """Values by size, told apart by labels."""
    family = HistogramMetricFamily(f"midspan_{name}", help_text, labels=labels)
    for of_labels, histogram in values.items():
        buckets = [
            ("+Inf" if bound == inf else str(bound), count)
            for bound, count in histogram.cumulative()
        ]
        family.add_metric(of_labels, buckets, histogram.total)
    return family
