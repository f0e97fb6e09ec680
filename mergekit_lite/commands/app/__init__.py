"""``mergekit-lite app``: the commands on a local page."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mergekit_lite.errors import UsageError

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


@click.command(
    name="app",
    epilog="""\b
Examples:
  mergekit-lite app
  mergekit-lite app --root /models --port 8000
""",
)
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    show_default=True,
    help="Models lie below this folder, and outputs are put into it; no other one is read but the hub's cache.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Of the loopback address.")
@click.option(
    "--space",
    is_flag=True,
    help="For anybody, as a space of the hub: models of the hub alone, read by range, and small runs, one at a time.",
)
def command(root: Path, port: int, space: bool) -> None:
    """Open a page for this machine's browser: look at models, write a recipe and see its plan, run it, choose alpha.

    The page is served on 127.0.0.1 alone. It runs the commands that it shows, with ROOT as their folder. Models come
    from below ROOT and from the cache of the hub; the hub is asked where a button says so. With --space it is another
    page: docs/app.md.
    """
    if os.name != "posix":
        raise UsageError("The page needs Linux or macOS: runs are followed by locks that only these have.")
    online = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if space:
        forget_tokens()
        os.environ.pop("SYSTEM", None)  # of what it knows for a space, Gradio's page asks other servers for fonts
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: it reads this once
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.chdir(root)  # references of a recipe are taken from here, as the commands take them
    try:
        from mergekit_lite.commands.app.serving import serve
    except ImportError as error:
        raise UsageError(f'{error.name} is not here: pip install "mergekit-lite[app]".') from None
    serve(Path.cwd(), port, online, is_public=space)


def forget_tokens() -> None:
    """Make this process, and those that it starts, nobody to the hub: what a visitor reads, anybody may read."""
    for name in TOKENS:
        os.environ.pop(name, None)
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # of a file, too; before the hub's library is imported
