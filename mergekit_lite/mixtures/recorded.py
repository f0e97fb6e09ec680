"""Plans of mixtures that were remade, made of what their manifests record: split, fewer experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.errors import MergekitLiteError, listing
from mergekit_lite.layout import OutputPath
from mergekit_lite.mixtures import splitting
from mergekit_lite.mixtures.thinning import fewer
from mergekit_lite.planning import Plan

METHODS = (splitting.METHOD, fewer.PRUNE, fewer.MERGE)
LayerNumber = Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,5})$")]

GroupsText = Annotated[str, Field(pattern=r"^\d{1,6}([+ ]\d{1,6})*$")]
WeightsText = Annotated[str, Field(pattern=r"^[0-9.e+-]{1,30}( [0-9.e+-]{1,30})*$")]


class _Recorded(BaseModel):
    """A recipe in a manifest, which may be damaged or forged: no value is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    merge_method: str
    model: str


class _Split(_Recorded):
    experts: list[int | Literal["shared"]]
    weights: list[float] = []


class _Fewer(_Recorded):
    chosen: str = ""
    experts: dict[LayerNumber, GroupsText]
    weights: dict[LayerNumber, WeightsText] = {}


def plan_recorded(
    recipe: Mapping[str, Any],
    output: OutputPath,
    opened: Mapping[str, Checkpoint],
    shard_size: int | None,
    copy_code: bool,
) -> Plan:
    """Make the plan of an output again, from its manifest's recipe and its opened input.

    Raises:
        MergekitLiteError: the recipe is not one, or the input doesn't fit it any more.
    """
    try:
        known = (_Split if recipe["merge_method"] == splitting.METHOD else _Fewer).model_validate(dict(recipe))
    except ValidationError as wrong:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in wrong.errors()]
        raise MergekitLiteError(listing("the manifest's recipe is none", problems)) from wrong
    if known.model not in opened:
        raise MergekitLiteError(f"the recipe names {known.model}, which is not among the inputs")
    if isinstance(known, _Split):
        return splitting.plan_split(
            known.model, known.experts, output, weights=known.weights, shard_size=shard_size, opened=opened
        )
    assert isinstance(known, _Fewer)
    groups = {int(layer): fewer.groups_of_text(text) for layer, text in known.experts.items()}
    try:
        weights = {int(layer): [*map(float, text.split())] for layer, text in known.weights.items()}
    except ValueError as wrong:
        raise MergekitLiteError(f"the manifest's recipe is none: weights: {wrong}") from wrong
    return fewer.plan_fewer(
        known.model,
        groups,
        output,
        weights=weights or None,
        chosen=known.chosen,
        shard_size=shard_size,
        copy_code=copy_code,
        opened=opened,
    )
