"""Names of one model's tensors that are another's under other names, found from names and shapes alone.

Libraries write one model under several namings: ``language_model.model.layers.0.…``,
``model.language_model.layers.0.…``; ``visual.…``, ``model.visual.…``; ``h.0.…``, ``transformer.h.0.…``. Names of one
part of a model then differ in their beginnings and agree in their ends. The rule:

1. Wrappers (``_orig_mod``, ``module``, ``_fsdp_wrapped_module``) are no part of a name, wherever they stand.
2. A *renaming* is a beginning that takes the place of another; it pairs all names that agree in their ends, in their
   numbers and in their shapes. Renamings that only put in or take out *containers* (``model``, ``language_model``,
   ``transformer``, ``backbone`` …) or exchange synonyms are known, and count as one.
3. A renaming that isn't known must pair a stack of layers, or every tensor of a model: a head that happens to have the
   end and the shape of another is not the same tensor.
4. The renaming that pairs most names is right, if every other one that pairs some of the same tensors pairs fewer of
   them and none besides. Of equals the known one is right. If two remain, neither is used.
5. What is left is looked at again. Names that no tensor of the other model answers to follow the beginnings of those
   that are paired, so that layers which only one model has keep their place.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.errors import counted

Shape = tuple[int, ...] | None  # None fits every shape
Parts = tuple[str, ...]  # the components of a name
Numbers = tuple[str, ...]

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPED = re.compile(rf"(^|\.)({'|'.join(WRAPPERS)})\.")
CONTAINERS = ("model", "language_model", "transformer", "backbone", "base_model", "net")
SYNONYMS = {"block_sparse_moe": "mlp"}  # of the module that holds the experts, in Mixtral's files
NUMBER = "*"  # stands for each number in a pattern
FEWEST_OF_STACK = 3  # patterns of names within layers that make a renaming plausible which isn't known
MOST_PATTERNS = 500  # of a model; real ones have fewer, and all are compared with all
SHOWN = 4


@dataclass(frozen=True)
class Naming:
    """How one model's names are those of another.

    Attributes:
        names: for every name of the model the other's name; its own where nothing is known.
        unmatched: names of the model, in its own naming, that no tensor of the other answers to.
        lacking: names of the other that no tensor of the model answers to.
        ambiguous: beginnings that could be renamed in two ways, so that they were not: (own, other's, other's).
    """

    names: Mapping[str, str]
    unmatched: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    ambiguous: tuple[tuple[str, str, str], ...] = ()

    @property
    def renamed(self) -> Mapping[str, str]:
        """The names that aren't the same in both."""
        return {own: name for own, name in self.names.items() if own != name}

    @property
    def summary(self) -> str:
        """What was renamed, in a line: ``28 tensors under other names: visual. → model.visual.``; or nothing."""
        ways = Counter(_described(own.split("."), name.split(".")) for own, name in self.renamed.items())
        shown = [way for way, _ in ways.most_common(SHOWN)] + ["…"] * (len(ways) > SHOWN)
        return f"{counted(ways.total(), 'tensor')} under other names: {', '.join(shown)}" if ways else ""


def match_names(own: Mapping[str, Shape], other: Mapping[str, Shape]) -> Naming:
    """Return the names in ``other`` of the tensors of ``own``; the module's docstring has the rule.

    Args:
        own: names of a model, or of what an adapter changes, each with its shape; None where the shape isn't known.
        other: names and shapes of the model whose naming is wanted.

    Returns:
        A name for each of ``own``, all different; nothing is ever matched ambiguously.
    """
    if own.keys() <= other.keys() or other.keys() <= own.keys():
        return _naming(own, other, {name: name for name in own})
    ours, theirs = _Side.of(own), _Side.of(other)
    if max(len(ours.shapes), len(theirs.shapes)) > MOST_PATTERNS:
        return _naming(own, other, {name: name for name in own})
    pairs, ambiguous = _paired(ours, theirs)
    paired = {
        name: theirs.name(pairs[parts], numbers) for (parts, numbers), name in ours.names.items() if parts in pairs
    }
    return _naming(own, other, with_followers(paired, own, other), tuple(ambiguous))


def with_followers(paired: Mapping[str, str], own: Iterable[str], other: Container[str]) -> dict[str, str]:
    """Return a name for each of ``own``: that which it is paired with, or else one with a beginning that others got.

    A name keeps its own beginning where others of that beginning got several, or where the new name would be one that
    ``other`` or another tensor has.
    """
    ways: dict[Parts, set[Parts]] = defaultdict(set)
    for name, new in paired.items():
        before, after = _beginnings(_pattern(name.split("."))[0], _pattern(new.split("."))[0])
        ways[before].add(after)
    names: dict[str, str] = {}
    taken = set(paired.values())
    for name in own:
        if name in paired:
            names[name] = paired[name]
        else:
            following = _following(name, ways)
            names[name] = name if following in taken or following in other else following
            taken.add(names[name])
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def _following(name: str, ways: Mapping[Parts, set[Parts]]) -> str:
    """Return a name without wrappers, and with its longest beginning replaced for which there is one way alone."""
    parts, numbers = _pattern(name.split("."))
    for length in range(len(parts) - 1, -1, -1):
        if len(replacements := ways.get(parts[:length], set())) == 1:
            [replacement] = replacements
            return _filled((*replacement, *parts[length:]), numbers)
    return name


