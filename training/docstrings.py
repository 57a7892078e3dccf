"""Write a text that is no story: the docstrings of Python's standard library, one a document.

    python training/docstrings.py > /tmp/docstrings.txt
    python training/docstrings.py .venv/lib/python3.11/site-packages/numpy > /tmp/numpy.txt

The second is of any other directory of modules. For models of other texts than the demo's, as in docs/codecs.md. Blank lines separate documents, so
those within a docstring are left out. Another version of Python has another text.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 60  # characters
LEFT_OUT = {"site-packages", "test", "tests", "idlelib"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_docstrings(path: Path) -> Iterator[str]:
    """Those of a module, its classes and functions; none of a file that cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and len(text) > SHORTEST:
            yield re.sub(r"\n\s*\n", "\n", text)


def write_text(root: Path, seed: int) -> str:
    """All that is below a directory, shuffled."""
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not LEFT_OUT & set(path.relative_to(root).parts)
    ]
    docstrings = [text for path in files for text in read_docstrings(path)]
    docstrings = list(dict.fromkeys(docstrings))
    random.Random(seed).shuffle(docstrings)
    return "\n\n".join(docstrings)


if __name__ == "__main__":
    print(write_text(Path(sys.argv[1] if sys.argv[1:] else sysconfig.get_path("stdlib")), seed=5))
