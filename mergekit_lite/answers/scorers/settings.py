"""What a scorer is made of, as recipes and commands give it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Kind = Literal["reward", "maths", "code", "judge", "log_ratio", "exact", "function"]


class ScorerSettings(BaseModel):
    """One scorer. ``options`` are those of its kind, the class ``Options`` in the kind's module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    kind: Kind
    model: str | None = None  # reward model, judge, or the function as module:function
    strong: str | None = None  # log_ratio
    weak: str | None = None
    server: str | None = None  # of a judge
    api_key_variable: str = "OPENAI_API_KEY"  # the environment variable with the server's key
    concurrency: Positive = 32  # open requests
    batch_size: Positive = 8  # answers that a model reads, or programs that run, at once
    allow_code: bool = False  # run model-written code, fenced in
    options: dict[str, Any] = {}  # of this kind


class Strict(BaseModel):
    """Options of one kind: unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
