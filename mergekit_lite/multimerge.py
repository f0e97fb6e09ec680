"""Recipes of several documents: planned whole, then merged one after the other.

A result that others are made of lies in the sibling folder ``.NAME.documents`` of the output, as an ordinary output
that is resumed, verified and recognised by its manifest. What is there already, made by the same document of the same
inputs, is not made again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.engine.finished import is_finished
from mergekit_lite.engine.run import Finished, RunOptions, check_outputs, found, run
from mergekit_lite.errors import CheckpointError, PlanError, UsageError, counted
from mergekit_lite.layout import OutputPath, output_path
from mergekit_lite.object_stores import Place
from mergekit_lite.output.journal import plan_of
from mergekit_lite.output.promise import lay_promised
from mergekit_lite.output.working_folder import as_run_errors, left_by_earlier_run, own_folder
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import Recipe, as_data, to_yaml
from mergekit_lite.recipe.documents import Document, ancestors, final, with_results

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Step:
    """One document on its way to a model.

    Attributes:
        name: the document's; empty where it has none.
        output: where its result goes.
        is_final: whether that is what was asked for; others are removed in the end.
        plan: what will be done, by what the headers of models say and what earlier steps promise.
        recipe: the document with paths instead of other documents' names.
        text: the recipe's text; before it, as remarks, those of the documents that it is made of.
        shard_size: as of ``make_plan``.
        copy_code: as of ``make_plan``.
        uses: the names of the documents whose results it reads.
    """

    name: str
    output: OutputPath
    is_final: bool
    plan: Plan
    recipe: Recipe
    text: str
    shard_size: int | None
    copy_code: bool
    uses: tuple[str, ...]

    def planned_anew(self) -> Plan:
        """Return the plan by the results of earlier steps, which are there now. Raises as ``make_plan``."""
        return make_plan(
            self.recipe, [self.output], shard_size=self.shard_size, copy_code=self.copy_code, text=self.text
        )


def plan_documents(
    documents: Sequence[Document], output: str | Path, *, shard_size: int | None = None, copy_code: bool = False
) -> tuple[Step, ...]:
    """Plan all documents of a recipe, before any of them is made.

    Args:
        documents: in an order in which they can be made.
        output: a folder or a ``.safetensors`` or ``.pt`` file, here or in an object store; with ``{name}`` in it where
            several documents are made that no other one uses.
        shard_size: most bytes of data in one file of each result.
        copy_code: copy the code of its own that a model in a folder has.

    Raises:
        UsageError: the outputs can't be named.
        CheckpointError, PlanError: as ``make_plan``, with the name of the document.
    """
    wanted = final(documents)
    outputs = _outputs(wanted, str(output))
    folder = documents_folder(output_path(str(output)))
    places: dict[str, OutputPath] = {each.name: outputs.get(each.name, folder / each.name) for each in documents}
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as promised:
        at = {each.name: Path(promised, str(number)) for number, each in enumerate(documents)}
        for document in documents:
            recipe = with_results(document, lambda name: str(places[name]))
            text = _with_remarks(document, documents) if document in wanted else ""
            text += to_yaml(as_data(recipe))
            try:
                opened = _promised(document, recipe, lambda name: at[name])
                plan = make_plan(
                    recipe,
                    [places[document.name]],
                    shard_size=shard_size,
                    copy_code=copy_code,
                    text=text,
                    opened=opened,
                )
            except PlanError as error:
                raise PlanError([f"{_called(document)}: {problem}" for problem in error.problems]) from error
            except CheckpointError as error:
                raise CheckpointError(f"{_called(document)}: {error}") from error
            steps.append(
                Step(
                    document.name,
                    places[document.name],
                    document in wanted,
                    plan,
                    recipe,
                    text,
                    shard_size,
                    copy_code,
                    document.uses,
                )
            )
            if document not in wanted:
                at[document.name].mkdir()
                lay_promised(plan, at[document.name])
    return tuple(steps)


def merge_documents(
    steps: Sequence[Step],
    *,
    keep: bool = False,
    starting: Callable[[Step, Plan], None] | None = None,
    **run_options: Unpack[RunOptions],
) -> Iterator[tuple[Step, Finished | None]]:
    """Make all steps, one after the other, and yield each with what it made; None where it was there already.

    Args:
        steps: from ``plan_documents``.
        keep: leave what steps in between made in its folder, for the next run.
        starting: called with each step that is made, and its plan, before it is.
        **run_options: see ``RunOptions``. ``resume`` and ``force`` are for what was asked for: what lies between is
            always gone on with, and replaced where it belongs to something else.

    Raises:
        UsageError: an output exists.
        RunError, NonFiniteError, CheckpointError: as ``run``.
    """
    resume, force = run_options.get("resume", False), run_options.get("force", False)
    for step in steps:
        if step.is_final:
            check_outputs(step.plan, resume=resume, force=force)
    there = {}
    for step in steps:
        if resume and step.is_final and (made := found(step.plan, force=force, sync=run_options.get("sync", False))):
            there[step.output] = made
    needed = _needed(steps, there)
    between = [step.output for step in steps if not step.is_final and isinstance(step.output, Path)]
    for folder in {step.output.parent for step in steps if isinstance(step.output, Path) and step.name in needed}:
        own_folder(folder)
    for step in steps:
        if step.output in there:
            yield step, there[step.output]
            continue
        if not step.is_final and step.name not in needed:
            continue
        plan = step.planned_anew()
        if not step.is_final and is_finished(plan, 0, force=True, sync=False):
            yield step, None
            continue
        if starting is not None:
            starting(step, plan)
        options: RunOptions = {**run_options}
        if not step.is_final:
            options |= {"resume": _is_begun(plan), "force": True}
        yield step, run(plan, **options)
    if not keep:
        _remove(between)


def _needed(steps: Sequence[Step], there: Collection[OutputPath]) -> set[str]:
    """Return the documents whose results are read by what is not there yet, directly or not."""
    needed: set[str] = set()
    for step in reversed(steps):
        if step.name in needed or (step.is_final and step.output not in there):
            needed |= set(step.uses)
    return needed


def documents_folder(output: OutputPath) -> Path:
    """Return the folder for what lies between a recipe's documents: beside the output, or here if that is elsewhere."""
    beside = Path(output.name) if isinstance(output, Place) else output
    return beside.absolute().with_name(f".{output.name}.documents")


