"""YAML as a tree with places."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.yaml_document import SCIENTIFIC, Fields, Items, Node, RecipeError, Scalar, dump, read

# PyYAML's writer, not its reader, loses line separators such as U+0085.
TEXTS = st.text(st.characters(exclude_categories=("C", "Z")), max_size=8)


def trees(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | texts
    inner = st.recursive(scalars, lambda i: st.lists(i, max_size=4) | st.dictionaries(texts, i, max_size=4))
    return inner.filter(lambda tree: tree is not None)


def plain(node: Node) -> Any:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {key.text: plain(value) for key, value in node.entries}


@given(trees(TEXTS.filter(lambda text: not SCIENTIFIC.fullmatch(text))), st.booleans())
def test_what_pyyaml_writes_is_read(tree: Any, flow: bool) -> None:
    assert plain(read(yaml.safe_dump(tree, default_flow_style=flow, allow_unicode=True), "x")) == tree


@given(trees(TEXTS | st.from_regex(SCIENTIFIC, fullmatch=True)))
def test_round_trip(tree: Any) -> None:
    assert plain(read(dump(tree), "x")) == tree


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("-1E5", -1e5),
        (".5e+3", 500.0),
        ("1.e2", 100.0),
        ("'1e-5'", "1e-5"),
        ("1e", "1e"),
        ("0x10", 16),
        ("1_000", 1000),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("2024-01-31", "2024-01-31"),
        (".inf", float("inf")),
        ("=", "="),
        ("!!str 12", "12"),
        ("org/name@1e5", "org/name@1e5"),
    ],
)
def test_scalars(text: str, expected: object) -> None:
    assert plain(read(f"a: {text}", "x")) == {"a": expected}


def test_places() -> None:
    tree = read("a: 1\nb:\n  - c: x\n    'd' :  [y, z]\n", "x")
    assert isinstance(tree, Fields)
    (a, one), (b, things) = tree.entries
    assert [str(node.at) for node in (tree, a, one, b, things)] == ["1:1", "1:1", "1:4", "2:1", "3:3"]
    assert isinstance(things, Items)
    [thing] = things.items
    assert isinstance(thing, Fields)
    assert [str(node.at) for pair in thing.entries for node in pair] == ["3:5", "3:8", "4:5", "4:12"]


def test_aliases_and_merges() -> None:
    text = """\
        first: &a {x: 1, y: 2}
        second: &b {<<: *a, y: 3}
        third: {z: 0, <<: [*b, *a], x: 9}
        again: [*a, *a]
    """
    expected = yaml.safe_load(text)
    assert plain(read(text, "x")) == expected
    assert expected["third"] == {"x": 9, "y": 3, "z": 0}


def test_a_key_is_text_whatever_yaml_makes_of_it() -> None:
    assert plain(read("on: 1\n2: 3\n~: 4\n", "x")) == {"on": 1, "2": 3, "~": 4}


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text, "x")
    except RecipeError as error:
        assert error.problems


@given(st.text("ab:-[]{}&*!<>|'\"#,? \n\t1", max_size=80))
def test_anything_like_yaml_is_read_or_refused(text: str) -> None:
    test_any_text_is_read_or_refused.hypothesis.inner_test(text)
