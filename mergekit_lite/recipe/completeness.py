"""What a recipe lacks: models that its methods need, and parameters without a default."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.methods import METHODS, Method
from mergekit_lite.recipe.recipe import Recipe, Slice
from mergekit_lite.recipe.rules import Parameters
from mergekit_lite.yaml_document import Mark, Remark


def miscounted(recipe: Recipe) -> Iterator[Remark]:
    """Yield slices with too few or too many models for their methods, without a base, or with ranges that differ."""
    for part in (part for part in recipe.slices if part.sources):
        where = _in_slice(recipe, part)
        for method, _, at in _methods(recipe):
            number = len(_merged(part, method))
            if method.base == "required" and part.base is None:
                yield Remark(at, f"{method.name} needs a base_model{where}")
            elif not method.counts(number) and not (part.is_base_alone and method.models == (1, None)):
                yield Remark(at, f"{method.name} merges {method.expected}, got {number}{where}")
        if part.uneven:
            yield Remark(part.at, part.uneven)


def lacking(recipe: Recipe) -> Iterator[Remark]:
    """Yield parameters without a default that are given nowhere, and models without the statistics they need."""
    for part in recipe.slices:
        for method, over, at in _methods(recipe):
            yield from _without_statistics(recipe, part, method)
            levels = (over, part.parameters, recipe.parameters)
            required = {key for key, parameter in method.parameters.items() if parameter.required}
            for key in sorted(required - {key for level in levels for key in level}):
                if method.parameters[key].each:
                    yield from _lacking_of_models(recipe, part, method, key, at)
                else:
                    yield Remark(at, f"{method.name} needs the parameter {key!r}{_in_slice(recipe, part)}")


def _lacking_of_models(recipe: Recipe, part: Slice, method: Method, key: str, at: Mark) -> Iterator[Remark]:
    merged = _merged(part, method)
    # A source without a model has been complained about.
    without = [index for index in merged if key not in part.sources[index].parameters and part.sources[index].model]
    if len(without) == len(merged) > 1:
        yield Remark(at, f"{method.name} needs the parameter {key!r} of each model{_in_slice(recipe, part)}")
        return
    for source in (part.sources[index] for index in without):
        # A base that the recipe doesn't list has the place of the list.
        unlisted = ": base_model is one of the models that are merged" if source.at == part.at else ""
        yield Remark(source.at, f"{method.name} needs the parameter {key!r} of {source.model!r}{unlisted}")


def _without_statistics(recipe: Recipe, part: Slice, method: Method) -> Iterator[Remark]:
    for source in (part.sources[index] for index in _merged(part, method) if method.statistics):
        if source.model and source.statistics is None:
            without = f"{method.name} needs the 'statistics' of {source.model!r}{_in_slice(recipe, part)}"
            yield Remark(source.at, f"{without}: a file that {method.gathered_by} writes")


def _methods(recipe: Recipe) -> Iterator[tuple[Method, Parameters, Mark]]:
    """Yield each method of the recipe with the parameters that an override gives it, and its place."""
    yield METHODS[recipe.merge_method], {}, recipe.at
    for override in recipe.overrides:
        yield METHODS[override.merge_method], override.parameters, override.at


def _merged(part: Slice, method: Method) -> list[int]:
    """Return the sources that a method merges: all but the base, where it has another use for that."""
    return [index for index in range(len(part.sources)) if method.merges_base or index != part.base]


def _in_slice(recipe: Recipe, part: Slice) -> str:
    return f" in the slice of line {part.at.line}" if len(recipe.slices) > 1 else ""
