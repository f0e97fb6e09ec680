"""The model card of a folder: what it was made of and how, for people and for the hub's model tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.plan import Plan

KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")


def model_card(plan: Plan, variant: int, effect: Mapping[str, Any]) -> str:
    """The README.md of one output, with the front matter the hub reads."""
    first, *others = plan.inputs
    front = {key: value for key, value in _front_matter(first).items() if key in KEPT}
    front |= {"base_model": [source.reference for source in plan.inputs], "tags": ["merge", "mergekit_lite"]}
    front.setdefault("library_name", "transformers")
    name = plan.outputs[variant].name
    settings = plan.recipe.variants[variant]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Made from `{first.reference}` and {', '.join(f'`{other.reference}`' for other in others)}",
        f"by arithmetic on their weights (method `{plan.recipe.merge_method}` of mergekit_lite), without training.",
        "",
        "```yaml",
        yaml.safe_dump(_recipe(plan, variant), sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        f"{effect['merged']:,} tensors were merged and {effect['copied']:,} copied from `{first.reference}`.",
        "Inputs, digests and versions are in `mergekit_lite_manifest.json`.",
    ]
    if effect["effective"] is not None and "alpha" in settings:
        sampled = "" if effect["exact"] else ", from a fixed sample of the weights"
        lines += [
            "",
            f"Effective alpha after rounding: {effect['effective']:.4f} (asked: {effect['asked']:.4f}){sampled}.",
        ]
    return "\n".join(lines) + "\n"


def _recipe(plan: Plan, variant: int) -> dict[str, Any]:
    recipe = plan.recipe
    parameters: dict[str, Any] = {}
    for name, setting in recipe.variants[variant].items():
        rules = [{"filter": f"regex:{pattern}", "value": value} for pattern, value in setting.rules]
        parameters[name] = [*rules, {"value": setting.default}] if rules else setting.default
    aligned, *others = recipe.models
    text: dict[str, Any] = {
        "merge_method": recipe.merge_method,
        "base_model": others[0] if others else aligned,
        "models": [{"model": aligned}],
        "parameters": parameters,
    }
    if recipe.out_dtype:
        text["out_dtype"] = recipe.out_dtype
    if recipe.rounding != "nearest":
        text |= {"rounding": recipe.rounding, "seed": recipe.seed}
    return text


def _front_matter(source: Checkpoint) -> Mapping[str, Any]:
    """The YAML between the first two ``---`` lines of a model's own card; empty where none can be read."""
    path = source.folder / "README.md" if source.folder else Path()
    try:
        _, text, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        front = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
