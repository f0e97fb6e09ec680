"""The recipe of ``extrapolate`` as a manifest holds it, read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_lite.errors import MergekitLiteError, listing
from mergekit_lite.recipe import Recipe, Setting

PREFIX = "regex:"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Model(_Part):
    model: str


class _Rule(_Part):
    filter: str = ""
    value: Annotated[float, Field(allow_inf_nan=False)]


class _Parameters(_Part):
    alpha: Annotated[float, Field(allow_inf_nan=False)] | Annotated[list[_Rule], Field(min_length=1)]


class _Pair(_Part):
    merge_method: Literal["expo"]
    base_model: str
    models: Annotated[list[_Model], Field(min_length=1, max_length=1)]
    parameters: _Parameters
    include: list[str] = []
    exclude: list[str] = []
    out_dtype: str | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0
    new_rows: Literal["refuse", "copy"] = "refuse"


def pair_recipe(data: Mapping[str, Any], *, seed: int, shard_size: int | None) -> Recipe:
    """The recipe whose ``as_data`` is given.

    Raises:
        MergekitLiteError: it is none; every problem is named. UsageError where a pattern or dtype is wrong.
    """
    try:
        pair = _Pair.model_validate(data)
    except ValidationError as wrong:
        told = wrong.errors(include_url=False, include_input=False)
        problems = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in told]
        raise MergekitLiteError(listing("the recipe is not one of this version", problems)) from None
    return Recipe(
        merge_method=pair.merge_method,
        models=(pair.models[0].model, pair.base_model),
        variants=({"alpha": _setting(pair.parameters.alpha)},),
        include=tuple(pair.include),
        exclude=tuple(pair.exclude),
        out_dtype=pair.out_dtype,
        rounding=pair.rounding,
        seed=seed,
        new_rows=pair.new_rows,
        shard_size=shard_size,
    )


def _setting(alpha: float | list[_Rule]) -> Setting:
    if not isinstance(alpha, list):
        return Setting(alpha)
    return Setting(alpha[-1].value, tuple((rule.filter.removeprefix(PREFIX), rule.value) for rule in alpha[:-1]))
