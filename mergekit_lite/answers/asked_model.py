"""A model that is asked, as recipes describe it, behind a server or in this process; and what can be wrong with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.asking import Sampling, urls_of
from mergekit_lite.answers.offline import is_installed
from mergekit_lite.answers.problems import KeyPath, Problem, wrong_sampling, wrong_urls
from mergekit_lite.answers.serving import split_command, wrong_command
from mergekit_lite.input_files import read_text

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
M = TypeVar("M", bound="AskedModel")

SERVERS_ONLY = {"presence_penalty", "frequency_penalty", "chat_template_kwargs", "extra_body"}  # keys of sampling
VLLM_TOO = {"presence_penalty", "frequency_penalty"}
NO_ENGINE_OPTIONS = {
    "model": "it is the key 'model' beside it",
    "dtype": "it is the key 'dtype' beside it",
    "trust_remote_code": "code of a model is never run in this process. Serve it, and give its 'server'",
}
MOST_IN_CONTEXT = 4_000_000  # bytes of a file of rules and examples


class AskedModel(BaseModel):
    """A model that answers prompts, behind a server or loaded into this process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    model: str = ""  # a folder or org/name; for a server, the name it is served under
    server: str | tuple[str, ...] | None = None  # http://host:port/v1 of an OpenAI-compatible server; one or several
    serve: str | None = None  # a command that starts such a server here: vllm serve {model} --port {port}
    serve_patience: Annotated[float, Field(gt=0)] = 600  # seconds until it is ready
    api_key_variable: str = "OPENAI_API_KEY"  # the environment variable with the server's key
    concurrency: Count = 32  # requests open at once, to each URL
    timeout: Annotated[float, Field(gt=0)] = 600  # seconds that a request may take
    retries: Annotated[int, Field(ge=0)] = 8  # of a failed request
    engine: Literal["transformers", "vllm"] = "transformers"  # in process
    engine_options: dict[str, Any] = {}  # more arguments of vllm.LLM: tensor_parallel_size, max_model_len …
    batch_size: Count = 16  # in process
    device: str | None = None  # cpu, cuda, cuda:1 …; by default a GPU if the machine has one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # in process; the model's own by default
    sampling: Sampling = Sampling()
    system: str | None = None  # a system prompt put before messages that have none of their own
    in_context: Path | None = None  # a text of rules and examples that a base model reads first, instead of a template

    @property
    def is_served(self) -> bool:
        """Whether a server answers for it."""
        return self.server is not None or self.serve is not None

    @property
    def where(self) -> str:
        """Where it is asked, in words."""
        if self.server is not None:
            return ", ".join(urls_of(self.server))
        if self.serve is not None:
            return f"served by {self.serve}"
        return "in this process" if self.engine == "transformers" else f"in this process, by {self.engine}"

    def examples(self) -> str | None:
        """Return the text of ``in_context``. Raises UnreadableError."""
        return None if self.in_context is None else read_text(self.in_context, MOST_IN_CONTEXT)


def located(model: M, folder: Path) -> M:
    """Return a model whose paths are resolved against a recipe's folder."""
    update: dict[str, Any] = {} if model.server else {"model": model_at(model.model, folder)}
    if model.in_context is not None:
        update["in_context"] = folder / model.in_context.expanduser()
    return model.model_copy(update=update)


def model_at(text: str, folder: Path) -> str:
    """Return a model's path resolved against the recipe's folder, or its name on the hub unchanged."""
    path = Path(text).expanduser()
    is_path = path.is_absolute() or text.startswith((".", "~")) or (folder / path).exists()
    return str((folder / path).resolve()) if is_path else text


def wrong_model(at: KeyPath, model: AskedModel) -> Iterator[Problem]:
    """Yield what contradicts what in the keys of a model."""
    ineffective, why = _without_effect(model)
    for key in ineffective:
        if key in model.model_fields_set:
            yield Problem((*at, key), f"{key!r} has no effect here: {why}")
    if model.serve is not None and (wrong := wrong_command(model.serve)):
        yield Problem((*at, "serve"), wrong)
    if model.server is not None and model.serve is not None:
        yield Problem((*at, "serve"), "a 'server' runs already, 'serve' starts one: give one of them")
    yield from wrong_urls((*at, "server"), model.server)
    yield from wrong_sampling((*at, "sampling"), model.sampling)
    if not model.is_served:
        for key in SERVERS_ONLY - (VLLM_TOO if model.engine == "vllm" else set()):
            if getattr(model.sampling, key) is not None:
                yield Problem((*at, "sampling", key), f"{key!r} has no effect here: it is for a 'server'")
    for key in model.engine_options:
        if key in NO_ENGINE_OPTIONS:
            yield Problem((*at, "engine_options", key), f"{key!r} is not for a recipe: {NO_ENGINE_OPTIONS[key]}")
    if model.in_context is not None and model.sampling.chat_template_kwargs is not None:
        yield Problem(
            (*at, "sampling", "chat_template_kwargs"), "it has no effect here: 'in_context' is read without a template"
        )


def _without_effect(model: AskedModel) -> tuple[list[str], str]:
    """Return the keys that a model which is asked in this way has no use for, and why."""
    in_process = ["batch_size", "device", "dtype", "engine", "engine_options"]
    if model.server is not None:
        return [*in_process, "serve_patience"], "a server decides that itself"
    if model.serve is not None:
        return [*in_process, "api_key_variable"], "the server that 'serve' starts decides that itself"
    served = ["concurrency", "timeout", "retries", "api_key_variable", "one_request", "serve_patience"]
    if model.engine == "vllm":
        return [*served, "batch_size", "device"], "vLLM decides that itself"
    return [*served, "engine_options"], "it is for a 'server', or for the engine vllm"


def absent(model: AskedModel) -> str | None:
    """Return what a model needs here and is not there: its folder, the program that serves it, vLLM; None for nothing.

    A served model may be a file.
    """
    path = Path(model.model)
    if model.in_context is not None and not model.in_context.is_file():
        return f"there is no file {model.in_context}"
    if model.server is not None:
        return None
    if path.is_absolute() and not (path.exists() if model.serve is not None else path.is_dir()):
        return f"there is no {path}" if model.serve is not None else f"{path} is no folder"
    if model.serve is not None:
        program = split_command(model.serve)[0]
        return None if shutil.which(program) else f"there is no program {program!r} here, which `serve` names"
    if model.engine == "vllm" and not is_installed():
        return "vLLM is not installed: pip install vllm, or leave `engine` out"
    return None
