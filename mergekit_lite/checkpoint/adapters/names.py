"""Which tensors of a base an adapter is for, whatever version of transformers named either.

peft names modules as transformers loaded them, and the hub's files often have names that are older. ``naming/`` says
what counts as the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.adapters.factors import ExpertFactors, Factors, TokenRows
from mergekit_lite.checkpoint.naming.matching import Naming, Shape, match_names
from mergekit_lite.checkpoint.naming.transformers_tables import loaded_names
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import shortened

APART = {  # the matrices of one expert that transformers stacks into a parameter, one below the other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
FEW = 3  # names that are listed one by one, even where nothing fits


def matched(
    factors: Mapping[str, Factors],
    tokens: Mapping[str, TokenRows],
    replacements: Mapping[str, TensorSpec],
    experts: Mapping[str, Sequence[ExpertFactors]],
    base: Mapping[str, TensorSpec],
    config: Mapping[str, Any] | None,
) -> Naming:
    """Return the base's name for each tensor that an adapter changes, its own where the base has none.

    Args:
        factors: an adapter's, by the name of the weight; likewise rows of single tokens and full tensors.
        tokens: see there.
        replacements: see there.
        experts: the factors for each layer of experts. Names are returned for the parameters of each, and for those
            of its first expert, in case each has matrices of its own in the base.
        base: its tensors.
        config: the base's, which says what transformers calls them where names alone don't fit.
    """
    own: dict[str, Shape] = {name: _shape(part) for name, part in factors.items()}
    own |= {name: spec.shape for name, spec in replacements.items()}
    own |= {name: (0, *rows.rows.shape[1:]) for name, rows in tokens.items()}
    for layer, parts in experts.items():
        for parameter in parts[0].ranks:
            first = [part for parts in APART.get(parameter, ()) for part in parts]
            own |= dict.fromkeys([f"{layer}.{parameter}", *(f"{layer}.0.{part}.weight" for part in first)])
    shapes: dict[str, Shape] = {name: spec.shape for name, spec in base.items()}
    wanted = {*factors, *replacements, *tokens}

    def lost(found: Naming) -> int:
        return sum(tied_weights.counterpart(found.names[name], base) is None for name in wanted)

    found = match_names(own, shapes)
    if lost(found):
        # A shape may be wrong, as a config needn't say how a layer stores its weight.
        found = min(found, match_names(dict.fromkeys(own), shapes), key=lost)
    if lost(found) and (loaded := loaded_names(base, config)):
        by_loaded = {new: name for name, new in loaded.items()}
        by_table = match_names(own, {new: base[name].shape for new, name in by_loaded.items()})
        names = {name: by_loaded.get(new, new) for name, new in by_table.names.items()}
        if len(set(names.values())) == len(names):
            found = min(found, Naming(names), key=lost)
    return found


def _shape(factors: Factors) -> Shape:
    product = factors.b.shape[0], factors.a.shape[1]
    return product[::-1] if factors.transposed else product


def misnamed(found: Naming, names: Iterable[str], base: Mapping[str, TensorSpec]) -> str | None:
    """Return in one sentence that an adapter's names aren't the base's; None where most of them are, or few aren't."""
    names = list(names)
    lost = [name for name in names if tied_weights.counterpart(found.names[name], base) is None]
    if len(lost) <= max(FEW, len(names) // 2):
        return None
    return (
        f"{len(lost)} of the {len(names)} tensors that it is for aren't in the base: its names begin with "
        f"{_beginnings(lost)}, the base's with {_beginnings(base)}. Is it the right base?"
    )


def given_twice(found: Naming, names: Iterable[str], base: Mapping[str, TensorSpec]) -> list[str]:
    """Return a problem for each tensor of the base that two names of an adapter end with."""
    own = set(names)
    ends = {name: [name[at + 1 :] for at, letter in enumerate(name) if letter == "."] for name in own}
    return [
        f"{found.names[end]}: two tensors of the adapter are for it; it is not clear which is meant"
        for name in sorted(own)
        for end in ends[name]
        if end in own and found.names[name] not in base and found.names[end] in base
    ]


def _beginnings(names: Iterable[str]) -> str:
    """Return the two commonest beginnings of names, up to the first number."""
    counts = Counter(".".join(name.split(".")[:3]).partition(".0")[0] for name in names)
    return " and ".join(f"{shortened(beginning, 60)}…" for beginning, _ in counts.most_common(2))
