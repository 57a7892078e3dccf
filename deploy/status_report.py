"""A broker's report as `midspan status` shows it: in 80 columns, and in colour on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from common.console.tables import format_table
from deploy.checks import find_store_faults, find_stores_down

NAME_WIDTH = 24
COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow"}
TROUBLES = {  # one of them, and several
    "dead_workers": ("worker died or fell silent", "workers died or fell silent"),
    "redispatched": (
        "step given to another worker after a failure",
        "steps given to another worker after a failure",
    ),
    "handed_over": (
        "step given to another worker because one was late",
        "steps given to another worker because one was late",
    ),
    "refused": ("step refused", "steps refused"),
    "busy": (
        "step told to come back, the queue was full",
        "steps told to come back, the queue was full",
    ),
    "late_answers": (
        "answer came when nobody waited for it any more",
        "answers came when nobody waited for them any more",
    ),
    "foreign_sessions": (
        "message about somebody else's session",
        "messages about somebody else's session",
    ),
    "forged_workers": ("message in another worker's name", "messages in another worker's name"),
    "refused_connections": ("connection refused", "connections refused"),
    "ended_connections": (
        "connection ended for too much that was not read or not sent",
        "connections ended for too much that was not read or not sent",
    ),
    "bad_messages": ("message that made no sense", "messages that made no sense"),
}


def format_report(report: dict[str, Any], broker: str) -> str:
    """What there is, who waits for it, and what has gone wrong since the broker began."""
    blocks = [format_summary(report, broker)]
    if report["workers"]:
        blocks += [format_workers(report), format_services(report)]
    blocks += ["\n".join(find_store_faults(report)), format_troubles(report)]
    blocks.append(format_checks(report.get("checks", [])))
    return "\n\n".join(block for block in blocks if block)


def format_summary(report: dict[str, Any], broker: str) -> str:
    queued = sum(queue["queued"] for queue in report["queues"])
    answered = report["counters"]["answers"]
    return (
        f"broker {broker}, up {_duration(report['uptime_s'])}\n"
        f"{_count(len(report['workers']), 'worker')}, {_count(report['sessions'], 'session')}, "
        f"{_count(queued, 'step')} queued, {report['steps_in_flight']} in flight, "
        f"{answered:,} answered"
    )


def format_workers(report: dict[str, Any]) -> str:
    headers = ("worker", "state", "in flight", "warm", "steps", "warm MB", "Redis")
    down = find_stores_down(report)
    rows = [
        (
            _short(worker["worker_id"]),
            worker["state"],
            f"{worker['in_flight']} of {worker['capacity']}",
            worker["warm_sessions"],
            worker["steps_done"],
            _megabytes(worker["stats"].get("warm_bytes", 0)),
            "down" if worker["worker_id"] in down else "up",
        )
        for worker in report["workers"]
    ]
    header, *lines = format_table(headers, rows).splitlines()
    coloured = [
        click.style(line, fg="red" if row[-1] == "down" else COLOURS[row[1]])
        for line, row in zip(lines, rows, strict=True)
    ]
    return "\n".join([click.style(header, bold=True), *coloured])


def format_services(report: dict[str, Any]) -> str:
    """What is served, by how many, in which precision, and how much waits for it."""
    serving: dict[tuple[str, str, str], tuple[str, int]] = {}
    for worker in report["workers"]:
        for service in worker["services"]:
            key = (service["model"], service["part"], service["precision"])
            serving[key] = (service["name"], serving.get(key, ("", 0))[1] + 1)
    queued = {(q["model"], q["part"], q["precision"]): q["queued"] for q in report["queues"]}
    headers = ("model", "part", "precision", "fingerprint", "workers", "queued")
    rows: list[Sequence[object]] = [
        (_short(name), part, precision, model, workers, queued.pop((model, part, precision), 0))
        for (model, part, precision), (name, workers) in serving.items()
    ]
    rows += [
        ("", part, precision, model, 0, waiting)
        for (model, part, precision), waiting in queued.items()
        if waiting
    ]
    header, *lines = format_table(headers, rows).splitlines()
    return "\n".join([click.style(header, bold=True), *lines])


def format_troubles(report: dict[str, Any]) -> str:
    """What is not zero of what one would rather not see."""
    counts = {
        **report["counters"],
        "refused_connections": sum(report["refused_connections"].values()),
        "ended_connections": report["ended_connections"],
        "bad_messages": report["bad_messages"],
    }
    seen = describe_troubles(counts)
    return "\n".join(["since the broker began:", *(f"  {line}" for line in seen)]) if seen else ""


def describe_troubles(counts: Mapping[str, int]) -> list[str]:
    """A few words for each of TROUBLES that is counted there and is not zero."""
    return [
        f"{counts[name]:,} {one if counts[name] == 1 else several}"
        for name, (one, several) in TROUBLES.items()
        if counts.get(name)
    ]


def format_checks(checks: list[dict[str, Any]]) -> str:
    """What --check has found."""
    if not checks:
        return ""
    headers = ("checked", "by worker", "first ms", "later ms", "stored", "result")
    rows = [
        (
            check["service"],
            check["worker_id"],
            check["first_ms"],
            check["later_ms"],
            {True: "yes", False: "no", None: "-"}[check["stored"]],
            check["failure"] or check["skipped"] or "works",
        )
        for check in checks
    ]
    header, *lines = format_table(headers, rows).splitlines()
    coloured = [
        click.style(line, fg="red" if check["failure"] else None)
        for line, check in zip(lines, checks, strict=True)
    ]
    return "\n".join([click.style(header, bold=True), *coloured])


def _megabytes(said: object) -> float | str:
    """What a worker says of itself may be anything."""
    return round(said / 1e6, 1) if isinstance(said, int | float) else "?"


def _short(name: str) -> str:
    """A name that somebody else has chosen, in one line and without marks for terminals."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
