"""Plots as files, and as SVG within a page.

They are drawn with matplotlib's objects, not pyplot: no window, no global state.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import UsageError
from mergekit_lite.pages.whole_files import written_whole
from mergekit_lite.plain_text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

FORMATS = (".png", ".svg", ".pdf")
INK = "#123456"  # replaced by the page's text colour in an SVG
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
WIDTH = 7.0  # inches


def check_drawable(path: Path | None) -> None:
    """Refuse to draw where matplotlib is missing, or can't write a file of this name.

    Raises:
        UsageError: with what to do.
    """
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
    """Return an empty figure of ``WIDTH``; ``height`` is in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically, in the format of the name's ending.

    It has no date, so that equal plots are equal files.

    Raises:
        RunError: it can't be written.
    """
    _make_plain(figure)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def svg(draw: Callable[[FigureBase], None], height: float, label: str) -> str:
    """Return a drawing as an SVG element that takes its text colour from the page.

    Args:
        draw: draws onto a figure.
        height: in inches.
        label: the picture's name for screen readers.
    """
    import matplotlib as mpl

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}
    settings |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK}
    text = io.StringIO()
    with mpl.rc_context(settings):
        figure = new_figure(height)
        draw(figure)
        _make_plain(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    element = text.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*pt" ?', rf'<svg role="img" aria-label="{label}" \1', element, count=1)


def _make_plain(figure: Figure) -> None:
    """Replace in what is written on a figure, such as names of models, what is not to be shown."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_text():
            text.set_text(plain(text.get_text()))
