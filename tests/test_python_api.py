"""`import midspan`, and what happens where others have packages of the same names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import midspan
from deploy.child import midspan_command
from deploy.pool import LocalPool, PoolSettings

ROOT = Path(__file__).resolve().parent.parent


def readme_python() -> str:
    """What the README does with midspan's own API."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
    (block,) = [block for block in blocks if "import midspan" in block]
    return str(block)


def run_python(
    *arguments: str, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Python in a directory, with `path` before midspan on its path."""
    paths = [str(path)] if path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def make_foreign_names(directory: Path) -> Path:
    """What a user's own project may well have in it."""
    for package in ("common", "deploy"):
        (directory / package).mkdir()
        (directory / package / "__init__.py").write_text("raise RuntimeError('not midspan')")
    (directory / "broker.py").write_text("raise RuntimeError('not midspan')")
    return directory


def test_the_readmes_python_writes_a_text(tmp_path: Path) -> None:
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as pool:
        code = readme_python().replace("tcp://127.0.0.1:5555", pool.edge_endpoint)
        done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 15


@pytest.mark.parametrize("name", midspan.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(midspan, name).__module__ == midspan.HOMES[name]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Sesion'"):
        _ = midspan.Sesion


def test_a_pool_starts_where_others_have_packages_of_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_foreign_names(tmp_path))
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as pool:
        pool.wait_for_workers(1)


def test_a_command_runs_where_others_have_packages_of_our_names(tmp_path: Path) -> None:
    done = subprocess.run(
        [*midspan_command("up", "--help")], cwd=make_foreign_names(tmp_path),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--workers" in done.stdout


def test_a_foreign_package_in_the_commands_way_is_named_in_one_line(tmp_path: Path) -> None:
    foreign = make_foreign_names(tmp_path)
    done = run_python("-P", "-m", "midspan", "status", cwd=ROOT, path=foreign)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"Error: midspan's package 'broker' is hidden by another at {foreign}/broker.py"
    )


def test_a_foreign_package_in_the_apis_way_is_an_import_error_that_names_it(tmp_path: Path) -> None:
    foreign = make_foreign_names(tmp_path)
    code = "import sys, midspan\ntry: midspan.Session\nexcept ImportError as e: print(e)"
    done = run_python("-c", code, cwd=foreign)
    assert "midspan's package 'broker' is hidden by another at" in done.stdout, done.stderr
