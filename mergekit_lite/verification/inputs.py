"""The inputs of an output, found again and held to what was recorded of them; and its plan, made again from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.checkpoint.references import Addend
from mergekit_lite.errors import CheckpointError, MergekitLiteError, UsageError, listing, nearest
from mergekit_lite.output.workspace import is_single_file
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import parse, to_yaml
from mergekit_lite.verification.manifest import Input, Manifest
from mergekit_lite.verification.verdict import Finding

COMBINES = "combines"  # in the recipe of a combination of task vectors


@dataclass
class Inputs:
    """The inputs that could be opened, by their recorded references; what is wrong; which ones are gone, and why."""

    opened: dict[str, Checkpoint] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    gone: dict[str, str] = field(default_factory=dict)
    renamed: bool = False


def open_inputs(manifest: Manifest, moved: Mapping[str, str]) -> Inputs:
    """Find every input and compare its files with what was recorded of them: names, sizes, digests of headers.

    Args:
        manifest: of the output.
        moved: for recorded references, where those models are now.

    Raises:
        UsageError: ``moved`` names something that is no input, or a place where nothing is.
    """
    for reference in moved:
        if reference not in manifest.references:
            known = ", ".join(manifest.references)
            raise UsageError(
                f"{reference} is no input of this output: {known}.{nearest(reference, manifest.references)}"
            )
    inputs = Inputs()
    if COMBINES in manifest.recipe:
        why = "is a task vector, and combinations of those are held to their digests but not made again"
        inputs.gone = dict.fromkeys(manifest.references, why)
        return inputs
    for recorded in manifest.inputs:
        _open(recorded, moved.get(recorded.reference), inputs)
    return inputs


def _open(recorded: Input, place: str | None, inputs: Inputs) -> None:
    reference = recorded.reference
    parts = _parts(recorded)
    if place is None and not all(revision or _is_here(part) for part, revision in parts):
        inputs.gone[reference] = "is not there, seen from this folder"
        return
    try:
        found = open_checkpoint(place or _pinned(recorded))
    except CheckpointError as error:
        if place is not None and not _is_here(place):
            raise UsageError(f"--input {reference}={place}: {error}") from error
        if any(revision for _, revision in parts):
            inputs.gone[reference] = str(error)
        else:
            inputs.findings.append(Finding(reference, f"is an input that can't be read any more: {error}"))
        return
    inputs.opened[reference] = replace(found, reference=reference)
    _compare(recorded, found, inputs)


def _parts(recorded: Input) -> list[tuple[str, str | None]]:
    """The base and what is added to it, each with the commit of the hub repository that it was."""
    base = recorded.base or recorded.reference
    return [(base, recorded.revision), *((each.reference, each.revision) for each in recorded.added)]


def _pinned(recorded: Input) -> str:
    """The reference, each hub repository in it at the commit that it was."""
    base, *added = (f"{part.partition('@')[0]}@{commit}" if commit else part for part, commit in _parts(recorded))
    addends = [Addend(path, each.scale, each.rebase) for path, each in zip(added, recorded.added, strict=True)]
    return "+".join([base, *map(str, addends)])


def _is_here(reference: str) -> bool:
    """Whether something local is where it was: what only looks like a hub repository must not be fetched."""
    try:
        return Path(reference).expanduser().exists()
    except (OSError, RuntimeError):  # too long a name, a home of nobody
        return False


def _compare(recorded: Input, found: Checkpoint, inputs: Inputs) -> None:
    if len(found.files) != len(recorded.files):
        what = f"is an input that had {len(recorded.files)} files of weights, now it has {len(found.files)}"
        inputs.findings.append(Finding(recorded.reference, what))
        return
    for before, now in zip(recorded.files, found.files, strict=True):
        where = f"{recorded.reference}: {now.path.name}"
        inputs.renamed |= before.name != now.path.name
        if before.size != now.size:
            inputs.findings.append(Finding(where, f"an input that changed: {now.size:,} bytes, it had {before.size:,}"))
        elif before.header_xxh3_128 != now.header_digest:
            inputs.findings.append(Finding(where, "an input that changed: its header is another one"))


def plan_again(output: Path, manifest: Manifest, opened: Mapping[str, Checkpoint]) -> Plan:
    """The plan that made an output, from its manifest and its opened inputs.

    Raises:
        MergekitLiteError: the recipe is not one, or the inputs don't fit it any more.
    """
    name = Path(manifest.files[0].name) if is_single_file(output) else Path(output.name)
    written = manifest.recipe.get("text")
    text = written if isinstance(written, str) else ""
    recipe = parse(text or to_yaml(manifest.recipe), "The manifest's recipe")
    _check_known(recipe.models, opened)
    return make_plan(recipe, [name], shard_size=manifest.shard_size, text=text, opened=opened)


def _check_known(models: tuple[str, ...], opened: Mapping[str, Checkpoint]) -> None:
    """Raise MergekitLiteError where a recipe names models that the manifest doesn't list: none of those is opened."""
    if strange := [model for model in models if model not in opened]:
        raise MergekitLiteError(listing("the recipe names models that are not among the inputs", strange))
