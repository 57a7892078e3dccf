"""What all plots need: matplotlib without a screen, and a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raises SettingsError where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SettingsError("a plot needs matplotlib: pip install 'midspan[plot]'") from error
    mpl.use("Agg")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, and let go of the figure."""
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
