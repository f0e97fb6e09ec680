"""Recipes of several documents: planned whole, then merged one after the other.

A result that one other document reads once, element by element, is made while it is read and never lies on a disk
(``engine.fused``). Any other that documents are made of lies in the sibling folder ``.NAME.documents`` of the output,
as an ordinary output that is resumed, verified and recognised by its manifest. What is there already, made by the same
document of the same inputs, is not made again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.checkpoint.references import plain_reference
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.finished import is_begun, is_finished, may_be_finished
from mergekit_lite.engine.fused import NotMadeError, is_in_one_read, makers, reading, reads_in_one_pass, why_not_made
from mergekit_lite.engine.ray_cluster import workers_of
from mergekit_lite.engine.run import Finished, RunOptions, check_outputs, found, run
from mergekit_lite.errors import CheckpointError, PlanError, UsageError, counted, nearest
from mergekit_lite.layout import OutputPath, output_path
from mergekit_lite.object_stores import Place
from mergekit_lite.output.promise import lay_promised
from mergekit_lite.output.working_folder import as_run_errors, own_folder
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe.documents import Document, document_in, final, text_of_chain, with_place

if TYPE_CHECKING:
    from typing_extensions import Unpack

NOTHING: Mapping[str, Checkpoint] = MappingProxyType({})


@dataclass(frozen=True)
class Step:
    """One document on its way to a model.

    Attributes:
        document: what is asked for.
        output: where its result goes.
        is_final: whether that is what was asked for; others are removed in the end.
        is_fused: whether its result is made while the next document reads it, and written nowhere.
        plan: what will be done, by what the headers of models say and what earlier steps promise.
    """

    document: Document
    output: OutputPath
    is_final: bool
    is_fused: bool
    plan: Plan

    @property
    def name(self) -> str:
        """The document's name; empty where it has none."""
        return self.document.name


class _Result(NamedTuple):
    """What a document makes: the folder with its files, or with what they promise; and its plan."""

    folder: Path
    plan: Plan

    @property
    def made_of(self) -> tuple[Checkpoint, ...]:
        """The models that it is made of, directly or not, that no document makes."""
        found: dict[str, Checkpoint] = {}
        for source in self.plan.inputs:
            for model in source.made_of or (replace(source, tensors={}),):
                found.setdefault(model.reference, model)
        return tuple(found.values())


def plan_documents(
    documents: Sequence[Document],
    output: str | Path,
    *,
    shard_size: int | None = None,
    copy_code: bool = False,
    keep: bool = False,
    resume: bool = False,
) -> tuple[Step, ...]:
    """Plan all documents of a recipe, before any of them is made.

    Args:
        documents: in an order in which they can be made.
        output: a folder or a ``.safetensors`` or ``.pt`` file, here or in an object store; with ``{name}`` in it where
            several documents are made that no other one uses.
        shard_size: most bytes of data in one file of each result.
        copy_code: copy the code of its own that a model in a folder has.
        keep: make every result, to be kept for the next run.
        resume: plan as an earlier run did, where it left its work or its output, whether that was to keep results or
            not: the bytes are the same.

    Raises:
        UsageError: the outputs can't be named.
        CheckpointError, PlanError: as ``make_plan``, with the name of the document.
    """
    steps = _planned(documents, output, shard_size, copy_code, keep)
    if resume and not _is_left(steps):
        others = _planned(documents, output, shard_size, copy_code, not keep)
        if _is_left(others):
            return others
    return steps


def _planned(
    documents: Sequence[Document], output: str | Path, shard_size: int | None, copy_code: bool, keep: bool
) -> tuple[Step, ...]:
    """Plan all documents; see ``plan_documents``."""
    wanted = final(documents)
    outputs = _outputs(documents, str(output))
    folder = documents_folder(output_path(str(output)))
    places: dict[str, OutputPath] = {each.name: outputs.get(each.name, folder / each.name) for each in documents}
    once = {name for name, count in Counter(used for each in documents for used in each.uses).items() if count == 1}
    plans: dict[str, Plan] = {}
    fused: set[str] = set()
    with _promises() as lay:
        results: dict[str, _Result] = {}
        for document in documents:
            asked = make_plan_of(document, results, places[document.name], shard_size, copy_code, documents)
            candidates = [] if keep else [name for name in document.uses if name in once and _can_be_fused(plans[name])]
            plan = _in_one_pass(asked, candidates, results)
            if plan is not asked:
                fused.update(candidates)
            plans[document.name] = plan
            if document not in wanted:
                results[document.name] = lay(document.name, plan)
    return tuple(
        Step(each, places[each.name], each in wanted, each.name in fused, plans[each.name]) for each in documents
    )


