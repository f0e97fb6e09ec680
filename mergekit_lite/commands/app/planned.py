"""A recipe's plan while it is written: what is wrong and where, or what each group of tensors gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.documents import heading
from mergekit_lite.commands.groups import groups
from mergekit_lite.commands.units import size
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.errors import MergekitLiteError, PlanError, counted
from mergekit_lite.multimerge import Step, called, plan_documents
from mergekit_lite.output.companions import what_is_missing
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.planning.delta_check import delta_warning
from mergekit_lite.recipe import RecipeError, lasting_text
from mergekit_lite.recipe.documents import Document, document_in, documents_of, final
from mergekit_lite.yaml_document import Fields, Items, Node, Scalar, read_documents

MOST_GROUPS = 40  # rows of the table that the page shows
MOST_TOLD = 100  # problems, or warnings: a recipe may have a filter a line, and each be misspelt
SOURCE = "The recipe"  # what messages call the text


@dataclass(frozen=True)
class Planned:
    """What became of a text: the plans of its documents, or problems, each with its line or None.

    ``tree`` is the text as YAML, where it is that; ``warning`` is of the delta of a single document.
    """

    text: str
    steps: tuple[Step, ...] = ()
    problems: tuple[tuple[int | None, str], ...] = ()
    tree: Node | None = None
    warning: str | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan of the document that is made last; None where there are problems."""
        return self.steps[-1].plan if self.steps else None

    @property
    def outputs(self) -> list[str]:
        """The names of the folders that are made in the end."""
        return [str(step.output) for step in self.steps if step.is_final]


def planned(text: str, output: str, places: Places) -> Planned:
    """Plan a recipe's text as ``mergekit-lite merge`` does, unless it would read what lies outside of the places.

    Where several models are made, the output's name is the beginning of theirs; see ``output_of``.
    """
    tree: Node | None = None
    documents: tuple[Document, ...] = ()
    try:
        trees = read_documents(text, SOURCE)
        tree = _tree(trees)
        documents = _sound(trees, places)
        steps = _steps(documents, output_of(documents, output), text)
        if leading_out := [why for path in _read(steps) if (why := places.refusal(path))]:
            raise PlanError(leading_out)
    except RecipeError as error:
        return Planned(text, problems=tuple((each.at.line, each.text) for each in error.problems), tree=tree)
    except PlanError as error:
        return Planned(text, problems=tuple((_line(each, documents), each) for each in error.problems), tree=tree)
    except MergekitLiteError as error:
        return Planned(text, problems=((_line(str(error), documents), str(error)),), tree=tree)
    return Planned(text, steps, tree=tree, warning=delta_warning(steps[0].plan) if len(steps) == 1 else None)


def output_of(documents: Sequence[Document], name: str) -> str:
    """Return what ``-o`` is given: a name, with that of the document behind it where several are made in the end."""
    return name if len(final(documents)) == 1 else f"{name}-{{name}}"


def tree_of(text: str) -> Node | None:
    """Return a text as YAML, several documents as a list of them; None where it is none."""
    try:
        return _tree(read_documents(text, SOURCE))
    except MergekitLiteError:
        return None


def _tree(documents: list[Node]) -> Node:
    return documents[0] if len(documents) == 1 else Items(tuple(documents), documents[0].at)


def documents_by_range(text: str, places: Places) -> tuple[Document, ...]:
    """Return the documents of a recipe whose models of the hub are read by range. Raises RecipeError."""
    return _sound(read_documents(text, SOURCE), places, streamed=True)


def _sound(trees: list[Node], places: Places, *, streamed: bool = False) -> tuple[Document, ...]:
    """Return a text's documents. Raises RecipeError with all that is wrong with them, or leads out."""
    tree = _tree(trees)
    problems = list(places.problems(tree, _names(tree), streamed=streamed))
    documents: tuple[Document, ...] = ()
    try:
        documents = documents_of(trees, SOURCE)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(SOURCE, problems)
    return documents


