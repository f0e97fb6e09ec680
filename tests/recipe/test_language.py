"""Right recipes, and what becomes of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.errors import UsageError
from mergekit_lite.recipe import Recipe, Slice, Source, parse, text_of
from mergekit_lite.recipe.rules import Filter, Rule


def read(text: str) -> Recipe:
    return parse(dedent(text))


def one(value: Any) -> tuple[Rule, ...]:
    return (Rule((value,)),)


def test_everything() -> None:
    recipe = read("""\
        merge_method: dare_ties
        base_model: base
        slices:
          - sources:
              - {model: a, layer_range: [0, 8], parameters: {weight: 0.5, density: [0.1, 0.9]}}
              - {model: base, layer_range: [0, 8]}
            parameters: {lambda: {filter: mlp, value: 2}}
          - sources:
              - {model: b@main+lora, layer_range: [4, 8]}
            base_model: other
        parameters:
          weight: [{filter: "regex:q|k", layers: [0, 4], value: 1e-1}, {filter: "*", value: 1}]
          normalize: 1.0
          int8_mask: true
          rescale: density
        dtype: torch.bfloat16
        out_dtype: float32
        tokenizer_source: base
        chat_template: chatml
        exclude: norm
        seed: 7
        rounding: stochastic
    """)
    first = Slice(
        (
            Source("a", (0, 8), {"weight": one(0.5), "density": (Rule((0.1, 0.9)),)}),
            Source("base", (0, 8)),
        ),
        1,
        {"lambda": (Rule((2.0,), Filter("mlp")),)},
    )
    second = Slice((Source("b@main+lora", (4, 8)), Source("other", (4, 8))), 1)
    assert recipe == Recipe(
        "dare_ties",
        (first, second),
        "base",
        {
            "weight": (Rule((0.1,), Filter("regex:q|k", (0, 4))), Rule((1.0,))),
            "normalize": one(True),
            "rescale": one("density"),
        },
        exclude=(Filter("norm"),),
        dtype="bfloat16",
        out_dtype="float32",
        rounding="stochastic",
        seed=7,
        chat_template="chatml",
        tokenizer="base",
    )
    assert [str(note) for note in recipe.notes] == ["14:3: int8_mask has no effect and is ignored"]
    assert recipe.models == ("a", "base", "b@main+lora", "other")
    assert recipe.config_source == "base"
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("org/name", "org/name"),
        ("org/name@rev+org/lora@2", "org/name@rev+org/lora@2"),
        ("{model: org/name}", "org/name"),
        ("{model: {path: org/name, revision: v1}}", "org/name@v1"),
        ("{model: {path: org/name, revision: 12e4567}}", "org/name@12e4567"),
        (
            "{model: {path: org/name, revision: 2024-01-01}, lora: {path: x, revision: 0123}}",
            "org/name@2024-01-01+x@0123",
        ),
        ("{model: org/name, lora: x}", "org/name+x"),
        ("{model: {path: org/name, revision: null}, lora: null}", "org/name"),
    ],
)
def test_references(written: str, expected: str) -> None:
    recipe = read(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n  - model: {written}\n")
    assert recipe.models == (expected,)
    assert recipe.config_source == expected
    based = read(f"merge_method: sce\nbase_model: {written}\nmodels: [{{model: a}}]\n")
    assert (based.base_model, based.models, based.slices[0].base) == (expected, ("a", expected), 1)


def test_the_base_joins_the_models() -> None:
    """As in mergekit: at the end, unless it is listed; in slices only where the method has a use for it."""
    listed = read("merge_method: sce\nbase_model: m\nmodels: [{model: m}, {model: a}]\n")
    assert [s.model for s in listed.slices[0].sources] == ["m", "a"]
    assert listed.slices[0].base == 0
    merged = read("merge_method: linear\nbase_model: m\nmodels: [{model: a}]\nparameters: {weight: 1}\n")
    assert [s.model for s in merged.slices[0].sources] == ["a", "m"]
    beside = read("merge_method: passthrough\nbase_model: m\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n")
    assert beside.slices[0] == Slice((Source("a", (0, 2)),))
    assert (beside.config_source, beside.models) == ("m", ("a", "m"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("0.5", (0.5,)),
        ("'1e-5'", (1e-5,)),
        ("1e-5", (1e-5,)),
        ("1", (1.0,)),
        ("[0, 1e-1, '3']", (0.0, 0.1, 3.0)),
        ("[0.5]", (0.5,)),
        ("{value: [1, 2]}", (1.0, 2.0)),
    ],
)
def test_numbers(written: str, expected: tuple[float, ...]) -> None:
    recipe = read(f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{weight: {written}}}\n")
    [rule] = recipe.parameters["weight"]
    assert rule.values == expected
    assert all(type(value) is float for value in rule.values)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("true", True),
        ("1", True),
        ("0.0", False),
        ("'false'", False),
        ("no", False),
        ("l1", "l1"),
        ("density", "density"),
    ],
)
def test_truth(written: str, expected: object) -> None:
    recipe = read(
        f"merge_method: ties\nbase_model: b\nmodels: [{{model: a}}]\nparameters: {{weight: 1, rescale: {written}}}"
    )
    assert recipe.parameters["rescale"] == one(expected)


def test_empty_keys_are_as_absent() -> None:
    """Published recipes have them."""
    text = "merge_method: sce\nbase_model: m\nparameters:\ndtype:\nmodels:\n  - model: a\n    parameters:\nslices:\n"
    assert read(text) == read("merge_method: sce\nbase_model: m\nmodels: [{model: a}]")


@pytest.mark.parametrize("source", ["tokenizer_source: base", "tokenizer_source: m", "tokenizer: {source: base}"])
def test_the_tokenizer_of_the_base(source: str) -> None:
    assert read(f"merge_method: sce\nbase_model: m\nmodels: [{{model: a}}]\n{source}").config_source == "m"
    without_base = f"merge_method: linear\nmodels: [{{model: m, parameters: {{weight: 1}}}}]\n{source}"
    assert read(without_base).config_source == "m"


def test_notes() -> None:
    recipe = read("""\
        merge_method: linear
        models:
          - model: a
            parameters:
              int8_mask: 1.0
              weight: [{value: 1}, {filter: mlp, value: 2}]
        random_seed: 3
    """)
    assert recipe.seed == 3
    assert [str(note) for note in recipe.notes] == [
        "5:7: int8_mask has no effect and is ignored",
        "6:28: this entry of 'weight' is never reached: one above matches everything",
        "7:14: random_seed is read as seed; mergekit ignores it",
    ]


def test_template_written_out() -> None:
    recipe = read("""\
        merge_method: linear
        models: [{model: a, parameters: {weight: 1}}]
        chat_template: |
          {% for message in messages %}{{ message.content }}{% endfor %}
    """)
    assert recipe.chat_template is not None and recipe.chat_template.startswith("{% for")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    with pytest.raises(UsageError, match=r"Can't read the recipe .*recipe\.yml"):
        text_of(path)
    path.write_bytes(b"\xef\xbb\xbfmerge_method: sce\nbase_model: m\nmodels: [{model: a}]\n")
    assert parse(text_of(path)).merge_method == "sce"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="Can't read"):
        text_of(path)


NUMBERS = st.floats(-10, 10) | st.integers(-10, 10)
RANGES = st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda span: [span[0], span[0] + span[1]])


def settings(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    values = numbers | st.lists(numbers, min_size=1, max_size=4)
    optional = {"filter": st.sampled_from(["*", "mlp", "regex:q|k"]), "layers": RANGES}
    entries = st.fixed_dictionaries({"value": values}, optional=optional)
    return values | st.lists(entries, min_size=1, max_size=3) | entries


SHARES = st.floats(0, 1) | st.integers(0, 1)
WEIGHTS = st.fixed_dictionaries({}, optional={"weight": settings(NUMBERS), "density": settings(SHARES)})


def rules_of(setting: Any) -> tuple[Rule, ...]:
    """The reading of a setting, said once more."""
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        entries = [
            (e["value"], Filter(e.get("filter", "*"), tuple(e["layers"]) if "layers" in e else None)) for e in setting
        ]
    else:
        entries = [(setting, Filter())]
    return tuple(Rule(tuple(map(float, v if isinstance(v, list) else [v])), which) for v, which in entries)


@given(st.lists(WEIGHTS, min_size=1, max_size=3), WEIGHTS, st.booleans())
def test_round_trip(models: list[dict[str, Any]], shared: dict[str, Any], flow: bool) -> None:
    names = [f"m{n}" for n in range(len(models))]
    tree = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": own} for name, own in zip(names, models, strict=True)],
        "parameters": {"weight": 1.0, **shared},
    }
    recipe = parse(yaml.safe_dump(tree, default_flow_style=flow))
    assert [dict(source.parameters) for source in recipe.slices[0].sources[:-1]] == [
        {key: rules_of(setting) for key, setting in own.items()} for own in models
    ]
    assert recipe.parameters == {key: rules_of(setting) for key, setting in tree["parameters"].items()}  # type: ignore[attr-defined]
