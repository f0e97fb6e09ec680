"""A recipe's plan while it is written: what is wrong and where, or what each group of tensors gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.groups import groups
from mergekit_lite.commands.units import size
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.errors import MergekitLiteError, PlanError, counted
from mergekit_lite.output.companions import what_is_missing
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.planning.delta_check import delta_warning
from mergekit_lite.recipe import RecipeError, lasting_text, parse
from mergekit_lite.yaml_document import Node, Remark, read_documents

MOST_GROUPS = 40  # rows of the table that the page shows
SOURCE = "The recipe"  # what messages call the text


@dataclass(frozen=True)
class Planned:
    """What became of a text: a plan, or problems, each with its line or None.

    ``tree`` is the text as YAML, where it is a single document.
    """

    text: str
    plan: Plan | None = None
    problems: tuple[tuple[int | None, str], ...] = ()
    tree: Node | None = None
    notes: tuple[str, ...] = field(default=())


def planned(text: str, output: str, places: Places) -> Planned:
    """Plan a recipe's text as ``mergekit-lite merge`` does, unless it would read what lies outside of the places."""
    tree: Node | None = None
    try:
        documents = read_documents(text, SOURCE)
        if len(documents) != 1:
            raise RecipeError(
                SOURCE, [Remark(documents[1].at, "the page takes one document; the command takes several")]
            )
        (tree,) = documents
        if problems := list(places.problems(tree)):
            raise RecipeError(SOURCE, problems)
        recipe = parse(text, SOURCE)
        plan = make_plan(recipe, [output], text=lasting_text(recipe, text))
        for path, _, _ in plan.input_files:
            if why := places.refusal(path):
                raise PlanError([why])
    except RecipeError as error:
        return Planned(text, problems=tuple((each.at.line, each.text) for each in error.problems), tree=tree)
    except PlanError as error:
        return Planned(text, problems=tuple((None, each) for each in error.problems), tree=tree)
    except MergekitLiteError as error:
        return Planned(text, problems=((None, str(error)),), tree=tree)
    warning = delta_warning(plan)
    return Planned(text, plan, tree=tree, notes=(*plan.notes, *([warning] if warning else [])))


def tree_of(text: str) -> Node | None:
    """Return a text as YAML; None where it is none, or several documents."""
    try:
        documents = read_documents(text, SOURCE)
    except MergekitLiteError:
        return None
    return documents[0] if len(documents) == 1 else None


def shown(result: Planned) -> Markup:
    """Return a plan, or what is wrong, as HTML."""
    if result.problems:
        return element("div", *_problems(result), class_="problems", role="status")
    if result.plan is None:
        return element("p", "✓ Nothing is wrong in the text itself.", class_="sound", role="status")
    return element("div", *_plan(result.plan, result.notes), class_="plan", role="status")


def _problems(result: Planned) -> Iterator[Markup]:
    lines = result.text.splitlines()
    yield element("p", f"✗ {counted(len(result.problems), 'problem')}, nothing can be run.", class_="wrong")
    items = []
    for line, problem in result.problems:
        said = [element("span", problem)]
        if line is not None:
            written = lines[line - 1] if line <= len(lines) else ""
            said = [element("b", f"line {line}: "), *said, element("pre", f"{line:>4} │ {written}")]
        items.append(element("li", *said))
    yield element("ul", *items)


def _plan(plan: Plan, notes: Sequence[str]) -> Iterator[Markup]:
    files = counted(len(plan.layout.files), "file")
    yield element(
        "p",
        f"✓ reads {size(plan.bytes_to_read)}, writes {size(plan.bytes_to_write)} in {files}, takes about "
        f"{size(memory_estimate(plan, None))} of memory.",
        class_="sound",
    )
    yield element("p", "As recipe.yml: ", element("code", "mergekit-lite plan recipe.yml"))
    for note in filter(None, (*notes, what_is_missing(plan))):
        yield element("p", f"⚠ {note}", class_="warning")
    found = groups(plan)
    rows = [
        (f"{group.tensors:,}", size(group.nbytes), group.dtype, f"{group.what}\nfor example {group.example}")
        for group in found[:MOST_GROUPS]
    ]
    yield table(("tensors", "size", "dtype", "what happens"), rows)
    if len(found) > MOST_GROUPS:
        yield element("p", f"… and {counted(len(found) - MOST_GROUPS, 'group')} more: mergekit-lite plan shows all")
    left_out = [f"{name} of {reference}: {why}" for reference, name, why in plan.left_out]
    if left_out:
        items = [element("li", each) for each in left_out[:MOST_GROUPS]]
        summary = element("summary", f"{counted(len(left_out), 'tensor')} left out")
        yield element("details", summary, element("ul", *items))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """Return a plain table that scrolls in its box where it is too wide."""
    head = element("tr", *(element("th", text, scope="col") for text in heads))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    whole = element("table", element("thead", head), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex="0")
