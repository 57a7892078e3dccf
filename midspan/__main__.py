"""`midspan` and `python -m midspan`: deploy/cli.py, when it is sure that it is ours."""

from __future__ import annotations

import sys

from midspan import check_packages


def main() -> None:
    """Run the command line."""
    try:
        check_packages()
    except ImportError as error:
        sys.exit(f"Error: {error}")
    from deploy.cli import midspan

    midspan(prog_name="midspan")


if __name__ == "__main__":
    main()
