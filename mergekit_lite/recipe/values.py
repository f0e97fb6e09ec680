"""From nodes to values: keys, texts, filters, parameters, references, dtypes, seed, tokenizer, template.

What is wrong is added to a list of problems, so that all of it is reported at once; what is returned then only serves
to read on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from mergekit_lite import dtypes
from mergekit_lite.errors import UsageError, nearest
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.recipe.places import place
from mergekit_lite.recipe.recipe import (
    ALIGNMENTS,
    BASE,
    KNOWN_TEMPLATES,
    UNION,
    WIDTHS,
    TokenRow,
    Vocabulary,
    is_template,
)
from mergekit_lite.recipe.rules import Filter, Rule, Rules
from mergekit_lite.yaml_document import Fields, Items, Node, Remark, Scalar, Value, describe

Remarks = list[Remark]
READ_AS = ("part=", "rename=")  # what references of models begin with that are read otherwise
ARCHITECTURE = "override_architecture"
RULE_KEYS = ("filter", "layers", "value")
OLD_NAMES = {"pattern": "unknown key 'pattern' in a filter: it is called 'filter'"}


def fields(
    node: Node, what: str, known: Iterable[str], problems: Remarks, refused: Mapping[str, str] | None = None
) -> dict[str, Node]:
    """Return the values of a mapping by key, without those that are empty.

    Messages call it ``what`` (``a model``). It may have the keys ``known``; ``refused`` has messages for others.
    """
    known = tuple(known)
    if not isinstance(node, Fields):
        problems.append(Remark(node.at, f"expected {what} (a mapping of {', '.join(known)}), got {describe(node)}"))
        return {}
    by_key = {}
    for key, value in node.entries:
        if key.text not in known:
            text = f"unknown key {key.text!r} in {what}."
            hint = nearest(key.text, known) or f" Known: {', '.join(known)}."
            problems.append(Remark(key.at, (refused or {}).get(key.text) or text + hint))
        elif not (isinstance(value, Scalar) and value.value is None):
            by_key[key.text] = value
    return by_key


def items(node: Node | None, what: str, problems: Remarks) -> tuple[Node, ...]:
    """Return the entries of a list that may not be empty."""
    if node is None:
        return ()
    if not isinstance(node, Items) or not node.items:
        problems.append(Remark(node.at, f"expected a list of {what}, got {describe(node)}"))
        return ()
    return node.items


def text(node: Node, name: str, problems: Remarks) -> str:
    """Return a text that is not empty; the empty one where the node is something else."""
    if isinstance(node, Scalar) and isinstance(node.value, str) and node.value:
        return node.value
    quoted = isinstance(node, Scalar) and node.value not in (None, "")
    remedy = f": put it in quotes, '{node.text}', if it is one" if isinstance(node, Scalar) and quoted else ""
    problems.append(Remark(node.at, f"{name!r} expects text, got {describe(node)}{remedy}"))
    return ""


def choice(node: Node, name: str, known: Iterable[str], problems: Remarks) -> str | None:
    """Return one of the known texts, or None."""
    known = tuple(known)
    if isinstance(node, Scalar) and node.value in known:
        return str(node.value)
    hint = nearest(node.text, known) if isinstance(node, Scalar) else ""
    problems.append(Remark(node.at, f"{name!r} expects one of {', '.join(known)}, got {describe(node)}.{hint}"))
    return None


def layer_range(node: Node, name: str, problems: Remarks) -> tuple[int, int] | None:
    """Return ``[first, end]``, the end not included, or None."""
    entries = node.items if isinstance(node, Items) else ()
    ends = [item.value for item in entries if isinstance(item, Scalar)]
    numbers = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
    if len(numbers) != 2 or len(entries) != 2:
        listed = [item.text if isinstance(item, Scalar) else describe(item) for item in entries]
        got = f"[{', '.join(listed)}]" if isinstance(node, Items) else describe(node)
        problems.append(Remark(node.at, f"{name!r} expects two whole numbers, [first, end], got {got}"))
    elif numbers[0] < 0:
        problems.append(Remark(node.at, f"{name!r} starts at {numbers[0]}: layers are counted from 0"))
    elif numbers[0] >= numbers[1]:
        problems.append(Remark(node.at, f"{name!r} {numbers} is empty: the end is not included"))
    else:
        return numbers[0], numbers[1]
    return None


def filter_of(entry: Mapping[str, Node], problems: Remarks) -> Filter:
    """Return the filter made of the keys ``filter`` and ``layers`` of an entry."""
    name, layers = entry.get("filter"), entry.get("layers")
    at = next((node.at for node in (name, layers) if node is not None), Filter().at)
    pattern = Filter(
        (text(name, "filter", problems) or "*") if name is not None else "*",
        layer_range(layers, "layers", problems) if layers is not None else None,
        at,
    )
    try:
        pattern.pattern  # noqa: B018  (compiled here so that its error has its place)
    except re.error as error:
        problems.append(Remark(at, f"{pattern.text!r} is no regular expression: {error}"))
        return Filter(at=at)
    return pattern


def rules(node: Node, name: str, parameter: Parameter, problems: Remarks, notes: Remarks) -> Rules:
    """Return the rules of one parameter."""
    entries = node.items if isinstance(node, Items) else (node,)
    are_filters = {isinstance(entry, Fields) for entry in entries}
    if len(are_filters) > 1:
        mixed = f"{name!r} mixes values and filters: a list is a gradient, or its entries have 'filter' and 'value'"
        problems.append(Remark(node.at, mixed))
        return ()
    if True in are_filters:
        return _filtered(entries, name, parameter, problems, notes)
    return _rule(node, Filter(), name, parameter, problems)


def _filtered(entries: Iterable[Node], name: str, parameter: Parameter, problems: Remarks, notes: Remarks) -> Rules:
    ordered: list[Rule] = []
    for entry in entries:
        parts = fields(entry, f"a filter of {name!r}", RULE_KEYS, problems, OLD_NAMES)
        if "value" not in parts:
            problems.append(Remark(entry.at, f"an entry of {name!r} has no 'value'"))
        elif isinstance(parts["value"], Fields):
            problems.append(Remark(parts["value"].at, f"{name!r} expects {parameter.expected}, got a mapping"))
        else:
            if ordered and ordered[-1].filter.matches_all:
                notes.append(Remark(entry.at, f"this entry of {name!r} is never reached: one above matches everything"))
            ordered += _rule(parts["value"], filter_of(parts, problems), name, parameter, problems)
    return tuple(ordered)


def _rule(node: Node, which: Filter, name: str, parameter: Parameter, problems: Remarks) -> Rules:
    """Return the rule of a scalar or a gradient; none where something is wrong with it."""
    if isinstance(node, Items) and not node.items:
        problems.append(Remark(node.at, f"{name!r} is an empty list: a gradient has at least one value"))
        return ()
    values = []
    for part in node.items if isinstance(node, Items) else (node,):
        value = _converted(part.value, parameter) if isinstance(part, Scalar) else None
        if value is None:
            problems.append(Remark(part.at, f"{name!r} expects {parameter.expected}, got {describe(part)}"))
            continue
        values.append(value)
        if objection := parameter.objection(value):
            problems.append(Remark(part.at, f"{name!r}: {objection}"))
    if len({type(value) for value in values}) > 1:
        problems.append(Remark(node.at, f"{name!r} is a gradient of mixed kinds: numbers, truth values or texts alone"))
        return ()
    return (Rule(tuple(values), which, node.at),) if values else ()


def _converted(value: Value | None, parameter: Parameter) -> Value | None:
    """Return the value in one of the parameter's types, or None; 0 and 1 are truth values too."""
    types = parameter.types
    if isinstance(value, str):
        if str in types and (not parameter.choices or value in parameter.choices):
            return value
        written = value
        try:
            value = float(written)
        except ValueError:
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


