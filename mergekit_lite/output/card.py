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
    first, others = plan.source, [source for source in plan.inputs if source is not plan.source]
    front = {key: value for key, value in _front_matter(first).items() if key in KEPT}
    front |= {"base_model": [source.reference for source in (first, *others)], "tags": ["merge", "mergekit_lite"]}
    front.setdefault("library_name", "transformers")
    name = plan.outputs[variant].name
    method = plan.recipes[variant]["merge_method"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Made from `{first.reference}` and {', '.join(f'`{other.reference}`' for other in others)}",
        f"by arithmetic on their weights (method `{method}` of mergekit_lite), without training.",
        "",
        "```yaml",
        yaml.safe_dump(dict(plan.recipes[variant]), sort_keys=False, allow_unicode=True).strip(),
        "```",
        "",
        f"{effect['merged']:,} tensors were merged and {effect['copied']:,} copied from `{first.reference}`.",
        "Inputs, digests and versions are in `mergekit_lite_manifest.json`.",
    ]
    if effect["effective"] is not None:
        sampled = "" if effect["exact"] else ", from a fixed sample of the weights"
        lines += [
            "",
            f"Effective alpha after rounding: {effect['effective']:.4f} (asked: {effect['asked']:.4f}){sampled}.",
        ]
    return "\n".join(lines) + "\n"


def _front_matter(source: Checkpoint) -> Mapping[str, Any]:
    """The YAML between the first two ``---`` lines of a model's own card; empty where none can be read."""
    path = source.folder / "README.md" if source.folder else Path()
    try:
        _, text, _ = path.read_text(encoding="utf-8").split("---\n", 2)
        front = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
