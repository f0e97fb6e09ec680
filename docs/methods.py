"""Write ``docs/methods.md`` from the methods' signatures and docstrings: ``python -m docs.methods``."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

from mergekit_lite.commands.methods import described as described_method
from mergekit_lite.methods import METHODS, Method, Parameter, sparsify
from mergekit_lite.methods.parameters import NO_EFFECT

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Methods

Written by `python -m docs.methods` from the code's signatures and docstrings.
`mergekit-lite methods NAME` prints the same in a terminal.

## Which one when
"""
WHICH = {
    "a model before and after alignment; you want more of the alignment": "expo",
    "checkpoints of one run, or fine-tunes that differ in the seed": "uniform_soup, linear, ema, model_stock",
    "a training run of which you have the first part; you want more of it": "relex",
    "the last checkpoints of a run whose learning rate did not decay": "schedule_average",
    "one fine-tune that forgot too much of its base": "wise_ft",
    "two models, one mixture": "slerp, nuslerp",
    "policies tuned from one start by reinforcement learning (WARP)": "nuslerp",
    "several models, none of them the base": "linear, karcher, multislerp",
    "several models, one of them odd": "geometric_median",
    "skills from several fine-tunes of one base, few of them": "task_arithmetic, ties",
    "skills from many fine-tunes that get in each other's way": "ties, della, breadcrumbs_ties, dare_ties",
    "skills from several fine-tunes, coefficients found from the weights": "sce, varm",
    "skills from several fine-tunes, matrix by matrix (experimental)": "tsv, iso_c, iso_cts, cart, wudi",
    "skills from several fine-tunes, with prompts of each at hand": "regmean, regmean_plus, fisher",
    "only what several fine-tunes agree on, or only the largest change": "consensus, magmax",
    "fine-tunes by reinforcement learning, which change few weights": "ram, ramplus_tl",
    "only what stands out in one fine-tune": "arcee_fusion, nearswap",
    "the chat skill of one model for another with the same base": "chat_vector",
    "layers of models behind each other": "passthrough",
}
TABLE = """
No method is the best one everywhere: measure. [One small task](merging.md) shows how far apart they can be.

## All methods

*Each model* and *each input* mark parameters that each model may have its own value of (*input*: the base too); a value
under the recipe's `parameters` serves all. {effectless}
are accepted, and have no effect.
`base` is whether a `base_model` is needed, `models` is how many are merged besides it.

| method | formula | base | models | parameters, defaults | source |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """Return the whole page."""
    which = [f"- {when}: {', '.join(map(link, names.split(', ')))}" for when, names in WHICH.items()]
    rows = [row(method) for _, method in sorted(METHODS.items())]
    families = {inspect.getmodule(method.function) for method in METHODS.values()} | {sparsify}  # has no method
    modules = sorted((module for module in families if module is not None), key=lambda module: module.__name__)
    parts = [part for module in modules for part in family(module)]
    table = TABLE.format(effectless=", ".join(f"`{name}`" for name in NO_EFFECT))
    return "\n".join([HEAD, *which, table.rstrip(), *rows, "", *parts]).rstrip() + "\n"


def link(name: str) -> str:
    """Return a link to a method's paragraph."""
    return f"[{name}](#{name})"


def row(method: Method) -> str:
    """Return a method's row in the table."""
    formula = method.formula.replace("|", "\\|")
    given = "<br>".join(f"`{name}` {described(parameter)}" for name, parameter in method.parameters.items())
    return f"| {link(method.name)} | `{formula}` | {method.base} | {method.number} | {given or '–'} | {method.source} |"


def described(parameter: Parameter) -> str:
    """Return a parameter's default, kind and range."""
    default = parameter.default
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    given = "**required**" if parameter.required else f"= {shown.lower() if isinstance(default, bool) else shown}"
    each = f"each {parameter.each}" if parameter.each else ""
    about = ", ".join(filter(None, (each, *parameter.choices, str(parameter.bounds).strip())))
    return f"{given} ({about})" if about else given


def family(module: ModuleType) -> list[str]:
    """Return a family's section: its module's docstring, then its methods."""
    title, _, about = (inspect.getdoc(module) or "").partition("\n")
    made = [f"## {markdown(title).rstrip('.')}", "", markdown(about.strip()), ""]
    for method in METHODS.values():
        if inspect.getmodule(method.function) is module:
            summary, words = described_method(method)
            parameters = [f"- `{name}`: {markdown(said)}" for name, said in words.items()]
            made += [
                f"### {method.name}",
                "",
                markdown(summary),
                "",
                *parameters,
                *([""] if parameters else []),
            ]
    return made


def markdown(text: str) -> str:
    """Return a docstring's text in Markdown: tables are set as they are, names as code."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        plain = not paragraph.startswith(("===", "    "))
        lines = paragraph if plain else "\n".join(f"    {line.removeprefix('    ')}" for line in paragraph.splitlines())
        paragraphs.append(lines.replace("(see the module)", "(see above)") if plain else lines)
    return "\n\n".join(paragraphs).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
