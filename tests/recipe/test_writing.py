"""Recipes as plain data: what is written is read back as an equal recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.errors import UsageError
from mergekit_lite.recipe import Override, Recipe, Slice, Source, as_data, parse, text_of, to_yaml
from mergekit_lite.recipe.documents import parse_documents
from mergekit_lite.recipe.rules import Filter, Rule, Rules
from tests.shipped import FILES

TEXTS = st.sampled_from(["*", "mlp", "0x1", "null", "2024-01-01", "regex:^q|(k+)$", "a: b", "é"])
RANGES = st.tuples(st.integers(0, 5), st.integers(6, 9))
FILTERS = st.builds(Filter, TEXTS, st.none() | RANGES)
NUMBERS = st.floats(-1e300, 1e300) | st.sampled_from([1e-5, 0.1, 3.0])


def rules(values: st.SearchStrategy[float]) -> st.SearchStrategy[Rules]:
    """Rules for some tensors, then one for all others."""
    gradient = st.lists(values, min_size=1, max_size=1).map(tuple)
    some = st.lists(st.builds(Rule, gradient, FILTERS.filter(lambda each: not each.matches_all)), max_size=1)
    return st.builds(lambda above, last: (*above, Rule(last)), some, gradient)


def parameters(*names: str) -> st.SearchStrategy[dict[str, Rules]]:
    """Some of these parameters."""
    return st.fixed_dictionaries({}, optional={name: rules(st.floats(0, 1)) for name in names})


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of DARE over a base, of whole models or of slices."""
    levels = parameters("density", "lambda")
    base = draw(st.sampled_from(["base", "org/base@1234567"]))
    ranges = draw(st.none() | st.lists(RANGES, min_size=1, max_size=2))
    slices = tuple(
        Slice(
            tuple(Source(name, layers, draw(parameters("weight")) if name == "a" else {}) for name in ("a", "7", base)),
            2,
            draw(levels) if layers else {},
        )
        for layers in ranges or [None]
    )
    filters = st.lists(FILTERS, max_size=1).map(tuple)
    overrides = st.builds(Override, FILTERS, st.sampled_from(["ties", "dare_linear"]), levels)
    return Recipe(
        "dare_ties",
        slices,
        base,
        {"weight": draw(rules(NUMBERS))} | draw(levels),
        overrides=draw(st.lists(overrides, max_size=1).map(tuple)),
        include=draw(filters),
        exclude=draw(filters),
        dtype=draw(st.sampled_from([None, "float16"])),
        out_dtype=draw(st.sampled_from([None, "float64"])),
        rounding=draw(st.sampled_from(["nearest", "stochastic"])),
        seed=draw(st.integers(0, 2**70)),
        new_rows=draw(st.sampled_from(["refuse", "copy"])),
        chat_template=draw(st.sampled_from([None, "auto", "chatml", "{% for a in b %}\n {{ a }}{% endfor %}"])),
        tokenizer=draw(st.sampled_from([None, "base", "a"])),
    )


@given(recipes())
def test_what_is_written_is_read_back(recipe: Recipe) -> None:
    assert parse(to_yaml(as_data(recipe))) == recipe


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_shipped_recipes_are_read_back(file: Path) -> None:
    for document in parse_documents(text_of(file)):
        assert parse(to_yaml(as_data(document.recipe))) == document.recipe


def test_each_of_several_outputs_is_a_recipe() -> None:
    sources = (Source("aligned"), Source("sft"))
    norm = Rule((0.0,), Filter("norm"))
    outputs = tuple({"alpha": (norm, Rule((alpha,)))} for alpha in (0.1, 0.3))
    recipe = Recipe("expo", (Slice(sources, 1),), "sft", {"alpha": (Rule((9.0,)),)}, outputs=outputs)
    first, second = recipe.for_outputs
    assert (first.parameters["alpha"], second.parameters["alpha"]) == (outputs[0]["alpha"], outputs[1]["alpha"])
    assert as_data(second) == {
        "merge_method": "expo",
        "base_model": "sft",
        "models": [{"model": "aligned"}],
        "parameters": {"alpha": [{"filter": "norm", "value": 0.0}, {"value": 0.3}]},
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rounding", "stohastic", "rounding expects one of nearest, stochastic, got 'stohastic'. Did you mean 'stoch"),
        ("new_rows", "copi", "new_rows expects one of refuse, copy, got 'copi'. Did you mean 'copy'?"),
        ("dtype", "int8", "dtype expects one of float64, float32, bfloat16, float16, got 'int8'"),
        ("out_dtype", "bf16", "out_dtype expects one of"),
        ("seed", -1, "seed expects a whole number from 0 on, got -1"),
        ("seed", True, "seed expects a whole number"),
        ("chat_template", "chatlm", "Did you mean 'chatml'?"),
        ("tokenizer", "c", "tokenizer expects one of base, union, a, b, got 'c'"),
        ("exclude", (Filter("regex:("),), "'(' is not a regular expression"),
        ("include", (Filter("*", (3, 3)),), "layers expect two whole numbers"),
        ("parameters", {"weight": (Rule(()),)}, "weight has no value"),
        ("slices", (Slice((Source("a"),), 1),), "base is 1"),
    ],
)
def test_every_field_is_held_to_its_values(field: str, value: object, message: str) -> None:
    fields: dict[str, object] = {"merge_method": "linear", "slices": (Slice((Source("a"), Source("b"))),)}
    with pytest.raises(UsageError) as raised:
        Recipe(**fields | {field: value})  # type: ignore[arg-type]
    assert message in str(raised.value)
    with pytest.raises(UsageError, match="The recipe is wrong") as raised:
        Recipe(**fields | {"dtype": "x", "seed": 0.5} | {field: value})  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_data_that_yaml_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="texts, numbers, lists and mappings, got"):
        to_yaml({"models": [object()]})
