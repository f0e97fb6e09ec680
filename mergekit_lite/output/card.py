"""Model card of an output folder: what it was made of and how, for people and for the hub's model tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.errors import CheckpointError, counted
from mergekit_lite.planning import Plan
from mergekit_lite.yaml_document import dump

KEPT_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def model_card(plan: Plan, number: int, effect: Mapping[str, Any]) -> str:
    """Return the README.md of one output, with the front matter that the hub reads."""
    sources = [plan.source, *(source for source in plan.inputs if source is not plan.source)]
    front = {key: value for key, value in _front_matter(plan.source).items() if key in KEPT_KEYS}
    if on_hub := [repository for source in sources if (repository := _repository(source))]:
        front["base_model"] = on_hub
    front["tags"] = ["mergekit-lite", "merge"]
    front.setdefault("library_name", "transformers")
    recipe = plan.text or dump(dict(plan.recipes[number]))
    fence = "`" * (3 + recipe.count("```"))  # longer than any in the recipe
    paragraphs = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---",
        f"# {plan.outputs[number].name}",
        f"Made from other models by arithmetic on their weights (method `{plan.recipes[number]['merge_method']}` of "
        "mergekit_lite), without training:",
        "\n".join(f"- {_linked(source)}{_gives(plan, source)}" for source in sources),
        f"{fence}yaml\n{recipe.strip()}\n{fence}",
        f"Merged: {counted(effect['merged'], 'tensor')}. Copied: {effect['copied']:,}. "
        "Inputs, digests and versions are in `mergekit_lite_manifest.json`.",
    ]
    if effect["effective"] is not None:
        sampled = "" if effect["exact"] else ", from a fixed sample of the weights"
        reached = f"{effect['effective']:.4f} (asked: {effect['asked']:.4f}){sampled}"
        paragraphs.append(f"Effective alpha after rounding: {reached}.")
    return "\n\n".join(paragraphs) + "\n"


def _repository(source: Checkpoint) -> str | None:
    """Return the hub repository of a model or its base; None for a path, which means nothing to readers of the card."""
    return source.base_reference.partition("@")[0] if source.revision else None


def _linked(source: Checkpoint) -> str:
    repository = _repository(source)
    return f"[{source.reference}](https://huggingface.co/{repository})" if repository else f"`{source.reference}`"


def _gives(plan: Plan, source: Checkpoint) -> str:
    if plan.tokenizer is not None and source is plan.inputs[plan.tokenizer]:
        return " (tokenizer)"
    if source is plan.source:
        return " (config)" if plan.tokenizer is not None else " (config, tokenizer)"
    return ""


def _front_matter(source: Checkpoint) -> Mapping[str, Any]:
    """Return the YAML between the first two ``---`` lines of a model's own card; empty where none can be read."""
    try:
        path = small_file(source.folder, "README.md") if source.folder else None
        if path is None:
            return {}
        _, text, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        front = yaml.safe_load(text)
    except (CheckpointError, OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
