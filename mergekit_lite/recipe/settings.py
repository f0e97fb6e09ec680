"""The keys of a recipe that are no arithmetic: references, dtypes, seed, tokenizer, template."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lite import dtypes
from mergekit_lite.errors import UsageError, nearest
from mergekit_lite.recipe.recipe import BASE, KNOWN_TEMPLATES, is_template
from mergekit_lite.recipe.values import Remarks, fields, text
from mergekit_lite.yaml_document import Fields, Node, Remark, Scalar, describe

ARCHITECTURE = {
    "override_architecture": "override_architecture is not supported: names come from the model's files, no table of "
    "architectures is used"
}


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
