"""Inputs of an output: opened again and held to the manifest; and the plan, made again from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from mergekit_lite.checkpoint.references import Addition, split_key
from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.errors import CheckpointError, MergekitLiteError, UsageError, listing, nearest
from mergekit_lite.layout import is_single_file
from mergekit_lite.mixtures.building.building import mixture_again
from mergekit_lite.mixtures.building.planning import METHOD as MIXTURE
from mergekit_lite.mixtures.recorded import METHODS as REMADE
from mergekit_lite.mixtures.recorded import plan_recorded
from mergekit_lite.multimerge import PlannedAgain, plan_documents_again
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import to_yaml
from mergekit_lite.recipe.documents import Document, document_in, parse_documents
from mergekit_lite.transplanting.planning import TRANSPLANT
from mergekit_lite.transplanting.planning import planned_again as transplant_again
from mergekit_lite.verification.manifest_schema import Manifest, RecordedInput
from mergekit_lite.verification.result import Finding

COMBINES = "combines"  # in the recipe of a combination of task vectors


@dataclass
class OpenedInputs:
    """Inputs of an output, as far as they can be opened.

    Attributes:
        opened: by recorded reference.
        findings: what is wrong with the inputs.
        gone: for each reference that can't be opened, why.
        renamed: True where a file of weights has another name now.
    """

    opened: dict[str, Checkpoint] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    gone: dict[str, str] = field(default_factory=dict)
    renamed: bool = False


def open_inputs(manifest: Manifest, moved: Mapping[str, str]) -> OpenedInputs:
    """Open every input and compare its files with the manifest: names, sizes, digests of headers.

    Args:
        manifest: of the output.
        moved: where models are now, by their recorded references.

    Raises:
        UsageError: ``moved`` names something that is no input, or a place where no model is.
    """
    for reference in moved:
        if reference not in manifest.references:
            known = ", ".join(manifest.references)
            raise UsageError(
                f"{reference} is no input of this output: {known}.{nearest(reference, manifest.references)}"
            )
    inputs = OpenedInputs()
    if COMBINES in manifest.recipe:
        why = "is a task vector, and combinations of those are held to their digests but not made again"
        inputs.gone = dict.fromkeys(manifest.references, why)
        return inputs
    for recorded in manifest.models:
        _open(recorded, moved.get(recorded.reference), inputs)
    return inputs


def _open(recorded: RecordedInput, place: str | None, inputs: OpenedInputs) -> None:
    """Open one input, at ``place`` if one is given, and note the result in ``inputs``."""
    reference = recorded.reference
    parts = _parts(recorded)
    if place is None and not all(revision or _is_here(part) for part, revision in parts):
        inputs.gone[reference] = "is not there, seen from this folder"
        return
    try:
        model = open_checkpoint(place or _pinned(recorded))
    except CheckpointError as error:
        if place is not None and not _is_here(place):
            raise UsageError(f"--input {reference}={place}: {error}") from error
        if any(revision for _, revision in parts):
            inputs.gone[reference] = str(error)
        else:
            inputs.findings.append(Finding(reference, f"is an input that can't be read any more: {error}"))
        return
    inputs.opened[reference] = replace(model, reference=reference)
    _compare(recorded, model, inputs)


def _parts(recorded: RecordedInput) -> list[tuple[str, str | None]]:
    """Return the base and what is added to it, each with its commit if it is a hub repository."""
    base = recorded.base or recorded.reference
    return [(base, recorded.revision), *((each.reference, each.revision) for each in recorded.added)]


def _pinned(recorded: RecordedInput) -> str:
    """Return the reference, with each hub repository at its recorded commit."""
    base, *added = (f"{part.partition('@')[0]}@{commit}" if commit else part for part, commit in _parts(recorded))
    additions = [Addition(path, each.scale, each.rebase) for path, each in zip(added, recorded.added, strict=True)]
    return "+".join([base, *map(str, additions)])


def _is_here(reference: str) -> bool:
    """Return True where a local path exists: a missing path that looks like a hub repository must not be fetched."""
    try:
        return is_elsewhere(reference) or split_key(reference)[0].exists()
    except (OSError, RuntimeError):  # too long a name, a home of nobody
        return False


def _compare(recorded: RecordedInput, model: Checkpoint, inputs: OpenedInputs) -> None:
    """Note in ``inputs`` how the files of a model differ from the recorded ones."""
    if len(model.files) != len(recorded.files):
        what = f"is an input that had {len(recorded.files)} files of weights, now it has {len(model.files)}"
        inputs.findings.append(Finding(recorded.reference, what))
        return
    for before, now in zip(recorded.files, model.files, strict=True):
        where = f"{recorded.reference}: {now.name}"
        inputs.renamed |= before.name != now.name
        if before.size != now.size:
            inputs.findings.append(Finding(where, f"an input that changed: {now.size:,} bytes, it had {before.size:,}"))
        elif before.header_xxh3_128 != now.header_digest:
            inputs.findings.append(Finding(where, "an input that changed: its header is another one"))
        elif before.etag and now.etag and before.etag != now.etag:
            inputs.findings.append(Finding(where, "an input that changed, or was uploaded again: its etag is another"))


def plan_again(
    output: Path, manifest: Manifest, opened: Mapping[str, Checkpoint], written: Mapping[str, TensorSpec]
) -> PlannedAgain:
    """Make the plan of an output again, from its manifest, its opened inputs and, of a mixture, its own routers.

    Of several documents, what lies between is made while it is read.

    Raises:
        MergekitLiteError: the recipe is not one, or the inputs don't fit it any more.
    """
    name = Path(manifest.files[0].name) if is_single_file(output) else Path(output.name)
    if (plan := _of_no_merge(manifest, name, opened, written)) is not None:
        return PlannedAgain(plan, plan, "")
    given = manifest.recipe.get("text")
    text = given if isinstance(given, str) else ""
    documents = parse_documents(text or to_yaml(manifest.recipe), "The manifest's recipe")
    _check_known(documents, opened)
    size, code = manifest.shard_size, manifest.copy_code
    if len(documents) == 1:
        recipe = documents[0].recipe
        plan = make_plan(recipe, [name], shard_size=size, copy_code=code, text=text, opened=opened)
        return PlannedAgain(plan, plan, "")
    return plan_documents_again(
        documents,
        name,
        shard_size=size,
        copy_code=code,
        text=text,
        opened=opened,
        fused=manifest.fused,
        device=manifest.device,
    )


def _of_no_merge(
    manifest: Manifest, name: Path, opened: Mapping[str, Checkpoint], written: Mapping[str, TensorSpec]
) -> Plan | None:
    """Return the plan of a mixture of experts or of a transplant; None for what a recipe of merges made."""
    size, code = manifest.shard_size, manifest.copy_code
    method = manifest.recipe.get("merge_method")
    if method == MIXTURE:
        return mixture_again(manifest.recipe, name, opened, size, written)
    if method in REMADE:
        return plan_recorded(manifest.recipe, name, opened, size, code)
    if method == TRANSPLANT:
        models = tuple(str(manifest.recipe.get(key)) for key in ("model", "donor"))
        _check_opened(models, opened)
        return transplant_again(manifest.recipe, name, shard_size=size, copy_code=code, opened=opened)
    return None


def _check_known(documents: Sequence[Document], opened: Mapping[str, Checkpoint]) -> None:
    """Raise MergekitLiteError where documents name models or statistics that the manifest doesn't list."""
    models = [model for each in documents for model in each.recipe.models if not document_in(model, each.uses)]
    _check_opened([*models, *(file for each in documents for file in each.recipe.statistics)], opened)


def _check_opened(models: Iterable[str], opened: Mapping[str, Checkpoint]) -> None:
    """Raise MergekitLiteError for models that are not opened: the manifest doesn't list them."""
    if strange := [model for model in models if model not in opened]:
        raise MergekitLiteError(listing("the recipe names models that are not among the inputs", strange))
