"""The recipes: each method bare and with everything set, then well-known shapes of recipes (``examples``).

``base`` and ``a`` to ``e`` stand for a family's models. dtype is that of the models, where a recipe has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DTYPES = ("float32", "bfloat16")
MODEL_NAMES = ("a", "b", "c", "d", "e")
EXAMPLES = Path(__file__).parent / "examples"
PUBLISHED = Path(__file__).parent / "published"  # in the manner of model cards and guides, with all that they write

REFERENCES = ("model", "base_model", "path")

Yaml = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe and where it runs.

    Attributes:
        name: for the table.
        body: the YAML.
        family: of the models.
        dtypes: of the models.
        reason: why the outputs may differ; said where they do.
        where: parts of the names of the tensors for which the reason holds; without any, all.
        formulas: whether FuseChat's own formulas stand in for mergekit, which has none or others.
    """

    name: str
    body: Yaml
    family: str = "llama"
    dtypes: tuple[str, ...] = DTYPES
    reason: str = ""
    where: tuple[str, ...] = ()
    formulas: bool = False

    @property
    def method(self) -> str:
        return str(self.body["merge_method"])


@dataclass(frozen=True)
class Case:
    """The recipe of a method.

    Attributes:
        counts: of models without the base.
        base: whether there is one.
        needs: parameters of each model without which it doesn't run.
        each: all parameters of each model, set.
        shared: all others.
    """

    counts: tuple[int, ...] = (2, 3, 5)
    base: bool = True
    needs: Yaml | None = None
    each: Yaml | None = None
    shared: Yaml | None = None


WEIGHT = {"weight": [0.6, 0.3, 0.45, 0.2, 0.7]}
UNEQUAL = {"weight": [0.7, 0.4, -0.2, 0.55, 0.35]}
SPARSE = UNEQUAL | {"density": [0.5, 0.3, 0.8, 0.4, 0.6]}
SUMMED = {"normalize": True, "lambda": 0.8}
ARITHMETIC = {"normalize": True, "rescale": True, "lambda": 0.8, "int8_mask": True}
CRUMBS = SPARSE | {"gamma": [0.05, 0.02, 0.1, 0.0, 0.03]}
RANKED = SPARSE | {"epsilon": [0.2, 0.1, 0.15, 0.3, 0.05]}

METHODS = {
    "linear": Case(base=False, needs=WEIGHT, each=UNEQUAL, shared={"normalize": False}),
    "slerp": Case((1,), shared={"t": 0.35}),
    "nuslerp": Case((2,), needs=WEIGHT, each=UNEQUAL, shared={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": Case(needs=WEIGHT, each=UNEQUAL, shared={"normalize_weights": False, "eps": 1e-6}),
    "karcher": Case(base=False, shared={"max_iter": 3, "tol": 1e-4}),
    "passthrough": Case((1,), base=False, each={"scale": [0.7]}),
    "model_stock": Case(shared={"filter_wise": True}),
    "nearswap": Case((1,), shared={"t": 1e-3}),
    "arcee_fusion": Case((1,)),
    "task_arithmetic": Case(needs=WEIGHT, each=UNEQUAL, shared=SUMMED),
    "ties": Case(needs=WEIGHT, each=SPARSE, shared=ARITHMETIC | {"normalize": False}),
    "breadcrumbs": Case(needs=WEIGHT, each=CRUMBS, shared=ARITHMETIC),
    "breadcrumbs_ties": Case(needs=WEIGHT, each=CRUMBS, shared=ARITHMETIC),
    "dare_linear": Case(needs=WEIGHT, each=SPARSE, shared=ARITHMETIC),
    "dare_ties": Case(needs=WEIGHT, each=SPARSE, shared=ARITHMETIC),
    "della": Case(needs=WEIGHT, each=RANKED, shared=ARITHMETIC | {"normalize": False}),
    "della_linear": Case(needs=WEIGHT, each=RANKED, shared=ARITHMETIC),
    "sce": Case(shared={"select_topk": 0.4, "int8_mask": True}),
    "ram": Case(shared={"epsilon": 2e-3}),
    "ramplus_tl": Case(shared={"epsilon": 2e-3, "r": 0.4, "alpha": 0.7}),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def recipes() -> Iterator[Recipe]:
    """Yield all recipes of the comparison."""
    for method, case in METHODS.items():
        bare = "t" in (case.shared or {}) or (not case.shared and not case.each)
        for count in case.counts:
            if not bare:
                yield Recipe(f"{method}, {count}, defaults", _called(method, count, case.base, case.needs))
            name = f"{method}, {count}" if bare else f"{method}, {count}, all set"
            yield Recipe(name, _called(method, count, case.base, case.each, case.shared))
    for method in ("nuslerp", "multislerp"):
        yield Recipe(f"{method}, 2, no base", _called(method, 2, False, WEIGHT))
    yield from in_files(EXAMPLES)
    yield from in_files(PUBLISHED)


def in_files(folder: Path) -> Iterator[Recipe]:
    """Yield the recipes of a folder; the comment at the top of each says on which models."""
    for path in sorted(folder.glob("*.yml")):
        text = path.read_text()
        about = yaml.safe_load(text.split("\n", 1)[0].removeprefix("#"))
        yield Recipe(path.stem, yaml.safe_load(text), **about)


def _called(method: str, count: int, base: bool, each: Yaml | None, shared: Yaml | None = None) -> Yaml:
    models = [
        {"model": model} | ({"parameters": {key: values[number] for key, values in each.items()}} if each else {})
        for number, model in enumerate(MODEL_NAMES[:count])
    ]
    body: Yaml = {"merge_method": method, "models": models}
    if base:
        body["base_model"] = "base"
    if shared:
        body["parameters"] = shared
    return body


def placed(body: Any, home: Path) -> Any:
    """Return the recipe with folders for the models' names."""
    if isinstance(body, list):
        return [placed(one, home) for one in body]
    if isinstance(body, dict):
        return {
            key: str(home / value) if key in REFERENCES and isinstance(value, str) else placed(value, home)
            for key, value in body.items()
        }
    return body
