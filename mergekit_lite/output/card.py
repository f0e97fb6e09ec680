"""Model card of an output folder: what it was made of and how, for people and for the hub's model tree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.parts import DIFFUSION, MODULES
from mergekit_lite.checkpoint.references import plain_reference
from mergekit_lite.errors import counted
from mergekit_lite.pages import markdown
from mergekit_lite.plain_text import plain
from mergekit_lite.planning import Plan
from mergekit_lite.yaml_document import dump

WIDE = 1_000_000  # characters of a line: no path is folded
SNAPSHOT = re.compile(r"/models--(?P<organisation>[\w.-]+)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
MIXTURES = ("moe", "moe prune", "moe merge-experts")  # methods whose outputs are mixtures of experts
BEGINNING = r"(?<![\w.<>)~/-])"  # of a word; an end tag, an address and a relative path have their slash elsewhere
# An absolute path of two parts or more; its last part is the group.
ABSOLUTE = re.compile(BEGINNING + r"~?(?:/[^\s/'\",:+\[\]{}]+)+/([^\s/'\",:+\[\]{}]+)/?")
# The same on Windows, behind the letter of a drive or the name of a machine.
PART = r"[^\s\\/'\",:+\[\]{}]+"
ON_WINDOWS = re.compile(rf"(?<!\w)(?:[A-Za-z]:[\\/]+|\\\\+)(?:{PART}[\\/]+)*({PART})[\\/]*")


def model_card(plan: Plan, number: int, effect: Mapping[str, Any]) -> str:
    """Return the README.md of one output, with the front matter that the hub reads.

    What strangers wrote is shown as text. No path of this machine is published: a local model goes by its last part.
    """
    models = plan.inputs[: len(plan.inputs) - plan.statistics]
    sources = [plan.source, *(source for source in models if source is not plan.source)]
    front: dict[str, Any] = dict(plan.front_matter)
    if on_hub := [repository for source in sources if (repository := _repository(source))]:
        front["base_model"] = on_hub
    method = plan.recipes[number]["merge_method"]
    front["tags"] = ["mergekit-lite", "merge", *["moe"] * (method in MIXTURES)]
    front.setdefault("library_name", _library(plan.source))
    recipe = plan.text or dump(dict(plan.recipes[number]), width=WIDE)
    paragraphs = [
        f"---\n{plain(yaml.safe_dump(front, sort_keys=False, allow_unicode=True)).strip()}\n---",
        f"# {markdown.text(plan.outputs[number].name)}",
        f"Made from other models by arithmetic on their weights (method `{method}` of "
        "mergekit_lite), without training:",
        "\n".join(f"- {_linked(source)}{_gives(plan, source)}" for source in sources),
        markdown.block(_without_paths(recipe, sources).strip(), "yaml"),
        *plan.card,
        f"Merged: {counted(effect['merged'], 'tensor')}. Copied: {effect['copied']:,}. "
        "Inputs, digests and versions are in `mergekit_lite_manifest.json`.",
    ]
    if effect["effective"] is not None:
        sampled = "" if effect["exact"] else ", from a fixed sample of the weights"
        reached = f"{effect['effective']:.4f} (asked: {effect['asked']:.4f}){sampled}"
        paragraphs.append(f"Effective alpha after rounding: {reached}.")
    return "\n\n".join(paragraphs) + "\n"


def _library(source: Checkpoint) -> str:
    """Return the library that loads a model like this one."""
    if source.folder is not None and (source.folder / MODULES).exists():
        return "sentence-transformers"
    is_of_diffusers = any(part.stem == DIFFUSION for part in source.parts)
    return "diffusers" if is_of_diffusers else "transformers"


def _repository(source: Checkpoint) -> str | None:
    """Return the hub repository of a model or its base; None for a path, which means nothing to readers of the card."""
    return plain_reference(source.base_reference).partition("@")[0] if source.revision else None


def _linked(source: Checkpoint) -> str:
    repository, known_as = _repository(source), _known_as(source)
    if repository is None:
        return markdown.code(known_as)
    return f"[{markdown.text(known_as)}](https://huggingface.co/{repository})"


def _known_as(source: Checkpoint) -> str:
    """Return the reference of a model as others may know it: local paths are their last part."""
    base = plain_reference(source.base_reference) if source.revision else _last_part(source.path)
    added = (
        addition if each.revision else addition._replace(path=_last_part(each.path)) for each, addition in source.added
    )
    return "+".join([base, *map(str, added)])


def _last_part(path: Path) -> str:
    """Return the name of a file or folder; of a snapshot in a cache of the hub, the repository and commit."""
    snapshot = SNAPSHOT.search(path.as_posix())
    return f"{snapshot['organisation']}/{snapshot['name']}@{snapshot['commit']}" if snapshot else path.name


def _without_paths(recipe: str, sources: Sequence[Checkpoint]) -> str:
    """Return a recipe's text with the last part of each absolute path: those of the models, and what looks like one."""
    written = {plain_reference(source.base_reference): source.path for source in sources}
    written |= {addition.path: each.path for source in sources for each, addition in source.added}
    for reference in sorted(written, key=len, reverse=True):
        if reference.startswith(("/", "~")) or ON_WINDOWS.fullmatch(reference):
            whole = re.compile(rf"{BEGINNING}{re.escape(reference)}(?![\w/-])")
            recipe = whole.sub(_last_part(written[reference]).replace("\\", r"\\"), recipe)
    return ABSOLUTE.sub(r"\1", ON_WINDOWS.sub(r"\1", recipe))


def _gives(plan: Plan, source: Checkpoint) -> str:
    if plan.tokenizer is not None and source is plan.inputs[plan.tokenizer]:
        return " (tokenizer)"
    if source is plan.source:
        return " (config)" if plan.tokenizer is not None else " (config, tokenizer)"
    return ""
