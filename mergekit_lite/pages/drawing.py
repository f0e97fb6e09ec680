"""Plots as files and as SVG within a page.

Drawn by matplotlib's objects, not pyplot: no window, no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import RunError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

FORMATS = (".png", ".svg", ".pdf")
INK = "#123456"  # replaced by the page's text colour in an SVG
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
WIDTH = 7.0  # inches


def check_drawable(path: Path | None) -> None:
    """Raise UsageError where matplotlib is missing, or can't write a file of this name."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Plots need matplotlib, which is not installed: pip install 'mergekit-lite[plot]' (or pip install "
            "matplotlib). All figures are there without it: --json, --csv."
        ) from error
    if path is not None and path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a plot is written as {', '.join(FORMATS)}, by the ending of its name.")


def new_figure(height: float) -> Figure:
    """A figure of the house's width; ``height`` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure by the ending of its name; no date in it, so that it depends on what it shows alone.

    Under its name there is either what was there before or the whole picture.

    Raises:
        RunError: it can't be written.
    """
    partial = path.with_name(f"writing-{path.name}")  # matplotlib goes by the ending
    try:
        figure.savefig(partial, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"Can't write {path}: {error.strerror or error}.") from error


def svg(draw: Callable[[FigureBase], None], height: float, label: str) -> str:
    """What ``draw`` draws as an SVG element that takes its text colour from the page."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}
    settings |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK}
    text = io.StringIO()
    with mpl.rc_context(settings):
        figure = new_figure(height)
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*pt" ?', rf'<svg role="img" aria-label="{label}" \1', drawn, count=1)