def reference(node: Node, name: str, problems: Remarks, notes: Remarks) -> str:
    """Return a reference as text, ``model@revision+lora@revision``; empty where it is wrong."""
    if not isinstance(node, Fields):
        return text(node, name, problems)
    parts = fields(node, "a model reference", ("model", "lora", ARCHITECTURE), problems)
    if ARCHITECTURE in parts:
        notes.append(
            Remark(parts[ARCHITECTURE].at, f"{ARCHITECTURE!r} has no effect: names come from the models' files")
        )
    if "model" not in parts:
        problems.append(Remark(node.at, f"{name!r} has no 'model'"))
        return ""
    model = _located(parts["model"], "model", problems)
    lora = _located(parts["lora"], "lora", problems) if "lora" in parts else ""
    return f"{model}+{lora}" if lora else model


def _located(node: Node, name: str, problems: Remarks) -> str:
    """Return ``path@revision``, from text or from ``{path, revision}``."""
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


def read_as(part: Node | None, renames: Node | None, problems: Remarks) -> str:
    """Return what stands before a reference that is a part of the base, or is read under other names; often nothing."""
    wanted = [f"part={_beginning(part, 'part', problems)}:"] if part is not None else []
    if renames is not None and not isinstance(renames, Fields):
        expected = f"'rename' expects beginnings of names, {{old: new}}, got {describe(renames)}"
        problems.append(Remark(renames.at, expected))
    for key, value in renames.entries if isinstance(renames, Fields) else ():
        wanted.append(f"rename={_beginning(key, 'rename', problems)}>{_beginning(value, 'rename', problems)}:")
    return "".join(wanted)


