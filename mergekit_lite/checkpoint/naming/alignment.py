"""Show a checkpoint under the names of another, where the two hold one model under two namings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from mergekit_lite.checkpoint.checkpoint import Checkpoint
from mergekit_lite.checkpoint.naming import transformers_tables
from mergekit_lite.checkpoint.naming.experts import stored_as
from mergekit_lite.checkpoint.naming.matching import Naming, Shape, match_names, without_wrappers
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.tied_weights import is_head
from mergekit_lite.errors import CheckpointError, counted, listing

WITHIN_LAYERS = re.compile(r"(^|\.)\d+\..*\.")
BEGINNING = re.compile(r"(?:[^.]*[^.\d][^.]*\.){1,2}")  # two components, or fewer before a number or at the end
SYNONYMS = (  # ends of names: GPT-NeoX's head in two versions of transformers, a weight's norm in two of PyTorch
    ("embed_out.weight", "lm_head.weight"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)
REMEDY = "Load and save both with the same program, so that they have the same names"
SHOWN = 3


def unwrapped(model: Checkpoint) -> Checkpoint:
    """Return a folder's checkpoint without wrappers (``_orig_mod.``) in its names, which no loader knows.

    A file without a config belongs to a program of its own, so its names stay.
    """
    names = without_wrappers(model.tensors) if model.config else {}
    return _noted(model, _renamed(model.tensors, Naming(names)), Naming(names).summary) if names else model


def shown_as(model: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a checkpoint with its tensors under another's names, experts stored as there; its notes say what changed.

    Names and shapes decide (``matching``, ``experts``). What they leave open within layers is looked up in the tables
    of transformers, where that is installed. What isn't matched keeps its name.
    """
    if model.tensors.keys() == other.tensors.keys() and _shapes(model.tensors) == _shapes(other.tensors):
        return model
    naming = match_names(_shapes(model.tensors), _shapes(other.tensors))
    tensors, moved = stored_as(_renamed(model.tensors, naming), other.tensors)
    if _differ_within_layers(tensors, other.tensors):
        table = transformers_tables.match_names(
            model.tensors, model.config or other.config, other.tensors, other.config or model.config
        )
        by_table, moved_by_table = stored_as(_renamed(model.tensors, table), other.tensors) if table else ({}, 0)
        if table and len(by_table.keys() & other.tensors.keys()) > len(tensors.keys() & other.tensors.keys()):
            naming, tensors, moved = table, by_table, moved_by_table
    tensors = _renamed(tensors, Naming(_synonyms(_shapes(tensors), _shapes(other.tensors))))
    experts = f"experts are read as {counted(moved, 'tensor')}, as {other.reference} has them" if moved else ""
    return _noted(model, tensors, naming.summary, experts)


def as_part(model: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a model that stands for a part of another, with its tensors under the names that they have there.

    A head that the other keeps beside that part is its head. Raises CheckpointError where no name of the other begins
    so, or tensors of the model have no place there: none of them gets lost.
    """
    beginning = model.stands_for
    places = {name.removeprefix(beginning): name for name in other.tensors if name.startswith(beginning)}
    if not places:
        raise CheckpointError(
            f"{model.reference}: no tensor of {other.reference} has a name that begins with {beginning!r}. They begin "
            f"with {_beginnings(other.tensors)}"
        )
    if not any(map(is_head, places)):
        places |= {".".join(name.split(".")[-2:]): name for name in other.tensors if is_head(name)}
    naming = match_names(_shapes(model.tensors), {bare: other.tensors[name].shape for bare, name in places.items()})
    if homeless := [name for name in naming.unmatched if not is_head(name)]:  # a head may stand for a tied one
        lost = f"{counted(len(homeless), 'tensor')} with no place in {beginning} of {other.reference}"
        raise CheckpointError(listing(f"{model.reference}: {lost}", homeless))
    names = {own: places.get(bare, bare) for own, bare in naming.names.items()}
    return _noted(model, _renamed(model.tensors, Naming(names)), Naming(names).summary)


def _synonyms(own: Mapping[str, Shape], other: Mapping[str, Shape]) -> dict[str, str]:
    """Return all names of a model; where the other has a synonym of a name instead, that."""
    names = dict.fromkeys(own)
    for one, two in SYNONYMS:
        for known, wanted in ((one, two), (two, one)):
            for name in own.keys() - other.keys():
                synonym = name.removesuffix(known) + wanted
                if name.endswith(known) and synonym not in own and other.get(synonym) == own[name]:
                    names[name] = synonym
    return {name: synonym or name for name, synonym in names.items()}


def names_differ(model: Checkpoint, other: Checkpoint) -> str | None:
    """Return in a sentence how the names of two models differ; None where one has all names of the other, or nearly."""
    unmatched = [name for name in model.tensors if name not in other.tensors]
    lacking = [name for name in other.tensors if name not in model.tensors]
    if not _differ_within_layers(unmatched, lacking):
        return None
    ways = [
        f"{own} could be {one} or {two} of {other.reference}"
        for own, one, two in match_names(_shapes(model.tensors), _shapes(other.tensors)).ambiguous
    ]
    if ways:
        return f"The names of {model.reference} can be read in several ways: {'; '.join(ways[:SHOWN])}. {REMEDY}"
    return (
        f"{counted(len(unmatched), 'tensor')} of {model.reference} ({_beginnings(unmatched)}) and "
        f"{counted(len(lacking), 'tensor')} of {other.reference} ({_beginnings(lacking)}) have no counterpart in the "
        f"other model: these are different models, or one of them was saved under names that aren't known. {REMEDY}"
    )


def _noted(model: Checkpoint, tensors: Mapping[str, TensorSpec], *notes: str) -> Checkpoint:
    """Return the model with other tensors, and the notes that say something."""
    return replace(
        model, tensors=tensors, notes=(*model.notes, *(f"{model.reference}: {note}" for note in notes if note))
    )


def _differ_within_layers(own: Iterable[str], other: Iterable[str]) -> bool:
    """Return whether each of two models has tensors within layers that the other lacks."""
    mine, theirs = set(own), set(other)
    return all(any(WITHIN_LAYERS.search(name) for name in names) for names in (mine - theirs, theirs - mine))


def _shapes(tensors: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    return {name: spec.shape for name, spec in tensors.items()}


def _renamed(tensors: Mapping[str, TensorSpec], naming: Naming) -> dict[str, TensorSpec]:
    return {
        naming.names[name]: spec if naming.names[name] == name else replace(spec, name=naming.names[name])
        for name, spec in tensors.items()
    }


def _beginnings(names: Iterable[str]) -> str:
    counts = Counter(match[0] if (match := BEGINNING.match(name)) else name for name in names)
    return ", ".join([f"{beginning}…" for beginning, _ in counts.most_common(SHOWN)] + ["…"] * (len(counts) > SHOWN))
