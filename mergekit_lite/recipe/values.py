"""From nodes to values: keys, texts, filters, parameters, references, dtypes, seed, tokenizer, template.

What is wrong is added to a list of problems, so that all of it can be told at once; what is returned then only serves
to read on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from mergekit_lite import dtypes
from mergekit_lite.errors import UsageError, nearest
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.recipe.recipe import BASE, KNOWN_TEMPLATES, is_template
from mergekit_lite.recipe.rules import Filter, Rule, Rules
from mergekit_lite.yaml_document import Fields, Items, Node, Remark, Scalar, Value, describe

Remarks = list[Remark]
RULE_KEYS = ("filter", "layers", "value")
ARCHITECTURE = {
    "override_architecture": "override_architecture is not supported: names come from the model's files, no table of "
    "architectures is used"
}
OLD_NAMES = {"pattern": "unknown key 'pattern' in a filter: it is called 'filter'"}


def fields(
    node: Node, what: str, known: Iterable[str], problems: Remarks, told: Mapping[str, str] | None = None
) -> dict[str, Node]:
    """The values of a mapping by key, without those that are empty.

    Args:
        node: should be a mapping.
        what: what it is, for messages: ``a model``.
        known: the keys it may have.
        problems: is added to.
        told: keys it may not have, with what to say about them.
    """
    known = tuple(known)
    if not isinstance(node, Fields):
        problems.append(Remark(node.at, f"expected {what} (a mapping of {', '.join(known)}), got {describe(node)}"))
        return {}
    found = {}
    for key, value in node.entries:
        if key.text not in known:
            text = f"unknown key {key.text!r} in {what}."
            hint = nearest(key.text, known) or f" Known: {', '.join(known)}."
            problems.append(Remark(key.at, (told or {}).get(key.text) or text + hint))
        elif not (isinstance(value, Scalar) and value.value is None):
            found[key.text] = value
    return found


def items(node: Node | None, what: str, problems: Remarks) -> tuple[Node, ...]:
    """The entries of a list that may not be empty."""
    if node is None:
        return ()
    if not isinstance(node, Items) or not node.items:
        problems.append(Remark(node.at, f"expected a list of {what}, got {describe(node)}"))
        return ()
    return node.items


def text(node: Node, name: str, problems: Remarks) -> str:
    """A text that is not empty; the empty one where there is none."""
    if isinstance(node, Scalar) and isinstance(node.value, str) and node.value:
        return node.value
    quoted = isinstance(node, Scalar) and node.value not in (None, "")
    remedy = f": put it in quotes, '{node.text}', if it is one" if isinstance(node, Scalar) and quoted else ""
    problems.append(Remark(node.at, f"{name!r} expects text, got {describe(node)}{remedy}"))
    return ""


def choice(node: Node, name: str, known: Iterable[str], problems: Remarks) -> str | None:
    """One of the known texts."""
    known = tuple(known)
    if isinstance(node, Scalar) and node.value in known:
        return str(node.value)
    hint = nearest(node.text, known) if isinstance(node, Scalar) else ""
    problems.append(Remark(node.at, f"{name!r} expects one of {', '.join(known)}, got {describe(node)}.{hint}"))
    return None


def layer_range(node: Node, name: str, problems: Remarks) -> tuple[int, int] | None:
    """``[first, end]``, the end not included."""
    ends = [item.value for item in node.items if isinstance(item, Scalar)] if isinstance(node, Items) else []
    numbers = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
    if not isinstance(node, Items) or len(numbers) != 2 or len(node.items) != 2:
        got = describe(node) if not isinstance(node, Items) else f"[{', '.join(_brief(item) for item in node.items)}]"
        problems.append(Remark(node.at, f"{name!r} expects two whole numbers, [first, end], got {got}"))
    elif numbers[0] < 0:
        problems.append(Remark(node.at, f"{name!r} starts at {numbers[0]}: layers are counted from 0"))
    elif numbers[0] >= numbers[1]:
        empty = f"{name!r} [{numbers[0]}, {numbers[1]}] is empty: the end is not included"
        problems.append(Remark(node.at, empty))
    else:
        return numbers[0], numbers[1]
    return None


def _brief(node: Node) -> str:
    return node.text if isinstance(node, Scalar) else describe(node)


def filter_of(entry: Mapping[str, Node], problems: Remarks) -> Filter:
    """The filter made of the keys ``filter`` and ``layers`` of an entry."""
    name, layers = entry.get("filter"), entry.get("layers")
    at = next((node.at for node in (name, layers) if node is not None), Filter().at)
    made = Filter(
        (text(name, "filter", problems) or "*") if name is not None else "*",
        layer_range(layers, "layers", problems) if layers is not None else None,
        at,
    )
    try:
        made.pattern  # noqa: B018  (compiled here so that its error is told with its place)
    except re.error as error:
        problems.append(Remark(at, f"{made.text!r} is no regular expression: {error}"))
        return Filter(at=at)
    return made


def rules(node: Node, name: str, parameter: Parameter, problems: Remarks, notes: Remarks) -> Rules:
    """The rules of one parameter."""
    if isinstance(node, Scalar):
        return _rule(node, Filter(), name, parameter, problems)
    if isinstance(node, Fields):
        return _filtered((node,), name, parameter, problems, notes)
    if not node.items:
        problems.append(Remark(node.at, f"{name!r} is an empty list: a gradient has at least one value"))
        return ()
    odd = [a for a, b in pairwise(node.items) if isinstance(a, Fields) != isinstance(b, Fields)]
    if odd:
        mixed = f"{name!r} mixes values and filters: a list is a gradient, or its entries have 'filter' and 'value'"
        problems.append(Remark(node.at, mixed))
        return ()
    if isinstance(node.items[0], Fields):
        return _filtered(node.items, name, parameter, problems, notes)
    return _rule(node, Filter(), name, parameter, problems)


def _filtered(entries: Iterable[Node], name: str, parameter: Parameter, problems: Remarks, notes: Remarks) -> Rules:
    found: list[Rule] = []
    for entry in entries:
        parts = fields(entry, f"a filter of {name!r}", RULE_KEYS, problems, OLD_NAMES)
        if "value" not in parts:
            problems.append(Remark(entry.at, f"an entry of {name!r} has no 'value'"))
        elif isinstance(parts["value"], Fields):
            problems.append(Remark(parts["value"].at, f"{name!r} expects {parameter.expected}, got a mapping"))
        else:
            if found and found[-1].filter.matches_all:
                notes.append(Remark(entry.at, f"this entry of {name!r} is never reached: one above matches everything"))
            found += _rule(parts["value"], filter_of(parts, problems), name, parameter, problems)
    return tuple(found)


def _rule(node: Node, which: Filter, name: str, parameter: Parameter, problems: Remarks) -> Rules:
    """The rule of a scalar or a gradient; none where something is wrong with it."""
    if isinstance(node, Items) and not node.items:
        problems.append(Remark(node.at, f"{name!r} is an empty list: a gradient has at least one value"))
        return ()
    found = []
    for part in node.items if isinstance(node, Items) else (node,):
        value = _converted(part.value, parameter) if isinstance(part, Scalar) else None
        if value is None:
            problems.append(Remark(part.at, f"{name!r} expects {parameter.expected}, got {describe(part)}"))
            continue
        found.append(value)
        if objection := parameter.objection(value):
            problems.append(Remark(part.at, f"{name!r}: {objection}"))
    if len({type(value) for value in found}) > 1:
        problems.append(Remark(node.at, f"{name!r} is a gradient of mixed kinds: numbers, truth values or texts alone"))
        return ()
    return (Rule(tuple(found), which, node.at),) if found else ()


def _converted(value: Value | None, parameter: Parameter) -> Value | None:
    """The value as one of the parameter's types, or None. 0 and 1 are truth values, as in mergekit-evolve's recipes."""
    types = parameter.types
    if isinstance(value, str):
        if str in types and (not parameter.choices or value in parameter.choices):
            return value
        written, value = value, _number(value)
        if value is None:
            return {"true": True, "false": False}.get(written.lower()) if bool in types else None
    if value is None or isinstance(value, bool):
        return value if bool in types else None
    if not math.isfinite(value):
        return None
    if float in types:
        return float(value)
    if int in types:
        return int(value) if value == int(value) else None
    return bool(value) if bool in types and value in (0, 1) else None


def _number(written: str) -> float | None:
    try:
        return float(written)
    except ValueError:
        return None


def reference(node: Node, name: str, problems: Remarks) -> str:
    """A reference as text, ``model@revision+lora@revision``; empty where it is wrong."""
    if not isinstance(node, Fields):
        return text(node, name, problems)
    parts = fields(node, "a model reference", ("model", "lora"), problems, ARCHITECTURE)
    if "model" not in parts:
        problems.append(Remark(node.at, f"{name!r} has no 'model'"))
        return ""
    model = _located(parts["model"], "model", problems)
    lora = _located(parts["lora"], "lora", problems) if "lora" in parts else ""
    return f"{model}+{lora}" if lora else model


def _located(node: Node, name: str, problems: Remarks) -> str:
    """``path@revision``, from text or from ``{path, revision}``."""
    if not isinstance(node, Fields):
        return text(node, name, problems)
    parts = fields(node, "a model reference", ("path", "revision"), problems)
    if "path" not in parts:
        problems.append(Remark(node.at, f"{name!r} has no 'path'"))
        return ""
    path, revision = text(parts["path"], "path", problems), parts.get("revision")
    if revision is None:
        return path
    # A commit such as 1234567 or 12e4567 is text to the user, whatever YAML makes of it.
    return f"{path}@{revision.text if isinstance(revision, Scalar) else text(revision, 'revision', problems)}"


def dtype(node: Node | None, name: str, problems: Remarks) -> str | None:
    """A float dtype by its name in torch."""
    if node is None:
        return None
    written = text(node, name, problems)
    try:
        return dtypes.float_named(written) if written else None
    except UsageError:
        hint = nearest(written, dtypes.FLOATS)
        expected = f"{name!r} expects one of {', '.join(dtypes.FLOATS)}, got {describe(node)}.{hint}"
        problems.append(Remark(node.at, expected))
        return None


def seed(parts: Mapping[str, Node], problems: Remarks, notes: Remarks) -> int:
    """The seed, under either of its names."""
    node = parts.get("seed", parts.get("random_seed"))
    if node is None:
        return 0
    if "random_seed" in parts:
        at = parts["random_seed"].at
        if "seed" in parts:
            problems.append(Remark(at, "'seed' and 'random_seed' are one setting: give one of them"))
        notes.append(Remark(at, "random_seed is read as seed; mergekit ignores it"))
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    problems.append(Remark(node.at, f"'seed' expects a whole number from 0 on, got {describe(node)}"))
    return 0


def template(node: Node | None, problems: Remarks) -> str | None:
    """``auto``, a template's name, or a template itself."""
    if node is None:
        return None
    written = text(node, "chat_template", problems)
    if not written or is_template(written):
        return written or None
    expected = f"'chat_template' expects {', '.join(KNOWN_TEMPLATES)} or a Jinja template, got {describe(node)}."
    problems.append(Remark(node.at, expected + nearest(written, KNOWN_TEMPLATES)))
    return None


