"""Benchmarks start, and the README's figures are those that they wrote."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
SHARED = {"report"}  # what benchmarks import, no command
NAMES = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - SHARED)
bench: dict[str, Any] = runpy.run_path(str(BENCHMARKS / "bench.py"))

START_ALL = """
import runpy, sys
first, *names = sys.argv[1:]
path = list(sys.path)
for name in names:
    # before_a_key wants python -P, as its first lines say
    sys.path = path if name == "before_a_key" else [first, *path]
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"{first}/{name}.py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (name, end.code)
    print("started", name)
"""


@pytest.mark.long
def test_every_benchmark_starts_and_says_how_it_is_run() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", START_ALL, str(BENCHMARKS), *NAMES],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"^started (\w+)$", done.stdout, re.M) == NAMES
    for name in NAMES:
        words = (BENCHMARKS / f"{name}.py").read_text()
        assert re.search(rf"^    python (-P )?benchmarks/{name}\.py", words, re.M), name


def test_the_readmes_table_is_what_the_stored_figures_give() -> None:
    results = json.loads((BENCHMARKS / "results" / "bench.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert bench["put_into"](readme, bench["format_table"](results)) == readme
    assert results["benchmarks"].keys() == {each.name for each in bench["BENCHMARKS"]}


def test_a_readme_without_its_marks_is_refused() -> None:
    import click

    with pytest.raises(click.ClickException, match="made by `make bench`"):
        bench["put_into"]("# A title\n", "a table\n")


def test_a_ratio_below_a_tenth_is_shown_as_a_part() -> None:
    results = {
        "machine": {
            "date": "2026-01-01", "cores": 2, "cpu": "a CPU", "system": "Linux", "python": "3.11",
            "torch": "2.13",
        },
        "benchmarks": {
            "takeover": {
                "takeover_ms": 10.0, "recompute_ms": 800.0, "rows": 1900, "row_bytes": 8192,
            },
            "overhead": {
                "midspan_tokens_per_s": 46.1, "generate_tokens_per_s": 55.7, "ratio": 0.827,
                "added_ms_p50": 1.71, "added_ms_p99": 2.5,
            },
        },
    }  # fmt: skip
    lines = bench["format_table"](results).splitlines()
    assert lines[-2:] == [
        "| one session | 46.1 tokens/s beside 55.7 of `generate`; 1.7 ms added to a token, 2.5 at "
        "the 99th percentile | 0.83 |",
        "| another worker takes over | 10 ms for 1,900 rows of 8 KB from Redis; 800 ms to compute "
        "them again | 1/80 |",
    ]
