"""The page's server, on the loopback address alone."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import click
import gradio
import uvicorn
from fastapi import FastAPI

from mergekit_lite.commands.app.guard import ADDRESS, MOST_BYTES, Guard
from mergekit_lite.commands.app.page import STYLE, THEME, page
from mergekit_lite.commands.app.places import Places, hub_cache
from mergekit_lite.errors import UsageError


def serve(root: Path, port: int, online: Mapping[str, str]) -> None:
    """Serve the page for a root, the process's folder, until it is interrupted.

    ``online``: variables with which a command may ask the hub, as this process may not. Raises UsageError where the
    port is taken.
    """
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((ADDRESS, port))
        except OSError as error:
            raise UsageError(f"Port {port} can't be had: {error.strerror}. Choose another one with --port.") from None
    blocks = page(Places(root, hub_cache()), online)
    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None), blocks, path="/", server_name=ADDRESS, server_port=port, footer_links=[],
        max_file_size=MOST_BYTES, ssr_mode=False, enable_monitoring=False, show_error=False, pwa=False,
        theme=THEME, css=STYLE,
    )  # fmt: skip
    click.echo(f"http://{ADDRESS}:{port}  (models below {root}; Ctrl-C ends it, a run goes on)")
    uvicorn.run(Guard(app, port), host=ADDRESS, port=port, log_level="warning", access_log=False)