def tokenizer(parts: Mapping[str, Node], models: tuple[str, ...], problems: Remarks) -> str | None:
    """Whose tokenizer is asked for: ``base``, one of the models, or None where the recipe doesn't say."""
    if "tokenizer" in parts and "tokenizer_source" in parts:
        problems.append(Remark(parts["tokenizer"].at, "'tokenizer' and 'tokenizer_source' exclude each other"))
    if "tokenizer_source" in parts:
        source = parts["tokenizer_source"]
        return _tokenizer_source(source, source, "tokenizer_source", models, problems)
    node = parts.get("tokenizer")
    if isinstance(node, Fields):
        keys = fields(node, "the tokenizer", ("source", "tokens", "pad_to_multiple_of"), problems)
        for key in ("tokens", "pad_to_multiple_of"):
            if key in keys:
                problems.append(Remark(keys[key].at, f"tokenizer: {key} is not supported yet"))
        return _tokenizer_source(keys.get("source"), node, "tokenizer: source", models, problems)
    if node is not None:
        problems.append(Remark(node.at, f"'tokenizer' expects a mapping with 'source', got {describe(node)}"))
    return None


def _tokenizer_source(
    node: Node | None, near: Node, name: str, models: tuple[str, ...], problems: Remarks
) -> str | None:
    """mergekit's default in a ``tokenizer`` block is ``union``."""
    written = reference(node, name, problems) if node is not None else "union"
    if not written or written == BASE or written in models:
        return written or None
    at = (node or near).at
    if written == "union":
        remedy = "give 'base' or one of the models, all with the same vocabulary"
        problems.append(Remark(at, f"{name}: union is not supported yet: {remedy}"))
    else:
        expected = f"{name} expects 'base' or one of the recipe's models, got {written!r}."
        problems.append(Remark(at, expected + nearest(written, (BASE, *models))))
    return None
