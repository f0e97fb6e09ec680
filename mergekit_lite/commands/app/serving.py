"""The page's server: on the loopback address alone, or as a space of the hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import click
import gradio
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse

from mergekit_lite.checkpoint.hub import streamed
from mergekit_lite.commands.app.guard import ADDRESS, MOST_BYTES, OUTPUT, Guard
from mergekit_lite.commands.app.page import STYLE, THEME, page
from mergekit_lite.commands.app.places import Places, hub_cache
from mergekit_lite.commands.app.public import PublicPlaces, downloads, public_runs
from mergekit_lite.errors import UsageError

EVERYWHERE = "0.0.0.0"  # in a space, where the hub's proxy is all that gets here
MOST_WAITING = 50  # requests of visitors
FREE = 0.02  # seconds between looks for a request; Gradio looks a thousand times a second, and so never rests


def serve(root: Path, port: int, online: Mapping[str, str], is_public: bool) -> None:
    """Serve the page for a root, the process's folder, until it is interrupted.

    ``online``: variables with which a command may ask the hub where this process may not. ``SPACE_HOST``, which the hub
    sets in its spaces, has the names of one that is public.

    Raises UsageError where the port is taken.
    """
    names = os.environ.get("SPACE_HOST", "").split(",") if is_public else []
    space = [name.strip() for name in names if name.strip()]
    address = EVERYWHERE if space else ADDRESS
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((address, port))
        except OSError as error:
            raise UsageError(f"Port {port} can't be had: {error.strerror}. Choose another one with --port.") from None
    server = FastAPI(openapi_url=None)
    if is_public:
        blocks = page(PublicPlaces(root, root), online)
        blocks.queue(max_size=MOST_WAITING)
        _serve_output(server, root)
    else:
        blocks = page(Places(root, hub_cache()), online)
    blocks._queue.sleep_when_free = FREE
    app = gradio.mount_gradio_app(
        server, blocks, path="/", server_name=ADDRESS, server_port=port, footer_links=[],
        max_file_size=MOST_BYTES, ssr_mode=False, enable_monitoring=False, show_error=False, pwa=False,
        theme=THEME, css=STYLE,
    )  # fmt: skip
    click.echo(f"http://{address}:{port}  (models below {root}; Ctrl-C ends it, a run goes on)")
    with streamed() if is_public else nullcontext():
        uvicorn.run(Guard(app, port, space), host=address, port=port, log_level="warning", access_log=False)


def _serve_output(server: FastAPI, root: Path) -> None:
    """Let a server give the files of the finished output, and no others."""
    runs = public_runs(root)

    @server.get(OUTPUT + "{name}")
    def download(name: str) -> FileResponse:
        if name not in downloads(runs):
            raise HTTPException(404)
        return FileResponse(root / runs.state().output / name, filename=name, media_type="application/octet-stream")