def without_wrappers(names: Collection[str]) -> dict[str, str]:
    """Return each name without wrappers; nothing where none has any, or two names differ in nothing else."""
    if not any(map(WRAPPED.search, names)):
        return {}
    shorter = {name: _filled(*_pattern(name.split("."))) for name in names}
    return shorter if len(set(shorter.values())) == len(shorter) else {}


def _naming(
    own: Mapping[str, Shape],
    other: Mapping[str, Shape],
    names: Mapping[str, str],
    ambiguous: tuple[tuple[str, str, str], ...] = (),
) -> Naming:
    answered = set(names.values())
    unmatched = tuple(name for name in own if names[name] not in other)
    return Naming(names, unmatched, tuple(name for name in other if name not in answered), ambiguous)


@dataclass(frozen=True)
class _Side:
    """One model's names by their patterns: the components without wrappers, with ``*`` for each number."""

    names: Mapping[tuple[Parts, Numbers], str]
    shapes: Mapping[Parts, Mapping[Numbers, Shape]]

    @classmethod
    def of(cls, tensors: Mapping[str, Shape]) -> _Side:
        """Return the names by their patterns; with wrappers, where two names differ in nothing else."""
        names = {_pattern(name.split(".")): name for name in tensors}
        if len(names) < len(tensors):
            names = {_pattern(name.split("."), without=()): name for name in tensors}
        shapes: dict[Parts, dict[Numbers, Shape]] = defaultdict(dict)
        for (parts, numbers), name in names.items():
            shapes[parts][numbers] = tensors[name]
        return cls(names, shapes)

    def name(self, parts: Parts, numbers: Numbers) -> str:
        """Return the model's name of a pattern and numbers, with its wrappers; made up where it has no such tensor."""
        return self.names.get((parts, numbers)) or _filled(parts, numbers)


@dataclass(eq=False)
class _Renaming:
    """A beginning that takes the place of another, and the patterns that it pairs."""

    own: Parts
    other: Parts
    known: bool
    pairs: dict[Parts, Parts] = field(default_factory=dict)
    names: int = 0  # how many names the patterns stand for

    def without(self, own: set[Parts], other: set[Parts], ours: _Side) -> _Renaming:
        """Return it without the patterns that are paired already."""
        pairs = {one: two for one, two in self.pairs.items() if one not in own and two not in other}
        return _Renaming(self.own, self.other, self.known, pairs, sum(len(ours.shapes[one]) for one in pairs))

    def is_weaker(self, than: _Renaming) -> bool:
        """Return whether the other renaming pairs all that this one pairs of a model's patterns, and is better."""
        mine, theirs = set(self.pairs), set(than.pairs)
        if not mine & theirs:
            mine, theirs = set(self.pairs.values()), set(than.pairs.values())
        return mine < theirs or (mine == theirs and (self.names < than.names or than.known))


def _paired(ours: _Side, theirs: _Side) -> tuple[dict[Parts, Parts], list[tuple[str, str, str]]]:
    """Return the patterns that are paired, and the beginnings that could be renamed in two ways."""
    pairs: dict[Parts, Parts] = {}
    ambiguous: list[tuple[str, str, str]] = []
    renamings = [each for each in _renamings(ours, theirs) if each.known or _is_plausible(each, ours, theirs)]
    while renamings := [each for each in renamings if each.pairs]:
        best = max(renamings, key=lambda each: (each.names, each.known, len(each.pairs)))
        renamings.remove(best)
        rivals = _rivals(best, renamings)
        if rivals:
            ambiguous += [(_text(best.own), _text(best.other), _text(each.other)) for each in rivals]
            unfit = set(rivals)
            renamings = [each for each in renamings if each not in unfit]
            continue
        if best.known or _is_plausible(best, ours, theirs):
            pairs |= best.pairs
            used = set(pairs.values())
            renamings = [each.without(set(pairs), used, ours) for each in renamings]
    return pairs, ambiguous


def _rivals(best: _Renaming, others: Iterable[_Renaming]) -> list[_Renaming]:
    """Return the renamings that pair tensors of the best one with different ones, and aren't weaker."""
    owners = {two: one for one, two in best.pairs.items()}
    return [
        each
        for each in others
        if any(best.pairs.get(one, two) != two or owners.get(two, one) != one for one, two in each.pairs.items())
        and not each.is_weaker(best)
    ]


