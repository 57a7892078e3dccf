"""A report as text: latencies in a table, the rest in another."""

from __future__ import annotations

from typing import Any

from common.console.tables import format_table
from deploy.status_report import describe_troubles

LATENCIES = {
    "ttft_s": "time to first token",
    "tpot_s": "time per token",
    "itl_s": "between two tokens",
    "session_s": "a whole session",
    "queue_s": "queue wait of a step",
    "sent_late_s": "due until sent",
}


def format_report(report: dict[str, Any]) -> str:
    """Both tables; no trailing newline."""
    return f"{format_latencies(report)}\n\n{format_facts(report)}"


def format_latencies(report: dict[str, Any]) -> str:
    rows = [
        (words, *(f"{figures[name] * 1e3:,.1f}" for name in ("p50", "p95", "p99", "max")),
         figures["count"])
        for key, words in LATENCIES.items()
        if (figures := report.get(key)) is not None
    ]  # fmt: skip
    return format_table(("ms", "p50", "p95", "p99", "largest", "of"), rows)


def format_facts(report: dict[str, Any]) -> str:
    """What is not None, a line each."""
    return format_table(("what", ""), [(k, v) for k, v in list_facts(report) if v is not None])


def list_facts(report: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Names and figures in words."""
    each, broker, good = (
        report["tokens_per_s_of_a_session"], report["broker"], report["goodput"],
    )  # fmt: skip
    workers, replays = report["workers"], report["replays"]
    failures = ", ".join(f"{count} {kind}" for kind, count in report["failures"].items())
    return [
        ("load", describe_load(report)),
        ("synthetic", describe_synthetic(report)),
        ("sessions", f"{report['sessions']:,} in {report['seconds']:,.1f} s"),
        ("failed", f"{report['failed']:,}" + (f": {failures}" if failures else "")),
        ("why", "; ".join(report["reasons"]) or None),
        ("tokens", f"{report['tokens']:,}, {report['tokens_per_s']:,.1f} a second"),
        ("tokens a second of a session", each and f"{each['p50']:,.1f} at the median"),
        ("goodput", good and (
            f"{good['sessions_per_s']:,.2f} sessions and {good['tokens_per_s']:,.1f} tokens a "
            f"second within {good['slo']} ({good['share']:.1%} of the sessions)"
        )),
        ("images", describe_images(report)),
        ("steps per batch", _as_text(report["steps_per_batch"])),
        ("broker", broker and describe_broker(broker)),
        ("workers", workers and (
            f"{workers['least']}" if workers["least"] == workers["most"]
            else f"{workers['least']} to {workers['most']}"
        )),
        ("killed, drained", describe_harm(report)),
        ("takeovers", _as_text(report["takeovers"])),
        ("replayed", replays and f"{replays['rows']:,} rows in {replays['sessions']:,} sessions"),
        ("wrong tokens", _as_text(report["tokens_wrong"])),
        ("up, down", report["bytes_up"] and (
            f"{report['bytes_up'] / 1e6:,.2f} MB, {report['bytes_down'] / 1e6:,.2f} MB"
        )),
    ]  # fmt: skip


def describe_load(report: dict[str, Any]) -> str:
    """Which sessions, as they were asked for."""
    load = report["load"]
    rate = f"{load['rate']:g} a second arriving at random" if load["rate"] else load["mode"]
    prompts, answers = (
        str(load[name]).replace(",", " to ") for name in ("prompt_tokens", "tokens")
    )
    lengths = load["trace"] or f"prompts of {prompts}, answers of {answers} tokens"
    return f"{rate}, at most {load['concurrency']} at once; {lengths}; seed {load['seed']}"


def describe_run(report: dict[str, Any]) -> str:
    """A title: the load, and what was not computed."""
    stand_in = describe_synthetic(report)
    return describe_load(report) + (f"\n{stand_in}" if stand_in else "")


def describe_synthetic(report: dict[str, Any]) -> str | None:
    """What was not computed; None where everything was."""
    if (stand_in := report["synthetic"]) is None:
        return None
    return (
        f"no model was computed: a batch slept {stand_in['ms']:g} ms in the workers, and edges "
        f"computed nothing; rows and KV as of {stand_in['model']}"
    )


def describe_images(report: dict[str, Any]) -> str | None:
    """None where none were wanted."""
    if (images := report["images"]) is None:
        return None
    words = f"{images['made']:,} of {images['steps']} steps"
    if images["image_s"]:
        words += f", {images['image_s']['p50']:,.2f} s each at the median"
    failures = ", ".join(f"{count} {kind}" for kind, count in images["failures"].items())
    return words + (f"; failed: {failures}" if failures else "")


def describe_broker(broker: dict[str, Any]) -> str:
    cpu_us = broker["cpu_us_per_step"]
    cost = f", {cpu_us:,.0f} µs of its CPU time each" if cpu_us is not None else ""
    line = f"{broker['steps']:,} steps{cost}; at most {broker['queued_most']:,} queued"
    return "; ".join([line, *describe_troubles(broker)])


def describe_harm(report: dict[str, Any]) -> str | None:
    """None where nothing was done."""
    kills, drains = report["kills"], report["drains"]
    return f"{kills}, {drains}" if kills or drains else None


def _as_text(value: float | int | None) -> str | None:
    return None if value is None else f"{value:,}"