def merge_documents(
    steps: Sequence[Step],
    *,
    keep: bool = False,
    starting: Callable[[Step, Plan], None] | None = None,
    **run_options: Unpack[RunOptions],
) -> Iterator[tuple[Step, Finished | None]]:
    """Make all steps, one after the other, and yield each with what it made; None where it was there already.

    Those that are fused are made with the next one, and not yielded.

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
    written = [step for step in steps if step.name in needed and not step.is_fused]
    for folder in {step.output.parent for step in written if isinstance(step.output, Path)}:
        own_folder(folder)
    documents = [step.document for step in steps]
    fused = {step.name for step in steps if step.is_fused}
    workers = workers_of(run_options.get("ray"), run_options.get("device", CPU), run_options.get("threads"))
    with _promises() as lay, workers as crew:
        results: dict[str, _Result] = {}
        for step in steps:
            if step.output in there:
                yield step, there[step.output]
                continue
            if not step.is_final and step.name not in needed:
                continue
            size, code = step.plan.shard_size, step.plan.copy_code
            plan = make_plan_of(step.document, results, step.output, size, code, documents)
            plan = _fused(plan, [name for name in step.document.uses if name in fused], results)
            if step.is_fused:
                results[step.name] = lay(step.name, plan)
                continue
            if not step.is_final:
                assert isinstance(step.output, Path)
                results[step.name] = _Result(step.output, plan)
            if not step.is_final and is_finished(plan, 0, force=True, sync=False):
                yield step, None
                continue
            if starting is not None:
                starting(step, plan)
            options: RunOptions = {**run_options, "ray": crew}
            if not step.is_final:
                options |= {"resume": is_begun(plan), "force": True}
            yield step, run(plan, **options)
    if not keep:
        _remove(between)


class PlannedAgain(NamedTuple):
    """The plan of an output that several documents made: as it was made, and to make its tensors again."""

    as_made: Plan
    plan: Plan | None  # None where what lies between can't be made while it is read
    why: str  # then, why


def plan_documents_again(
    documents: Sequence[Document],
    output: Path,
    *,
    shard_size: int | None,
    copy_code: bool,
    text: str,
    opened: Mapping[str, Checkpoint],
    fused: Collection[str],
    device: str,
) -> PlannedAgain:
    """Plan the last of some documents again, for what it made, with all that lies between made while it is read.

    Args:
        documents: in an order in which they can be made.
        output: its name.
        shard_size: as it was.
        copy_code: as it was.
        text: that of the recipe.
        opened: the models that no document makes, by reference.
        fused: the documents that were made while they were read.
        device: the kind of device that made it.

    Raises:
        CheckpointError, PlanError: as ``make_plan``, with the name of the document.
    """
    as_made: dict[str, _Result] = {}
    again: dict[str, _Result] = {}
    why: list[str] = []
    with _promises() as lay:
        for document in documents:
            is_last = document is documents[-1]
            place, own_text = (output, text) if is_last else (Path(document.name), "")
            asked = make_plan_of(document, as_made, place, shard_size, copy_code, documents, opened, own_text)
            own = _fused(asked, [name for name in document.uses if name in fused], as_made)
            try:
                plan = asked if why else _fused(asked, document.uses, again)
            except NotMadeError as error:
                why.append(f"{called(document)}: {error}")
                plan = asked
            if is_last:
                return PlannedAgain(own, None if why else plan, "; ".join(why))
            if reason := why_not_made(plan, device):
                why.append(f"{called(document)} {reason}")
            as_made[document.name] = lay(document.name, own)
            again[document.name] = as_made[document.name]._replace(plan=plan)
    raise AssertionError("a recipe has a document")


def make_plan_of(
    document: Document,
    results: Mapping[str, _Result],
    output: OutputPath,
    shard_size: int | None,
    copy_code: bool,
    documents: Sequence[Document],
    opened: Mapping[str, Checkpoint] = NOTHING,
    text: str = "",
) -> Plan:
    """Return a document's plan by the results of others, with the text of a recipe that makes it of its own.

    Raises CheckpointError and PlanError as ``make_plan``, with the name of the document.
    """
    try:
        models = dict(opened)
        for reference in document.recipe.models:
            if name := document_in(reference, document.uses):
                model = open_checkpoint(with_place(reference, name, str(results[name].folder)))
                models[reference] = replace(model, reference=reference, made_of=results[name].made_of)
        own_text = text or text_of_chain(document, documents)
        plan = make_plan(
            document.recipe, [output], shard_size=shard_size, copy_code=copy_code, text=own_text, opened=models
        )
        folders = [f"{name} is the document of that name; {Path(name).absolute()} is not read" for name in document.uses
                   if Path(name).exists()]  # fmt: skip
        return replace(plan, notes=(*plan.notes, *folders))
    except PlanError as error:
        raise PlanError([f"{called(document)}: {problem}" for problem in error.problems]) from error
    except CheckpointError as error:
        raise CheckpointError(f"{called(document)}: {error}{''.join(_misspelt(document, documents))}") from error


def _misspelt(document: Document, documents: Sequence[Document]) -> Iterator[str]:
    """Yield which documents may be meant by models that are not there."""
    names = [each.name for each in documents if each.name and each is not document]
    for reference in document.recipe.models:
        model = plain_reference(reference).partition("+")[0]
        if not document_in(reference, document.uses) and not Path(model).exists() and (hint := nearest(model, names)):
            yield f" No document is called {model!r}.{hint}"


@contextmanager
def _promises() -> Iterator[Callable[[str, Plan], _Result]]:
    """Give a function that lays what a document's plan promises into a folder that is there for a while."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()

        def lay(name: str, plan: Plan) -> _Result:
            folder = root / name
            folder.mkdir()
            lay_promised(plan, folder)
            return _Result(folder, plan)

        yield lay


