"""``mergekit-lite methods``: the merge methods, from their signatures."""

from __future__ import annotations

import inspect
import re
import sys
from textwrap import dedent
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergekit_lite.methods import Method, Parameter

ADAPTERS = (
    "LoRA adapters of one base: those that need no data, on their products, the result an adapter "
    "(mergekit-lite vector combine --space core)"
)


@click.command(
    name="methods",
    epilog="""\b
Examples:
  mergekit-lite methods
  mergekit-lite methods ties
""",
)
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the merge methods by what you have, or describe one: formula, parameters with defaults, source."""
    from mergekit_lite.methods import METHODS, method_named

    if name is None:
        width = max(map(len, METHODS))
        for given, methods in grouped().items():
            click.echo(f"{given}:")
            for method in methods:
                click.echo(f"  {method.name:<{width}}  {method.formula}")
            click.echo()
        click.echo(ADAPTERS)
        return
    method = method_named(name)
    click.echo(f"{name}: {method.formula}\nsource: {method.source}\nmodels: {method.number}, base {method.base}\n")
    summary, words = described(method)
    for key, parameter in method.parameters.items():
        default = "required" if parameter.required else f"default {parameter.default}"
        about = f": {words[key]}" if key in words else ""
        click.echo(f"  {key} ({_kind(parameter)}, {default}){about}")
    about_family = inspect.getdoc(sys.modules[method.function.__module__]) or ""
    click.echo(f"\n{summary}\n\n{about_family}".replace("``", ""))


def grouped() -> dict[str, list[Method]]:
    """Return all methods by name, under what a user has who takes them; groups without a method are left out."""
    from mergekit_lite.methods import METHODS
    from mergekit_lite.methods.registry import GIVEN

    of = {
        heading: sorted((one for one in METHODS.values() if one.given == given), key=lambda one: one.name)
        for given, heading in GIVEN.items()
    }
    return {heading: methods for heading, methods in of.items() if methods}


def described(method: Method) -> tuple[str, dict[str, str]]:
    """Return what a method's docstring says of it, and what that or an annotation says of each of its parameters."""
    summary, _, arguments = (inspect.getdoc(method.function) or "").partition("\nArgs:\n")
    text = dedent(arguments.partition("\nReturns:")[0])
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", text, re.MULTILINE)
    words = {name: parameter.about for name, parameter in method.parameters.items()}
    words |= {name.rstrip("_"): " ".join(lines.split()) for name, lines in entries}
    return summary.strip(), {name: words[name] for name in method.parameters if words[name]}


def _kind(parameter: Parameter) -> str:
    of_each = {"": "", "model": " for each model", "input": " for each input, the base too"}
    return parameter.expected + of_each[parameter.each]
