"""The tables that --stats prints: what an answer has cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common.console.tables import format_table

HEADERS = ("what it cost", "per token: after the first, times are medians")


def format_stats(stats: Mapping[str, Any]) -> str:
    """Of a whole answer, or of what an engine of ours has done of it."""
    stages = stats["ms_per_token"]
    workers = ", ".join(f"{name} {count}" for name, count in stats["tokens_by_worker"].items())
    rows = [
        ("tokens", f"{stats['new_tokens']} new after {stats['prompt_tokens']} of the prompt"),
        ("speed", f"{stats['tokens_per_s']} tokens/s, first token {stats['first_token_ms']} ms"),
        ("bytes per token", f"{stats['bytes_up_per_token']} up, "
                            f"{stats['bytes_down_per_token']} down"),
        ("bytes in all", f"{stats['bytes_up']:,} up, {stats['bytes_down']:,} down"),
        ("ms per token", ", ".join(f"{name} {ms}" for name, ms in stages.items())),
        ("codecs", describe_codecs(stats)),
        ("round trips", describe_trips(stats)),
        ("rows by worker", workers),
        ("rows replayed", str(stats["rows_replayed"])),
        ("detours over other spans", str(stats["detours"])),
    ]  # fmt: skip
    if "served_by" in stats:
        rows.append(("served by", stats["served_by"]))
    return format_table(HEADERS, rows)


def describe_codecs(stats: Mapping[str, Any]) -> str:
    """In which rows travelled, up and down, and why if the link was asked."""
    prompt, decode = (
        _name_both_ways(stats["codecs"][f"{phase}_up"], stats["codecs"][f"{phase}_down"])
        for phase in ("prompt", "decode")
    )
    told = prompt if prompt == decode else f"prompt {prompt}; then {decode}"
    link = stats["codecs_chosen_for"]
    if link is None:
        return told
    rate, there_and_back = (_round(link[name]) for name in ("mbit", "rtt_ms"))
    return f"{told}; chosen for a link of {rate} Mbit/s, {there_and_back} ms there and back"


def _round(value: float) -> str:
    """To what is known of it."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _name_both_ways(up: str, down: str) -> str:
    return up if up == down else f"{up} up, {down} down"


def describe_trips(stats: Mapping[str, Any]) -> str:
    """How many tokens each brought, and who guessed them."""
    told = f"{stats['round_trips']}, {stats['tokens_per_round_trip']:.2f} tokens each"
    for name, count in stats["drafted"].items():
        told += f"; {name} guessed {count}, {stats['accepted'].get(name, 0)} right"
    return told


def format_cut_off(costs: Sequence[Mapping[str, Any]], served_by: str) -> str:
    """Of the tokens that came from a serve before its answer was cut off."""
    up, down = (sum(cost[name] for cost in costs) for name in ("bytes_up", "bytes_down"))
    workers = Counter(cost["worker"] for cost in costs)
    rows = [
        ("tokens", f"{len(costs)} new, then it was cut off"),
        ("first token", f"{costs[0]['ms']} ms"),
        ("bytes in all", f"{up:,} up, {down:,} down"),
        ("tokens by worker", ", ".join(f"{name} {count}" for name, count in workers.items())),
        ("served by", served_by),
    ]
    return format_table(("what it cost", ""), rows)
