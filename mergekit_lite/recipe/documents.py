"""Recipes of several documents: merges that are made of one another, as ``mergekit-multi`` takes them.

    name: stem                     # how later or earlier documents call this one's result
    merge_method: linear
    models: [{model: org/a, parameters: {weight: 1}}, {model: org/b, parameters: {weight: 1}}]
    ---
    merge_method: ties             # without a name: the one that nothing else is made of
    base_model: org/base
    models: [{model: stem, parameters: {weight: 1, density: 0.5}}, ...]

A name counts only where a model may stand: in ``model``, ``base_model`` and the tokenizer's source, alone or before a
``+``. Anywhere else, ``merge_method: linear`` beside a document called ``linear``, it is what it always was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from mergekit_lite.recipe.recipe import Recipe
from mergekit_lite.recipe.schema import recipe_of
from mergekit_lite.recipe.writing import as_data, to_yaml
from mergekit_lite.yaml_document import Fields, Mark, Node, RecipeError, Remark, Scalar, describe, read_documents

NAME = re.compile(r"[^\W_]([\w. -]{0,98}[\w-])?")  # what a folder can be called, and no reference is cut in
READ_AS = re.compile(r"^((part|rename)=[^:]*:)+")  # what may stand before a reference
NEEDS = "text of letters, digits, dots, dashes, blanks and underscores, a letter or digit first, 100 at most"


@dataclass(frozen=True)
class Document:
    """One document of a recipe: a merge, its name if it has one, and the names of those whose results it reads."""

    name: str
    recipe: Recipe
    uses: tuple[str, ...]
    at: Mark


def parse_documents(content: str, source: str = "The recipe") -> tuple[Document, ...]:
    """Return the documents of a YAML text in the order in which they can be made; one where the text has one.

    Raises:
        RecipeError: a document is no recipe, names are missing, given twice or none, or documents are made of one
            another in a circle; every problem is named with its place.
    """
    return documents_of(read_documents(content, source), source)


def documents_of(trees: Sequence[Node], source: str) -> tuple[Document, ...]:
    """Return the documents that the trees of a YAML text are. Raises RecipeError as ``parse_documents`` does."""
    if len(trees) == 1:
        return (Document("", recipe_of(trees[0], source), (), trees[0].at),)
    problems: list[Remark] = []
    named = [_named(tree, problems) for tree in trees]
    names = {name for name, _ in named if name}
    documents: list[Document] = []
    for name, tree in named:
        try:
            recipe = recipe_of(tree, source, names)
        except RecipeError as error:
            problems += error.problems
            continue
        uses = dict.fromkeys(used for model in recipe.models if (used := document_in(model, names)))
        documents.append(Document(name, recipe, tuple(uses), tree.at))
    problems += _miscalled(named)
    if not problems:
        problems += _circle(documents)
    if problems:
        raise RecipeError(source, problems)
    return _in_order(documents)


def final(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Return the documents that no other is made of: those whose results are wanted."""
    used = {name for document in documents for name in document.uses}
    return tuple(document for document in documents if not document.name or document.name not in used)


def ancestors(document: Document, documents: Sequence[Document]) -> tuple[Document, ...]:
    """Return the documents that one is made of, directly or not, in the order in which they are made."""
    needed = set(document.uses)
    for earlier in reversed(documents):
        if earlier.name in needed:
            needed |= set(earlier.uses)
    return tuple(each for each in documents if each.name in needed)


def document_in(reference: str, names: Collection[str]) -> str:
    """Return the document that a reference names, alone or before what is added to it; empty where it names none."""
    first = READ_AS.sub("", reference.partition("+")[0])
    return first if first in names else ""


def with_place(reference: str, name: str, place: str) -> str:
    """Return a reference that names a document with the place of its result instead."""
    before = READ_AS.match(reference)
    read_as = before[0] if before else ""
    return read_as + place + reference.removeprefix(read_as).removeprefix(name)


def text_of_chain(document: Document, documents: Sequence[Document]) -> str:
    """Return the text of a recipe that makes a document's result: the documents that it is made of, and itself."""
    chain = (*ancestors(document, documents), document)
    if len(chain) == 1:
        return to_yaml(as_data(document.recipe))
    named = [({"name": each.name} if each.name else {}) | as_data(each.recipe) for each in chain]
    return "---\n".join(map(to_yaml, named))


def _named(tree: Node, problems: list[Remark]) -> tuple[str, Node]:
    """Return a document's name, empty where it has none, and the document without it."""
    entries = tree.entries if isinstance(tree, Fields) else ()
    given = [value for key, value in entries if key.text == "name"]
    if not given:
        return "", tree
    rest = Fields(tuple(entry for entry in entries if entry[0].text != "name"), tree.at)
    value = given[0].value if isinstance(given[0], Scalar) else None
    if not isinstance(value, str) or not NAME.fullmatch(value):
        problems.append(Remark(given[0].at, f"'name' expects {NEEDS}; got {describe(given[0])}"))
        return "", rest
    return value, rest


def _miscalled(named: Sequence[tuple[str, Node]]) -> Iterator[Remark]:
    """Yield documents of the same name, and others than the first without one."""
    seen: dict[str, Node] = {}
    for name, tree in named:
        earlier = seen.setdefault(name.casefold(), tree)  # some file systems don't tell A from a
        if earlier is tree:
            continue
        if name:
            yield Remark(tree.at, f"two documents are called {name!r}, the other one in line {earlier.at.line}")
        else:
            unnamed = f"two documents have no 'name', the other one in line {earlier.at.line}: one at most may lack it"
            yield Remark(tree.at, unnamed)


def _circle(documents: Sequence[Document]) -> Iterator[Remark]:
    """Yield a circle of documents that are made of one another, if there is one."""
    places = {document.name: document.at for document in documents}
    try:
        TopologicalSorter({document.name: document.uses for document in documents}).prepare()
    except CycleError as error:
        circle = error.args[1]
        yield Remark(places[circle[0]], f"documents are made of one another: {' -> '.join(reversed(circle))}")


def _in_order(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Return the documents with each behind those it is made of, else in the order of the text."""
    waiting, ordered = list(documents), []
    made: set[str] = set()
    while waiting:
        ready = next(document for document in waiting if made.issuperset(document.uses))
        waiting.remove(ready)
        ordered.append(ready)
        made.add(ready.name)
    return tuple(ordered)
