"""The keys of an aggregate: models, and the layers of steps that they take; and what contradicts what in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.asked_model import AskedModel, Count, Name, located, wrong_model
from mergekit_lite.answers.problems import KeyPath, Problem, clashing_names, not_named
from mergekit_lite.answers.validated import validated
from mergekit_lite.yaml_document import text_of

Kind = Literal["generate", "fuse", "rank", "critique", "refine", "verify"]
TOGETHER = ("generate", "fuse")  # kinds that make drafts, several of them in a layer; the others judge drafts, alone
KEYS = {  # beside step and model, by kind
    "generate": ("samples",),
    "fuse": ("samples", "window", "length_control", "prompt"),
    "rank": ("keep", "prompt"),
    "critique": ("reference", "prompt"),
    "refine": ("prompt",),
    "verify": ("prompt",),
}
NEEDS = "models and layers"


class Step(BaseModel):
    """What models do with the conversation and the drafts of the layer before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Kind
    model: tuple[str, ...]  # names of models
    samples: Count = 1  # drafts of each model
    window: Annotated[int, Field(ge=2)] | None = None  # drafts that are fused at once, the last fusion among the next
    length_control: bool = False  # asks for a response no longer than the longest draft
    keep: Count = 1  # of the ranked drafts, from the best
    reference: bool = False  # shows the prompt's reference answer beside the drafts that are criticised
    prompt: Annotated[str, Field(min_length=1)] | None = None  # words of the request, instead of ours


class Aggregate(BaseModel):
    """Models that answer together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[AskedModel, ...]
    layers: tuple[tuple[Step, ...], ...]

    def located(self, folder: Path) -> Aggregate:
        """Return the aggregate with paths resolved against a recipe's folder."""
        return self.model_copy(update={"models": tuple(located(model, folder) for model in self.models)})

    @property
    def systems(self) -> Mapping[str, str | None]:
        """The system prompts of the models, by their names."""
        return {model.name: model.system for model in self.models}

    @property
    def by_name(self) -> Mapping[str, AskedModel]:
        """The models by their names."""
        return {model.name: model for model in self.models}


class AnswerRecipe(Aggregate):
    """The recipe of ``mergekit-lite answer``."""

    name: Name = "aggregate"  # of the answers' source
    seed: int = 0
    samples: Count = 1  # answers to each prompt


def load(path: Path) -> AnswerRecipe:
    """Return the recipe in a file. Paths in it are relative to the file's folder.

    Raises:
        RecipeError: with every problem, its line and column.
        UsageError: the file can't be read.
    """

    def contradictions(recipe: AnswerRecipe) -> Iterator[Problem]:
        return wrong_aggregate((), recipe)

    recipe = validated(AnswerRecipe, text_of(path), str(path), NEEDS, contradictions, complete)
    folder = path.resolve().parent
    return recipe.model_copy(update={"models": recipe.located(folder).models})


def complete(data: dict[str, Any]) -> None:
    """Put lists into an aggregate's data where users write what would be the only thing in them: a step, a model."""
    layers = data.get("layers")
    if not isinstance(layers, list):
        return
    data["layers"] = [[layer] if isinstance(layer, dict) else layer for layer in layers]
    for layer in data["layers"]:
        for step in layer if isinstance(layer, list) else ():
            if isinstance(step, dict) and isinstance(step.get("model"), str):
                step["model"] = [step["model"]]


def wrong_aggregate(at: KeyPath, aggregate: Aggregate, drafts: int = 0) -> Iterator[Problem]:
    """Yield what contradicts what in an aggregate at a key, where there are ``drafts`` before its first layer."""
    names = [model.name for model in aggregate.models]
    yield from (problem._replace(at=(*at, *problem.at)) for problem in clashing_names("models", names))
    for number, model in enumerate(aggregate.models):
        place = (*at, "models", number)
        if not model.model:
            yield Problem(place, f"the model {model.name!r} has no 'model': a folder, or its name")
        yield from wrong_model(place, model)
    asked = {name for layer in aggregate.layers for step in layer for name in step.model}
    for number, name in enumerate(names):
        if name not in asked:
            yield Problem((*at, "models", number, "name"), f"no step asks the model {name!r}: take it out, or name it")
    for number, layer in enumerate(aggregate.layers):
        place = (*at, "layers", number)
        for at_step, step in enumerate(layer):
            yield from _wrong_step((*place, at_step), step, names)
        if not layer:
            yield Problem(place, "a layer without steps")
            return
        yield from _wrong_layer(place, layer, drafts)
        drafts = drafts_after(layer, drafts)
    if not aggregate.layers:
        yield Problem((*at, "layers"), "'layers' is an empty list: begin with a 'generate'")
    if drafts > 1:
        text = f"the last layer leaves {drafts} drafts, an answer is one: end with a 'fuse', or a 'rank' that keeps 1"
        yield Problem((*at, "layers", len(aggregate.layers) - 1), text)


def drafts_after(layer: tuple[Step, ...], drafts: int) -> int:
    """Return how many drafts a layer leaves at most, where there are ``drafts`` before it."""
    first = layer[0]
    if first.step in TOGETHER:
        return sum(step.samples * len(step.model) for step in layer)
    return min(first.keep, drafts) if first.step == "rank" else drafts


def _wrong_step(at: KeyPath, step: Step, names: list[str]) -> Iterator[Problem]:
    if not step.model:
        yield Problem((*at, "model"), "'model' is an empty list: name at least one of the models")
    for place, name in enumerate(step.model):
        if name not in names:
            yield Problem((*at, "model", place), not_named(name, names, "model"))
        if name in step.model[:place]:
            yield Problem((*at, "model", place), f"{name!r} is listed twice: for two drafts say samples: 2")
    for key in sorted(step.model_fields_set - {"step", "model", *KEYS[step.step]}):
        yield Problem((*at, key), f"{key!r} has no effect on a step {step.step!r}")
    if step.step not in TOGETHER and len(step.model) > 1:
        yield Problem((*at, "model"), f"a step {step.step!r} asks one model, not {len(step.model)}")


def _wrong_layer(at: KeyPath, layer: tuple[Step, ...], drafts: int) -> Iterator[Problem]:
    for number, step in enumerate(layer):
        if step.step not in TOGETHER and len(layer) > 1:
            yield Problem((*at, number), f"a step {step.step!r} is a layer by itself: what judges drafts makes none")
        if step.step != "generate" and not drafts:
            yield Problem((*at, number), f"there is no draft yet to {step.step}: begin with a 'generate'")
    first = layer[0]
    if first.step == "rank" and drafts == 1:
        yield Problem((*at, 0), "there is one draft before it: nothing to rank")
    elif first.step == "rank" and first.keep > drafts > 0:
        yield Problem((*at, 0, "keep"), f"{first.keep} of {drafts} drafts can't be kept")