def _outputs(wanted: Sequence[Document], output: str) -> dict[str, OutputPath]:
    """Return the paths of the documents that are wanted. Raises UsageError where names are missing."""
    if len(wanted) == 1:
        return {wanted[0].name: output_path(output.replace("{name}", wanted[0].name))}
    names = ", ".join(each.name or "one without a name" for each in wanted)
    made = f"The recipe makes {counted(len(wanted), 'model')} that no other document uses: {names}."
    if not all(each.name for each in wanted):
        raise UsageError(f"{made} Give each of them a 'name', and put {{name}} into the output's.")
    if "{name}" not in output:
        raise UsageError(f"{made} Put {{name}} into the output's name: -o 'out-{{name}}'.")
    return {each.name: output_path(output.replace("{name}", each.name)) for each in wanted}


def _promised(document: Document, recipe: Recipe, at: Callable[[str], Path]) -> Mapping[str, Checkpoint]:
    """Open what earlier documents promise, under the references that it will have once it is made."""
    temporary = with_results(document, lambda name: str(at(name)))
    opened = {}
    for reference, now in zip(recipe.models, temporary.models, strict=True):
        if reference not in document.recipe.models:
            opened[reference] = replace(open_checkpoint(now), reference=reference)
    return opened


def _with_remarks(document: Document, documents: Sequence[Document]) -> str:
    """Return the documents that one is made of, as remarks for its own text."""
    lines: list[str] = []
    for each in ancestors(document, documents):
        lines += [f"name: {each.name}", *to_yaml(as_data(each.recipe)).splitlines(), "---"]
    heading = "Made of the results of these documents, each a merge of its own:"
    return "".join(f"# {line}\n" for line in [heading, *lines]) if lines else ""


def _called(document: Document) -> str:
    return f"Document {document.name!r}" if document.name else f"The document of line {document.at.line}"


def _is_begun(plan: Plan) -> bool:
    """Return whether an earlier run of the same plan left its work."""
    output = plan.outputs[0]
    assert isinstance(output, Path)
    with left_by_earlier_run(output) as folder:
        return folder is not None and plan_of(folder.journal) == plan.digest(0)


def _remove(outputs: Sequence[Path]) -> None:
    """Remove what steps in between made, and their folder where nothing else is in it."""
    for output in outputs:
        with as_run_errors(output), suppress(FileNotFoundError):
            shutil.rmtree(output)
    for folder in {output.parent for output in outputs}:
        with suppress(OSError):
            folder.rmdir()
