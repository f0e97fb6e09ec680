"""Write ``docs/api.md`` from the public names' signatures and docstrings: ``python -m docs.api``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import mergekit_lite

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Python

Written by `python -m docs.api` from the code's signatures and docstrings.

"""
SECTIONS = {
    "Merging": ("extrapolate", "extrapolate_run", "merge", "merge_tensors", "merge_states", "transplant"),
    "Planning and running": (
        *("plan_extrapolation", "plan_run_extrapolation", "plan_merge", "make_plan"),
        *("run", "RunOptions", "Finished"),
    ),
    "Looking at models": ("open_checkpoint", "inspect", "compare", "verify"),
    "Gathering what merges need": ("gather_statistics", "gather_statistics_plus", "StatisticsOptions", "Gathered"),
    "Sharing": ("push",),
    "Mixtures of experts": ("build_moe", "upcycle", "split_experts", "prune_experts", "merge_experts"),
    "Task vectors": ("extract_vector", "apply_vectors", "combine_vectors", "combine_adapters", "reduce_intruders"),
    "Searching and teaching": ("boost", "BoostOptions", "preview", "answer", "distill"),
    "What functions take and return": (
        *("Plan", "Recipe", "Checkpoint", "Inspection", "Comparison", "Verification", "Extracted", "Boosted", "Pushed"),
        *("Preview", "Previewed", "Answered", "Findings"),
    ),
    "Errors": ("MergekitLiteError", "UsageError", "CheckpointError", "PlanError", "NonFiniteError", "RunError"),
}
SECTIONS_OF_DOCSTRINGS = ("Args", "Attributes", "Raises", "Returns")
WIDTH = 120


def page() -> str:
    """Return the whole page."""
    parts = [HEAD + markdown(inspect.getdoc(mergekit_lite) or "")]
    for title, names in SECTIONS.items():
        parts += [f"## {title}", *(entry(name) for name in names)]
    return "\n\n".join(parts) + "\n"


def entry(name: str) -> str:
    """Return the paragraphs on one name: its signature, if it is a function, and its docstring."""
    value = getattr(mergekit_lite, name)
    text = markdown(inspect.getdoc(value) or "")
    return f"### {name}\n\n{signature(name, value)}{text}"


def signature(name: str, value: object) -> str:
    """Return a function's signature as a block of code, one parameter a line where it is long; nothing for a class."""
    if not inspect.isfunction(value):
        return ""
    parts: list[str] = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    returned = f" -> {value.__annotations__['return']}"
    line = f"    {name}({', '.join(parts)}){returned}"
    if len(line) > WIDTH:
        line = "\n".join([f"    {name}(", *(f"        {part}," for part in parts), f"    ){returned}"])
    return f"{line}\n\n"


def markdown(text: str) -> str:
    """Return a docstring in Markdown: its sections as lists, names as code."""
    sections = re.split(rf"^({'|'.join(SECTIONS_OF_DOCSTRINGS)}):\n", text, flags=re.MULTILINE)
    parts = [sections[0].strip()]
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        items = [" ".join(item.split()) for item in re.split(r"\n(?=\S)", inspect.cleandoc(body))]
        if title == "Returns":
            parts.append(f"{title}: {' '.join(items)}")
        else:
            named = (item.partition(": ") for item in items)
            parts.append(f"{title}:\n\n" + "\n".join(f"- `{name}`: {about}" for name, _, about in named))
    return "\n\n".join(parts).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