def _beginning(node: Node, name: str, problems: Remarks) -> str:
    """Return the beginning of names, which may be empty where others are renamed to it."""
    if name == "rename" and isinstance(node, Scalar) and node.value == "":
        return ""
    written = text(node, name, problems)
    if any(sign in written for sign in ":=>"):
        problems.append(Remark(node.at, f"{name!r} expects the beginning of tensors' names, got {describe(node)}"))
    return written


def dtype(node: Node | None, name: str, problems: Remarks, known: Sequence[str] = dtypes.FLOATS) -> str | None:
    """Return one of the known dtypes by its name; None where the key is missing or wrong."""
    if node is None:
        return None
    written = text(node, name, problems)
    try:
        named = dtypes.output_named(written) if written else None
        if named is None or named in known:
            return named
    except UsageError:
        pass
    expected = f"{name!r} expects one of {', '.join(known)}, got {describe(node)}."
    problems.append(Remark(node.at, expected + nearest(written or "", known)))
    return None


def seed(parts: Mapping[str, Node], problems: Remarks, notes: Remarks) -> int:
    """Return the seed, under either of its names."""
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
    """Return ``auto``, a template's name, or a template itself; None where the key is missing or wrong."""
    if node is None:
        return None
    written = text(node, "chat_template", problems)
    if not written or is_template(written):
        return written or None
    expected = f"'chat_template' expects {', '.join(KNOWN_TEMPLATES)} or a Jinja template, got {describe(node)}."
    problems.append(Remark(node.at, expected + nearest(written, KNOWN_TEMPLATES)))
    return None


def tokenizer(
    parts: Mapping[str, Node], models: tuple[str, ...], problems: Remarks, notes: Remarks
) -> tuple[str | None, Vocabulary]:
    """Return whose tokenizer is asked for, and what of its rows: ``base``, ``union``, a model; None for no word."""
    if "tokenizer" in parts and "tokenizer_source" in parts:
        problems.append(Remark(parts["tokenizer"].at, "'tokenizer' and 'tokenizer_source' exclude each other"))
    if "tokenizer_source" in parts:
        source = parts["tokenizer_source"]
        return _tokenizer_source(source, source, "tokenizer_source", models, problems, notes), Vocabulary()
    node = parts.get("tokenizer")
    if isinstance(node, Fields):
        keys = fields(node, "the tokenizer", ("source", "tokens", "width", "pad_to_multiple_of", "align"), problems)
        if "align" in keys:
            choice(keys["align"], "align", ALIGNMENTS, problems)  # there is one way
        named = _tokenizer_source(keys.get("source"), node, "tokenizer: source", models, problems, notes)
        return named, _vocabulary(keys, models, problems, notes)
    if node is not None:
        problems.append(Remark(node.at, f"'tokenizer' expects a mapping with 'source', got {describe(node)}"))
    return None, Vocabulary()


