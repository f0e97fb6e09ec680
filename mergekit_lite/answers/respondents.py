"""From a model that a recipe describes to what answers for it: a client of its server, or the model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mergekit_lite.answers.asked_model import AskedModel
from mergekit_lite.answers.asking import urls_of
from mergekit_lite.answers.in_context import CompletionServer, InContext, OfflineInContext, stopped
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.offline import Offline
from mergekit_lite.answers.pre_query import LocalUser, ServedUser
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.server import Served, Server
from mergekit_lite.answers.serving import RunningServer, serve_words, serving
from mergekit_lite.answers.template import PreQuery


@contextmanager
def respondent(
    asked: AskedModel, model: str, log: Path, *, one_request: bool = False, before: PreQuery | None = None
) -> Iterator[Served | Local]:
    """Give what answers for a model; a server that is started for it ends with the context.

    Args:
        asked: how it is asked.
        model: its folder, or its name on the hub or at the server.
        log: the file that takes what a server prints that is started here.
        one_request: ask for all answers to a prompt at once.
        before: have it say what a user would: what it reads instead of a prompt. Not for vLLM in this process.

    Raises:
        RunError: the server doesn't start.
        UnreadableError: the file of ``in_context`` can't be read.
    """
    examples = asked.examples()
    if asked.is_served:
        with ExitStack() as stack:
            running = None
            if asked.serve is not None:
                words = serve_words(asked.serve, f"{asked.name}: serve")
                running = stack.enter_context(serving(words, model, log, asked.serve_patience))
            yield Served(asked.name, _client(asked, running, examples, before), asked.system, one_request)
    elif asked.engine == "vllm":
        how: dict[str, Any] = {"system": asked.system, "dtype": asked.dtype, "options": asked.engine_options}
        if examples is None:
            yield Offline(asked.name, model, asked.sampling, **how)
        else:
            yield OfflineInContext(asked.name, model, stopped(asked.sampling), examples=examples, **how)
    else:
        how = {"batch_size": asked.batch_size, "device": asked.device, "dtype": asked.dtype, "system": asked.system}
        if before is not None:
            yield LocalUser(asked.name, model, asked.sampling, before=before, **how)
        elif examples is None:
            yield Local(asked.name, model, asked.sampling, **how)
        else:
            yield InContext(asked.name, model, stopped(asked.sampling), examples=examples, **how)


def _client(asked: AskedModel, running: RunningServer | None, examples: str | None, before: PreQuery | None) -> Server:
    """Return a client of a model's server: of the one that was started for it, where there is one."""
    urls = urls_of(asked.server or ()) if running is None else (running.url,)
    name = asked.model if running is None else running.model
    how: dict[str, Any] = {
        "key_variable": asked.api_key_variable,
        "concurrency": asked.concurrency,
        "timeout": asked.timeout,
        "retries": asked.retries,
    }
    if before is not None:
        server: Server = ServedUser(urls, RequestBody(name, asked.sampling), before=before, **how)
    elif examples is None:
        server = Server(urls, RequestBody(name, asked.sampling), **how)
    else:
        server = CompletionServer(urls, RequestBody(name, stopped(asked.sampling)), examples=examples, **how)
    if running is not None:
        server.ended = running.ended
    return server
