"""All figures of the README's table, measured again: `make bench`.

    python benchmarks/bench.py [--only NAME …] [--results DIRECTORY] [--readme README.md]

Runs the benchmarks one after another, each of which compares two things in one run, and writes what
they say with a description of the machine to results/bench.json, a chart of the ratios to
results/bench.png (where matplotlib is), and the table into the README. With --only the others keep
the figures that they had. It takes about ten minutes; nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
BEGIN, END = "<!-- bench: made by `make bench` -->\n", "<!-- bench ends -->"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One that prints an object with --json, and what of it stands in the table."""

    name: str
    command: tuple[str, ...]
    about: str

    def rows(self, figures: Figures) -> list[tuple[str, str, float]]:
        """What, in words with figures, and the ratio."""
        rows: list[tuple[str, str, float]] = ROWS[self.name](figures)
        return rows


def one_session(f: Figures) -> list[tuple[str, str, float]]:
    text = (
        f"{f['midspan_tokens_per_s']:.1f} tokens/s beside {f['generate_tokens_per_s']:.1f} of "
        f"`generate`; {f['added_ms_p50']:.1f} ms added to a token, "
        f"{f['added_ms_p99']:.1f} at the 99th percentile"
    )
    return [("one session", text, f["ratio"])]


def many_sessions(f: Figures) -> list[tuple[str, str, float]]:
    return [
        (
            f"{count} sessions in one engine",
            f"{one['midspan_tokens_per_s']:.0f} tokens/s beside "
            f"{one['generate_tokens_per_s']:.0f} of `generate` with a batch of {count}",
            one["ratio"],
        )
        for count, one in f["sessions"].items()
        if int(count) > 1
    ]


def takeover(f: Figures) -> list[tuple[str, str, float]]:
    text = (
        f"{f['takeover_ms']:.0f} ms for {f['rows']:,} rows of {f['row_bytes'] // 1024} KB from "
        f"Redis; {f['recompute_ms']:.0f} ms to compute them again"
    )
    return [("another worker takes over", text, f["takeover_ms"] / f["recompute_ms"])]


def broker(f: Figures) -> list[tuple[str, str, float]]:
    return [
        (
            f"the broker, {run['edges']:,} edges and {run['workers']} workers",
            f"{run['cpu_us_per_step']:.0f} µs of CPU for a step beside "
            f"{run['forwarder_cpu_us_per_step']:.0f} of a loop that only forwards",
            run["cpu_us_per_step"] / run["forwarder_cpu_us_per_step"],
        )
        for run in f["runs"]
    ]


def codec(f: Figures) -> list[tuple[str, str, float]]:
    (row,) = [
        row for row in f["rows"]
        if (row["codec"], row["hidden"], row["tokens"]) == ("int8", 4096, 1)
    ]  # fmt: skip
    text = (
        f"{row['us_per_token']:.0f} µs for a token of 4,096 values, both ways, beside "
        f"{row['layer_us_per_token'] / 1e3:.0f} ms of one decoder layer"
    )
    return [("`int8`", text, row["us_per_token"] / row["layer_us_per_token"])]


def images(f: Figures) -> list[tuple[str, str, float]]:
    text = (
        f"{f['midspan_s']:.2f} s beside {f['diffusers_s']:.2f} s of diffusers' pipeline, "
        f"{f['steps']} steps; {(f['bytes_up'] + f['bytes_down']) / 1e3:.0f} KB"
    )
    return [("a picture of the demo model", text, f["ratio"])]


def serve(f: Figures) -> list[tuple[str, str, float]]:
    text = (
        f"{f['token_ms']['added']:.2f} ms added to a token, {f['first_token_ms']['added']:.1f} ms "
        "to the first, beside the engine called directly"
    )
    return [("HTTP", text, f["token_ms"]["direct"] / f["token_ms"]["http"])]


