"""What is imported when a command runs. Who may import whom: the contracts in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "broker", "chaos", "cloud_worker", "common", "deploy", "edge_agent", "evaluation", "loadtest",
    "midspan",
)  # fmt: skip
FILES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_uses_pickle_or_eval(path: Path) -> None:
    names = {
        node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
    }
    assert not {"pickle", "marshal", "shelve"} & imported_modules(path)
    assert not {"eval", "exec"} & names


@pytest.mark.parametrize(
    "statement",
    [
        "import broker.server, broker.cli",
        "import midspan, midspan.__main__; midspan.MidspanError, midspan.__version__, dir(midspan)",
        "import deploy.cli, deploy.status, edge_agent.engine.client, cloud_worker.cli",
        "import deploy.serve, edge_agent.server.running",
        "import edge_agent.commands.ask, edge_agent.commands.image, common.protocol.wire",
        "from deploy.cli import midspan; midspan(['--help'], standalone_mode=False)",
        "from deploy.cli import midspan; midspan(['ask', '--help'], standalone_mode=False)",
    ],
)
def test_broker_and_help_do_not_import_torch(statement: str) -> None:
    check = "import sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", f"{statement}; {check}"], cwd=ROOT, check=True)


def test_what_is_wrong_with_a_question_is_said_without_torch() -> None:
    script = """
import sys
import click
from deploy.cli import midspan
for arguments in (
    ["hi", "--model", "gpt-9"], [" "], ["hi", "--stop", ""], ["hi", "--codec", "int9"],
    ["hi", "--codec-decode", "fp16,fp16,fp16"], ["hi", "--dtype", "int4"], ["hi", "-n", "-1"],
    ["hi", "--span", "2"], ["hi", "--broker", "localhost"], ["hi", "--timeout", "0"],
    ["hi", "--key", "none", "--broker-key", "none"], ["hi", "--encrypt-kv", "none"],
    ["hi", "-t", "1e9"], ["hi", "--top-p", "0"], ["hi", "--repetition-penalty", "inf"],
    ["hi", "--broker", "tcp://127.0.0.1:9"], ["hi", "--model", "./nothing"],
    ["hi", "--model", "tests"], ["hi", "--span", "2-9"],
):
    try:
        midspan(["ask", *arguments], standalone_mode=False)
    except click.ClickException as error:
        assert "torch" not in sys.modules
        is_late = "no broker answers" in error.format_message()
        assert is_late == ("tcp://127.0.0.1:9" in arguments), arguments
    else:
        raise AssertionError(arguments)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