def _renamings(ours: _Side, theirs: _Side) -> list[_Renaming]:
    """Return every renaming that pairs some tensor, and first the known ones as one."""
    by_end: dict[tuple[str, int], list[Parts]] = defaultdict(list)
    for parts in theirs.shapes:
        by_end[parts[-1], parts.count(NUMBER)].append(parts)
    renamings: dict[tuple[Parts, Parts], _Renaming] = {}
    known: list[tuple[int, Parts, Parts]] = []
    for one in ours.shapes:
        for two in by_end[one[-1], one.count(NUMBER)]:
            end = _common_end(one, two)
            if (end < 2 and end < min(len(one), len(two))) or not _fit(one, ours, two, theirs):
                continue
            own, other = one[: len(one) - end], two[: len(two) - end]
            is_known = _core(own) == _core(other)
            renaming = renamings.setdefault((own, other), _Renaming(own, other, is_known))
            renaming.pairs[one] = two
            renaming.names += len(ours.shapes[one])
            if is_known:
                known.append((end, one, two))
    pairs = _unique(known)
    together = _Renaming((), (), True, pairs, sum(len(ours.shapes[one]) for one in pairs))
    return [together, *renamings.values()]


def _unique(known: Iterable[tuple[int, Parts, Parts]]) -> dict[Parts, Parts]:
    """Return the pairs that agree in longer ends than all others of their two patterns."""
    ends: dict[tuple[int, Parts], list[int]] = defaultdict(list)
    known = list(known)
    for end, one, two in known:
        ends[0, one].append(end)
        ends[1, two].append(end)

    def is_best(end: int, key: tuple[int, Parts]) -> bool:
        return end == max(ends[key]) and ends[key].count(end) == 1

    return {one: two for end, one, two in known if is_best(end, (0, one)) and is_best(end, (1, two))}


def _fit(one: Parts, ours: _Side, two: Parts, theirs: _Side) -> bool:
    """Return whether two patterns share numbers, and agree in the shapes of all that they share."""
    mine, other = ours.shapes[one], theirs.shapes[two]
    shared = mine.keys() & other.keys()
    return bool(shared) and all(_same_shape(_text(two)[:-1], mine[at], other[at]) for at in shared)


def _same_shape(name: str, one: Shape, two: Shape) -> bool:
    if one is None or two is None or one == two:
        return True
    return len(one) == len(two) and one[1:] == two[1:] and tied_weights.is_vocabulary(name)


def _is_plausible(renaming: _Renaming, ours: _Side, theirs: _Side) -> bool:
    """Return whether a renaming that isn't known pairs a stack of layers, or every tensor of a model."""
    deep = [one for one in renaming.pairs if NUMBER in one[:-2]]
    whole = len(renaming.pairs) in (len(ours.shapes), len(theirs.shapes))
    return len(deep) >= FEWEST_OF_STACK or whole


def _pattern(components: Sequence[str], without: Sequence[str] = WRAPPERS) -> tuple[Parts, Numbers]:
    own = [part for part in components[:-1] if part not in without] + list(components[-1:])
    return tuple(NUMBER if part.isdigit() else part for part in own), tuple(part for part in own if part.isdigit())


def _filled(parts: Parts, numbers: Numbers) -> str:
    left: Iterator[str] = iter(numbers)
    return ".".join(next(left) if part == NUMBER else part for part in parts)


def _common_end(one: Sequence[str], two: Sequence[str]) -> int:
    """Return how many components two names share at their ends."""
    shared = 0
    while shared < min(len(one), len(two)) and one[-1 - shared] == two[-1 - shared]:
        shared += 1
    return shared


def _beginnings(one: Sequence[str], two: Sequence[str]) -> tuple[Parts, Parts]:
    end = _common_end(one, two)
    return tuple(one[: len(one) - end]), tuple(two[: len(two) - end])


def _core(parts: Parts) -> Parts:
    return tuple(SYNONYMS.get(part, part) for part in parts if part not in CONTAINERS)


def _text(parts: Iterable[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _described(own: Sequence[str], other: Sequence[str]) -> str:
    """Return what of a name became what: ``visual. → model.visual.``; of wrappers which they are, not where."""
    one, two = _pattern(own), _pattern(other)
    if one == two:
        wrappers = [part for part in WRAPPERS if own.count(part) != other.count(part)]
        return f"{_text(wrappers)} {'taken off' if len(own) > len(other) else 'put before'}"
    before, after = _beginnings(one[0], two[0])
    if not before:
        return f"{_text(after)} put before"
    return f"{_text(before)} → {_text(after)}" if after else f"{_text(before)} taken off"