def _can_be_fused(plan: Plan) -> bool:
    """Return whether a document's result may be made while it is read: from the same elements of models alone."""
    return is_in_one_read(plan) and not any(source.made_of and source.added for source in plan.inputs)


def _in_one_pass(plan: Plan, names: Sequence[str], results: Mapping[str, _Result]) -> Plan:
    """Return a plan that makes some results while it reads them; itself where it can't, or would read them twice."""
    try:
        fused = _fused(plan, names, results)
    except NotMadeError:
        return plan
    return fused if reads_in_one_pass(fused) else plan


def _fused(plan: Plan, names: Collection[str], results: Mapping[str, _Result]) -> Plan:
    """Return a plan that makes some results while it reads them. Raises NotMadeError where it can't."""
    if not names:
        return plan
    made = {place: maker for name in names for place, maker in makers(results[name].plan, results[name].folder).items()}
    inputs = []
    for source in plan.inputs:
        name = document_in(source.reference, names)
        behind = (each for model in results[name].plan.inputs for each in model.made_while_read) if name else ()
        inputs.append(replace(source, made_while_read=tuple(dict.fromkeys([name, *behind]))) if name else source)
    return replace(reading(plan, made), inputs=tuple(inputs))


def _needed(steps: Sequence[Step], there: Collection[OutputPath]) -> set[str]:
    """Return the documents whose results are read by what is not there yet, directly or not."""
    needed: set[str] = set()
    for step in reversed(steps):
        if step.name in needed or (step.is_final and step.output not in there):
            needed |= set(step.document.uses)
    return needed


def documents_folder(output: OutputPath) -> Path:
    """Return the folder for what lies between a recipe's documents: beside the output, or here if that is elsewhere.

    It is as relative as the output: recipes and manifests name it, and shouldn't name folders of this machine.
    """
    beside = Path(output.name) if isinstance(output, Place) else output
    return beside.with_name(f".{output.name}.documents")


def _outputs(documents: Sequence[Document], output: str) -> dict[str, OutputPath]:
    """Return the paths of the documents that are wanted. Raises UsageError where names are missing."""
    wanted = final(documents)
    if len(wanted) == 1:
        return {wanted[0].name: output_path(output.replace("{name}", wanted[0].name))}
    names = ", ".join(each.name or "one without a name" for each in wanted)
    made = f"The recipe makes {counted(len(wanted), 'model')} that no other document uses: {names}."
    made += "".join(hint for document in documents for hint in _misspelt(document, wanted))
    if not all(each.name for each in wanted):
        raise UsageError(f"{made} Give each of them a 'name', and put {{name}} into the output's.")
    if "{name}" not in output:
        raise UsageError(f"{made} Put {{name}} into the output's name: -o 'out-{{name}}'.")
    return {each.name: output_path(output.replace("{name}", each.name)) for each in wanted}


def called(document: Document) -> str:
    """Return how messages name a document: by its name, or by its line."""
    return f"Document {document.name!r}" if document.name else f"The document of line {document.at.line}"


def _is_left(steps: Sequence[Step]) -> bool:
    """Return whether an earlier run by these very plans left work or an output of what was asked for."""
    return any(step.is_final and (may_be_finished(step.plan, 0) or is_begun(step.plan)) for step in steps)


def _remove(outputs: Sequence[Path]) -> None:
    """Remove what steps in between made, and their folder where nothing else is in it."""
    for output in outputs:
        with as_run_errors(output), suppress(FileNotFoundError):
            shutil.rmtree(output)
    for folder in {output.parent for output in outputs}:
        with suppress(OSError):
            folder.rmdir()