def _vocabulary(keys: Mapping[str, Node], models: tuple[str, ...], problems: Remarks, notes: Remarks) -> Vocabulary:
    """Return what a recipe says of the rows of single tokens, and of how many rows there are."""
    width = choice(keys["width"], "width", WIDTHS, problems) if "width" in keys else None
    multiple = (
        whole(keys["pad_to_multiple_of"], "pad_to_multiple_of", 1, problems) if "pad_to_multiple_of" in keys else None
    )
    if "width" in keys and multiple is not None:
        problems.append(Remark(keys["width"].at, "'width' and 'pad_to_multiple_of' exclude each other"))
    listed = keys.get("tokens")
    if listed is not None and not isinstance(listed, Fields):
        problems.append(Remark(listed.at, f"'tokens' expects a mapping of tokens, got {describe(listed)}"))
    entries = listed.entries if isinstance(listed, Fields) else ()
    rows = tuple(_token_row(key.text, value, models, problems, notes) for key, value in entries)
    return Vocabulary(rows, width or "base", multiple)


def _token_row(token: str, node: Node, models: tuple[str, ...], problems: Remarks, notes: Remarks) -> TokenRow:
    """Return what a recipe says of one token."""
    keys = fields(node, f"the token {token!r}", ("source", "force"), problems)
    force = keys.get("force")
    is_forced = isinstance(force, Scalar) and force.value is True
    if force is not None and not (isinstance(force, Scalar) and isinstance(force.value, bool)):
        problems.append(Remark(force.at, f"'force' expects true or false, got {describe(force)}"))
    source = keys.get("source")
    if source is None:
        return TokenRow(token, force=is_forced)
    kind = (
        next((value for key, value in source.entries if key.text == "kind"), None)
        if isinstance(source, Fields)
        else None
    )
    if kind is None:
        return TokenRow(token, _listed_model(source, "source", models, problems, notes), force=is_forced)
    known = ("kind", "model", "token", "token_id")
    given = fields(source, "the source of a token", known, problems)
    if choice(kind, "kind", ("zero", "model_token"), problems) == "zero":
        return TokenRow(token, zero=True, force=is_forced)
    if "model" not in given or ("token" in given) == ("token_id" in given):
        needs = "a 'model_token' names a 'model', and a 'token' or a 'token_id' of it"
        problems.append(Remark(source.at, needs))
    model = _listed_model(given["model"], "model", models, problems, notes) if "model" in given else None
    other = text(given["token"], "token", problems) if "token" in given else None
    number = whole(given["token_id"], "token_id", 0, problems) if "token_id" in given else None
    return TokenRow(token, model, other, number, force=is_forced)


def _listed_model(node: Node, name: str, models: tuple[str, ...], problems: Remarks, notes: Remarks) -> str | None:
    """Return one of the recipe's models."""
    written = _model_meant(reference(node, name, problems, notes), models)
    if written and written not in models:
        expected = f"{name!r} expects one of the recipe's models, got {written!r}.{nearest(written, models)}"
        problems.append(Remark(node.at, expected))
    return written or None


def _model_meant(written: str, models: tuple[str, ...]) -> str:
    """Return the one of a recipe's models that is meant by a reference: the only one of it, if that is for a part."""
    if not written or written in models:
        return written
    path = place(written)
    meant = [model for model in models if place(model) == path]
    meant += [model for model in models if model.startswith(READ_AS) and place(model).endswith(f":{path}")]
    return meant[0] if len(meant) == 1 else written


def whole(node: Node, name: str, least: int, problems: Remarks) -> int | None:
    """Return a whole number of ``least`` at least, or None."""
    value = node.value if isinstance(node, Scalar) else None
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    problems.append(Remark(node.at, f"{name!r} expects a whole number from {least} on, got {describe(node)}"))
    return None


def _tokenizer_source(
    node: Node | None, near: Node, name: str, models: tuple[str, ...], problems: Remarks, notes: Remarks
) -> str | None:
    """Return whose tokenizer is asked for; mergekit's default in a ``tokenizer`` block is ``union``."""
    written = reference(node, name, problems, notes) if node is not None else UNION
    if written not in (BASE, UNION):
        written = _model_meant(written, models)
    if not written or written in (BASE, UNION, *models):
        return written or None
    expected = f"{name} expects 'base', 'union' or one of the recipe's models, got {written!r}."
    problems.append(Remark((node or near).at, expected + nearest(written, (BASE, UNION, *models))))
    return None