def _names(tree: Node) -> set[str]:
    """Return the names of documents; none of a single one, which nothing else can be made of."""
    fields = [each for each in tree.items if isinstance(each, Fields)] if isinstance(tree, Items) else []
    entries = [entry for each in fields for entry in each.entries]
    return {value.text for key, value in entries if key.text == "name" and isinstance(value, Scalar)}


def _steps(documents: Sequence[Document], output: str, text: str) -> tuple[Step, ...]:
    if len(documents) > 1:
        return plan_documents(documents, output)
    (document,) = documents
    plan = make_plan(document.recipe, [output], text=lasting_text(document.recipe, text))
    return (Step(document, plan.outputs[0], is_final=True, is_fused=False, plan=plan),)


def _read(steps: Sequence[Step]) -> Iterator[str]:
    """Yield the files that are read of models which no document makes."""
    for step in steps:
        for source in step.plan.inputs:
            if not document_in(source.reference, step.document.uses):
                yield from (str(file.path) for file in source.files_read)


def _line(problem: str, documents: Sequence[Document]) -> int | None:
    """Return the line of the document that a problem names; None where it names none."""
    return next((each.at.line for each in documents if problem.startswith(f"{called(each)}: ")), None)


def shown(result: Planned) -> Markup:
    """Return a plan, or what is wrong, as HTML."""
    if result.problems:
        return element("div", *_problems(result), class_="problems", role="status")
    if not result.steps:
        return element("p", "✓ Nothing is wrong in the text itself.", class_="sound", role="status")
    parts = [element("p", "As recipe.yml: ", element("code", "mergekit-lite plan recipe.yml"))]
    for step in result.steps:
        if len(result.steps) > 1:
            parts.append(element("h3", heading(step)))
        parts += _plan(step.plan)
    if result.warning:
        parts.append(warning(result.warning))
    return element("div", *parts, class_="plan", role="status")


def warning(text: str) -> Markup:
    """Return something to be warned of."""
    return element("p", f"⚠ {text}", class_="warning")


def _problems(result: Planned) -> Iterator[Markup]:
    lines = result.text.splitlines()
    yield element("p", f"✗ {counted(len(result.problems), 'problem')}, nothing can be run.", class_="wrong")
    items = []
    for line, problem in result.problems[:MOST_TOLD]:
        said = [element("span", problem)]
        if line is not None:
            written = lines[line - 1] if line <= len(lines) else ""
            said = [element("b", f"line {line}: "), *said, element("pre", f"{line:>4} │ {written}")]
        items.append(element("li", *said))
    yield element("ul", *items)
    yield from _and_more(len(result.problems) - MOST_TOLD, "problem")


def _and_more(number: int, what: str) -> Iterator[Markup]:
    """Yield that there are more than the page shows, where that is so."""
    if number > 0:
        yield element("p", f"… and {counted(number, what)} more: mergekit-lite plan shows all")


def _plan(plan: Plan) -> Iterator[Markup]:
    files = counted(len(plan.layout.files), "file")
    yield element(
        "p",
        f"✓ reads {size(plan.bytes_to_read)}, writes {size(plan.bytes_to_write)} in {files}, takes about "
        f"{size(memory_estimate(plan, None))} of memory.",
        class_="sound",
    )
    warnings = [*filter(None, (*plan.notes, what_is_missing(plan)))]
    yield from map(warning, warnings[:MOST_TOLD])
    yield from _and_more(len(warnings) - MOST_TOLD, "warning")
    found = groups(plan)
    rows = [
        (f"{group.tensors:,}", size(group.nbytes), group.dtype, f"{group.what}\nfor example {group.example}")
        for group in found[:MOST_GROUPS]
    ]
    yield table(("tensors", "size", "dtype", "what happens"), rows)
    yield from _and_more(len(found) - MOST_GROUPS, "group")
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
