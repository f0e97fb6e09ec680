"""Which of the nested dictionaries that a trainer saved holds the weights of the model.

What they hold decides, as a loss may lie beside a model, and the optimizer has tensors of the same shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.checkpoint.formats.header import check_name
from mergekit_lite.errors import CheckpointError, listing, nearest, shortened

NESTS = ("state_dict", "model", "module", "state")  # keys that training programs put a model's weights under
OPTIMIZER = re.compile(r"(chained_\d+\.)?(?P<key>optim\w*)(\.|$)")  # its states have the shapes of the weights
MAX_NESTING = 4


class Extent(NamedTuple):
    """The shape of a tensor that was saved, and whether it is of floats."""

    shape: tuple[int, ...]
    is_float: bool


Measure = Callable[[object], Extent | None]  # None for what is no tensor


class Found(NamedTuple):
    """The weights of a model among what was saved."""

    nest: tuple[str, ...]  # the keys that they are under
    tensors: dict[str, Any]
    others: list[str]  # names of what is left out


def find_state(
    where: Path, content: object, within: str, measure: Measure, remedy: Callable[[Sequence[str]], str] | None = None
) -> Found:
    """Return the weights in nested dictionaries, or in what is under the keys ``within``, which have dots between them.

    ``remedy`` says what else to do than naming keys where weights are in several places. Raises CheckpointError there,
    and where ``within`` is not in the content. Where it holds no weights, no tensors are returned.
    """
    state = _State(where, measure, remedy)
    nest: tuple[str, ...] = ()
    others: list[str] = []
    for part in within.split(".") if within else ():
        if not isinstance(content, Mapping) or not isinstance(content.get(part), Mapping):
            raise _no_mapping(where, within, nest, part, content)
        others += [".".join((*nest, label(other))) for other in content if other != part]
        nest, content = (*nest, part), content[part]
    # Go down to the mapping that holds the weights, and note what is passed on the way.
    while (key := state.nest_key(nest, content)) is not None and len(nest) < MAX_NESTING:
        assert isinstance(content, Mapping)
        others += [".".join((*nest, label(other))) for other in content if other != key]
        nest, content = (*nest, key), content[key]
    tensors = state.tensors(content)
    if isinstance(content, Mapping):
        others += [".".join((*nest, label(key))) for key in content if key not in tensors]
    return Found(nest, tensors, others)


def label(key: object) -> str:
    """Return how a key of a pickled dictionary is shown; only text is safe to print."""
    return shortened(key, 80) if isinstance(key, str) and key.isprintable() else f"<{type(key).__name__}>"


class _State(NamedTuple):
    """The rule by which the weights are found."""

    where: Path
    measure: Measure
    remedy: Callable[[Sequence[str]], str] | None

    def tensors(self, content: object) -> dict[str, Any]:
        """Return the tensors of a mapping by name, not those in mappings within it."""
        if not isinstance(content, Mapping):
            return {}
        return {key: value for key, value in content.items() if isinstance(key, str) and self.measure(value)}

    def nest_key(self, nest: tuple[str, ...], content: object) -> str | None:
        """Return the key under which the weights are, or None where they are here already.

        What the mappings hold decides, as a file may keep a loss beside its model. Weights in several places are
        refused.
        """
        if not isinstance(content, Mapping):
            return None
        loose = self._extents(content)
        nested = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
        held = {key: self._held(value) for key, value in nested.items() if not OPTIMIZER.match(key)}
        # A mapping of vectors is a model only under a known name: others are losses, counters, states of generators.
        weights = [key for key, extents in held.items() if _holds_weights(extents, 1 if key in NESTS else 2)]
        if not weights:
            return None if loose else next((key for key in NESTS if key in nested), None)
        numbers = sum(math.prod(each.shape) for each in held[weights[0]])
        floats = sum(math.prod(each.shape) for each in loose if each.is_float)
        here = _holds_weights(loose, 2) or (bool(loose) and floats >= numbers)
        if len(weights) > 1 or here:
            self._refuse_choice(nest, weights, here)
        check_name(self.where, weights[0])
        return weights[0]

    def _extents(self, content: Mapping[object, object]) -> list[Extent]:
        return [extent for key, value in content.items() if isinstance(key, str) and (extent := self.measure(value))]

    def _held(self, content: Mapping[object, object], depth: int = 1) -> list[Extent]:
        """Return the tensors of a mapping, and of those nested in it under the known names."""
        extents = self._extents(content)
        for key in NESTS if depth < MAX_NESTING else ():
            if isinstance(inner := content.get(key), Mapping):
                extents += self._held(inner, depth + 1)
        return extents

    def _refuse_choice(self, nest: tuple[str, ...], keys: Sequence[str], here: bool) -> None:
        places = ["the top level" if not nest else f"under {'.'.join(nest)}"] if here else []
        places += [f"under {'.'.join((*nest, label(key)))}" for key in keys]
        path = (*nest, label(keys[0]))
        title = f"{self.where}: holds weights in several places, and it is not clear which are meant"
        advice = f"\nName those you mean, such as {self.where}:{'.'.join(path)}"
        raise CheckpointError(listing(title, places) + advice + (self.remedy(path) if self.remedy else ""))


def _holds_weights(extents: Sequence[Extent], dimensions: int) -> bool:
    """Return whether one of the tensors is a matrix, or a floating-point one of at least ``dimensions``."""
    return any(len(each.shape) >= (dimensions if each.is_float else 2) for each in extents)


def _no_mapping(where: Path, within: str, nest: tuple[str, ...], key: str, content: object) -> CheckpointError:
    mapping = content if isinstance(content, Mapping) else {}
    known = [label(other) for other, value in mapping.items() if isinstance(value, Mapping)]
    level = f"under {'.'.join(nest)}" if nest else "at its top level"
    kind = "folder" if where.is_dir() else "file"
    return CheckpointError(
        f"{where}:{within}: the {kind} has no mapping {key!r} {level}.{nearest(key, known)} "
        f"It has {', '.join(known) or 'none'}."
    )