ROWS: dict[str, Any] = {
    "overhead": one_session, "many_sessions": many_sessions, "takeover": takeover,
    "broker": broker, "codec": codec, "images": images, "serve": serve,
}  # fmt: skip
BENCHMARKS = [
    Benchmark("overhead", (), "decoding against `generate`, 56 M random parameters"),
    Benchmark("many_sessions", (), "the same with many sessions at once"),
    Benchmark("takeover", (), "a session whose worker is gone"),
    Benchmark("broker", (), "many edges and workers that compute nothing"),
    Benchmark("codec", ("--hidden", "4096", "--tokens", "1"), "encoding and decoding"),
    Benchmark("images", (), "SDXL's way, with the demo model"),
    Benchmark("serve", ("--rounds", "30"), "the endpoint"),
]


def run(benchmark: Benchmark) -> Figures:
    """What it says. Raises CalledProcessError."""
    command = [sys.executable, str(HERE / f"{benchmark.name}.py"), *benchmark.command, "--json"]
    click.echo(f"{benchmark.name}: {benchmark.about} …", err=True)
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(printed.strip().splitlines()[-1])
    return figures if isinstance(figures, dict) else {"rows": figures}


def describe_machine() -> dict[str, Any]:
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cores": len(cpu),
        "cpu": cpu[0] if cpu else platform.machine(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "device": "cpu",
        "threads": 1,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def format_table(results: Figures) -> str:
    """The README's table. Pure: the same results give the same text."""
    machine = results["machine"]
    lines = [
        f"Measured by `make bench` on {machine['date']}: {machine['cores']} shared cores "
        f"({machine['cpu']}), {machine['system']}, Python {machine['python']}, torch "
        f"{machine['torch']}, one thread a process. Ratios mean more than figures.",
        "",
        "| | | ratio |",
        "|---|---|---|",
    ]
    for benchmark in BENCHMARKS:
        if benchmark.name in results["benchmarks"]:
            for what, text, ratio in benchmark.rows(results["benchmarks"][benchmark.name]):
                shown = f"{ratio:.2f}" if ratio >= 0.1 else f"1/{1 / ratio:.0f}"
                lines.append(f"| {what} | {text} | {shown} |")
    return "\n".join([*lines, ""])


def put_into(readme: str, table: str) -> str:
    """A README with the table between its marks. Raises ClickException without them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"the README has no {BEGIN.strip()} … {END}")
    return f"{before}{BEGIN}{table}{END}{after}"


def draw(results: Figures, path: Path) -> None:
    """The ratios as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [
        (what.replace("`", ""), ratio)
        for benchmark in BENCHMARKS
        if benchmark.name in results["benchmarks"]
        for what, _, ratio in benchmark.rows(results["benchmarks"][benchmark.name])
        if benchmark.name in ("overhead", "many_sessions", "images", "serve")
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1), layout="constrained")
    bars = axes.barh([what for what, _ in rows], [ratio for _, ratio in rows], color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set(xlim=(0, 1.1), xlabel="speed beside the same work in one process")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--only", multiple=True, type=click.Choice([b.name for b in BENCHMARKS]))
@click.option("--results", default=HERE / "results", type=click.Path(path_type=Path))
@click.option("--readme", type=click.Path(path_type=Path, exists=True))
def main(only: tuple[str, ...], results: Path, readme: Path | None) -> None:
    path = results / "bench.json"
    known = json.loads(path.read_text())["benchmarks"] if only and path.exists() else {}
    measured = {b.name: run(b) for b in BENCHMARKS if not only or b.name in only}
    found = {"machine": describe_machine(), "benchmarks": {**known, **measured}}
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    try:
        draw(found, results / "bench.png")
    except ImportError:
        click.echo("no chart: matplotlib is not here (pip install 'midspan[plot]')", err=True)
    table = format_table(found)
    click.echo(table)
    if readme is not None:
        readme.write_text(put_into(readme.read_text(), table))


if __name__ == "__main__":
    main()
