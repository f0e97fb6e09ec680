"""What is wrong with the teachers of a recipe, and with the trainings that learn from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mergekit_lite.answers.problems import (
    KeyPath,
    Problem,
    clashing_names,
    wrong_sampling,
    wrong_urls,
)
from mergekit_lite.distillation.recipe.schema import Fuse, Pairwise, Recipe, RecipeTeacher
from mergekit_lite.errors import nearest
from mergekit_lite.recipe import RecipeError, parse, to_yaml

FUSE: KeyPath = ("train", "fuse")
SERVED = ("served_model", "api_key_variable", "concurrency", "timeout", "retries")
IN_PROCESS = ("batch_size", "device", "dtype")
WEIGHED = ("linear", "ties")  # merge methods that take a weight of each model: the same by default


def fusing_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what contradicts what in ``teachers``, ``train.fuse`` and ``train.on_policy``."""
    teachers, fuse, on_policy = recipe.teachers, recipe.train.fuse, recipe.train.on_policy
    learn = [name for name, training in (("fuse", fuse), ("on_policy", on_policy)) if training is not None]
    if teachers and not learn:
        yield Problem(("teachers",), "'teachers' has no effect here: 'train' has neither 'fuse' nor 'on_policy'")
    for name in learn if not teachers else ():
        yield Problem(("train", name), f"{name!r} learns from 'teachers', and the recipe has none")
    yield from clashing_names("teachers", [teacher.name for teacher in teachers])
    for number, teacher in enumerate(teachers):
        yield from _teacher(("teachers", number), teacher)
    if on_policy is not None:
        yield from wrong_sampling(("train", "on_policy", "sampling"), on_policy.sampling)
    if fuse is not None:
        yield from _objective(recipe, fuse)
        yield from _combining(recipe, fuse)


def pivots(recipe: Recipe) -> list[RecipeTeacher]:
    """Return the teachers that are the target itself: FuseChat's pivot."""
    return [teacher for teacher in recipe.teachers if teacher.model == recipe.target]


def merge_recipe(pairwise: Pairwise, base: str, students: list[str], dtype: str) -> dict[str, Any]:
    """Return the merge recipe of students that were all trained from ``base``."""
    method = pairwise.merge_method
    parameters = {**({"weight": 1.0} if method in WEIGHED else {}), **pairwise.parameters}
    return {
        "merge_method": method,
        **({"base_model": base} if method != "linear" else {}),
        "models": [{"model": student} for student in students],
        **({"parameters": parameters} if parameters else {}),
        "dtype": dtype,
    }


def _teacher(at: KeyPath, teacher: RecipeTeacher) -> Iterator[Problem]:
    served = teacher.server is not None
    why = "a server decides that itself" if served else "it is for a 'server'"
    for key in IN_PROCESS if served else SERVED:
        if key in teacher.model_fields_set:
            yield Problem((*at, key), f"{key!r} has no effect here: {why}")
    yield from wrong_urls((*at, "server"), teacher.server)


def _objective(recipe: Recipe, fuse: Fuse) -> Iterator[Problem]:
    from mergekit_lite.distillation.objectives.distances import DISTANCES

    distance = DISTANCES.get(fuse.objective)
    if distance is None:
        hint = nearest(fuse.objective, DISTANCES) or f" There are: {', '.join(DISTANCES)}."
        yield Problem((*FUSE, "objective"), f"there is no objective {fuse.objective!r} of distributions.{hint}")
        return
    wrong: list[str] = []
    distance.options(fuse.options, wrong)
    yield from (Problem((*FUSE, "options"), text) for text in wrong)
    if "vocabulary" in fuse.model_fields_set and distance.vocabulary != "map":
        yield Problem((*FUSE, "vocabulary"), f"'vocabulary' has no effect here: {fuse.objective} maps no tokens")
    for number, teacher in enumerate(recipe.teachers if distance.top else ()):
        if not teacher.top:
            text = f"{fuse.objective} needs distributions, and top: 0 keeps none of {teacher.name}: keep 10 to 128"
            yield Problem(("teachers", number, "top"), text)


def _combining(recipe: Recipe, fuse: Fuse) -> Iterator[Problem]:
    own = [teacher.name for teacher in pivots(recipe)]
    others = [teacher for teacher in recipe.teachers if teacher.name not in own]
    chooses = fuse.combine != "sum"
    pivot = f"name the target among the teachers (model: {recipe.target})"
    if len(own) > 1:
        yield Problem(("teachers",), f"{' and '.join(own)} are both the target itself: name it once")
    if chooses and len(recipe.teachers) == 1:
        yield Problem((*FUSE, "combine"), f"{fuse.combine} chooses among teachers, and there is one: {pivot}, or sum")
    if fuse.pairwise is None:
        return
    at: KeyPath = (*FUSE, "pairwise")
    if chooses and len(recipe.teachers) > 1 and not own:
        yield Problem((*FUSE, "combine"), f"with 'pairwise' {fuse.combine} chooses between the pivot and one: {pivot}")
    if len(others) < 2 and recipe.teachers:
        yield Problem(at, "'pairwise' merges a student of each teacher, and there is one: leave it out")
    try:
        parse(to_yaml(merge_recipe(fuse.pairwise, "base", ["one", "two"], fuse.dtype)))
    except RecipeError as error:
        for remark in error.problems:
            yield Problem((*at, "parameters"), remark.text)
