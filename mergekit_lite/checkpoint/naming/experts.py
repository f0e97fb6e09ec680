"""Experts of a mixture, stored each by itself or all in one tensor, shown in the way of another model.

    experts.N.gate_proj.weight (width, hidden), .up_proj. (width, hidden), .down_proj. (hidden, width)    by itself
    experts.gate_up_proj (experts, 2·width, hidden), experts.down_proj (experts, hidden, width)           together
    experts.gate_up_proj (experts, hidden, 2·width), experts.down_proj (experts, width, hidden)           and transposed

The first is what the hub's models have (Mixtral's call them ``w1``, ``w3``, ``w2``), the others what transformers 5
and some hub models have (Llama-4, Qwen3-VL-MoE). All tensors of one module are turned the same way, so that way is
known by their shapes even where one of them is square. Experts with biases in one tensor (gpt-oss) mix their gates with
the rest row by row, and are left alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mergekit_lite.checkpoint.encodings.strided import transposed, viewed
from mergekit_lite.checkpoint.encodings.views import joined, run_of, side_by_side
from mergekit_lite.checkpoint.tensor import TensorSpec

ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
TOGETHER = {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}
APART = re.compile(rf"((?:.*\.)?experts)\.(0|[1-9]\d{{0,5}})\.({'|'.join(ROLES)})\.weight")
STACKED = re.compile(rf"((?:.*\.)?experts)\.({'|'.join(TOGETHER)})(\.weight)?")


@dataclass
class _Module:
    """The experts of one layer."""

    apart: dict[str, dict[int, TensorSpec]] = field(default_factory=lambda: defaultdict(dict))  # by role and number
    stacks: dict[str, TensorSpec] = field(default_factory=dict)  # by what they hold: gate_up_proj …

    @property
    def count(self) -> int | None:
        """The number of experts, where all matrices are there for each, in one shape and dtype."""
        if self.stacks and not self.apart:
            counts = {spec.shape[0] for spec in self.stacks.values() if len(spec.shape) == 3}
            return counts.pop() if len(counts) == 1 and all(len(s.shape) == 3 for s in self.stacks.values()) else None
        counts = {len(specs) for specs in self.apart.values()}
        alike = all(len({(s.shape, s.dtype) for s in specs.values()}) == 1 for specs in self.apart.values())
        matrices = all(len(spec.shape) == 2 for specs in self.apart.values() for spec in specs.values())
        numbered = all(specs.keys() == set(range(len(specs))) for specs in self.apart.values())
        return counts.pop() if len(counts) == 1 and alike and matrices and numbered and not self.stacks else None

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors."""
        return [spec for specs in self.apart.values() for spec in specs.values()] + list(self.stacks.values())

    @property
    def is_plain(self) -> bool:
        """Whether all tensors lie in their files as they are."""
        return all(spec.is_plain for spec in self.specs)


def stored_as(own: Mapping[str, TensorSpec], other: Mapping[str, TensorSpec]) -> tuple[dict[str, TensorSpec], int]:
    """Return the tensors of ``own`` with experts stored as in ``other``, and how many tensors of ``other`` those are.

    A module whose experts don't fit those of the other stays as it is.
    """
    tensors, changed = dict(own), 0
    theirs = _modules(other)
    for module, mine in _modules(own).items():
        target = theirs.get(module)
        if target is None or not mine.count or mine.count != target.count:
            continue
        shown = _shown(mine, target)
        if shown:
            for spec in mine.specs:
                del tensors[spec.name]
            tensors |= {spec.name: spec for spec in shown}
            changed += len(shown)
    return tensors, changed


def taken_apart(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return tensors with every expert by itself: ``experts.N.gate_proj.weight`` for ``experts.gate_up_proj``.

    Stacks whose layout isn't known from their shapes stay as they are.
    """
    shown = {spec.name: spec for module, own in _modules(tensors).items() for spec in _expected(module, own)}
    return stored_as(tensors, shown)[0]


def _expected(module: str, own: _Module) -> Iterator[TensorSpec]:
    """Yield what a module's experts would be each by itself; nothing where they are, or aren't as they should be."""
    if own.apart or own.stacks.keys() != {"gate_up_proj", "down_proj"} or not own.count:
        return
    joint, down = own.stacks["gate_up_proj"], own.stacks["down_proj"]
    sizes = (joint.shape[1:], down.shape[1:])
    for (twice, hidden), (rows, width) in (sizes, (sizes[0][::-1], sizes[1][::-1])):
        if hidden == rows and twice == 2 * width:
            for number in range(own.count):
                for role in ("gate_proj", "up_proj"):
                    yield replace(joint, name=f"{module}.{number}.{role}.weight", shape=(width, hidden))
                yield replace(down, name=f"{module}.{number}.down_proj.weight", shape=(hidden, width))


def _modules(tensors: Mapping[str, TensorSpec]) -> dict[str, _Module]:
    modules: dict[str, _Module] = defaultdict(_Module)
    for name, spec in tensors.items():
        if match := APART.fullmatch(name):
            modules[match[1]].apart[ROLES[match[3]]][int(match[2])] = spec
        elif match := STACKED.fullmatch(name):
            modules[match[1]].stacks[match[2]] = spec
    biased = {name.rpartition(".")[0] for name in tensors if name.endswith("_proj_bias")}
    return {module: found for module, found in modules.items() if module not in biased}


def _shown(mine: _Module, target: _Module) -> list[TensorSpec]:
    """Return a module's experts as another stores them; nothing where they are stored so, or don't fit."""
    if mine.apart and target.stacks:
        return _stacked(mine, target)
    if mine.stacks and target.apart:
        return list(_apart(mine, target))
    return _turned(mine, target) if mine.stacks and target.stacks else []


def _stacked(mine: _Module, target: _Module) -> list[TensorSpec]:
    """Return a module's single matrices as the other's stacks."""
    turned = _orientation(mine, target)
    roles = {role for stack in target.stacks for role in TOGETHER[stack]}
    kinds = {spec.dtype for specs in mine.apart.values() for spec in specs.values()}
    if turned is None or roles != mine.apart.keys() or len(kinds) > 1 or (turned and not mine.is_plain):
        return []
    shown = []
    for stack, like in target.stacks.items():
        experts = [[mine.apart[role][number] for role in TOGETHER[stack]] for number in range(like.shape[0])]
        if turned:
            parts = [side_by_side([transposed(spec) for spec in expert]) for expert in experts]
        else:
            parts = [spec for expert in experts for spec in expert]
        shown.append(replace(joined(parts, like.shape), name=like.name))
    return shown


def _apart(mine: _Module, target: _Module) -> Iterator[TensorSpec]:
    """Yield the matrices in a module's stacks one by one, under the names that the other has for them."""
    turned = _orientation(target, mine)
    roles = {role for stack in mine.stacks for role in TOGETHER[stack]}
    if turned is None or roles != target.apart.keys() or (turned and not mine.is_plain):
        return
    for stack, whole in mine.stacks.items():
        rows, columns = whole.shape[1:][:: -1 if turned else 1]
        begin = 0
        for role in TOGETHER[stack]:
            for number, like in target.apart[role].items():
                first = number * rows * columns
                if turned:
                    part = viewed(whole, first + begin, like.shape, (1, rows))
                else:
                    part = run_of(whole, first + begin * columns, like.shape)
                yield replace(part, name=like.name)
            begin += target.apart[role][0].shape[0]


def _turned(mine: _Module, target: _Module) -> list[TensorSpec]:
    """Return stacks as those of the other, which have rows for columns; nothing where that isn't so for all."""
    if mine.stacks.keys() != target.stacks.keys() or not mine.is_plain:
        return []
    shapes = [(mine.stacks[stack].shape, target.stacks[stack].shape) for stack in mine.stacks]
    if all(one == two for one, two in shapes) or any(one != (two[0], two[2], two[1]) for one, two in shapes):
        return []
    shown = []
    for stack, whole in mine.stacks.items():
        experts, rows, columns = whole.shape
        like = target.stacks[stack]
        shown.append(replace(viewed(whole, 0, (experts, columns, rows), (rows * columns, 1, columns)), name=like.name))
    return shown


def _orientation(apart: _Module, stacked: _Module) -> bool | None:
    """Return whether stacks hold the matrices transposed; None where they hold others, or that isn't clear."""
    fitting = []
    for turned in (False, True):
        for stack, spec in stacked.stacks.items():
            matrices = [apart.apart[role][0].shape for role in TOGETHER[stack] if role in apart.apart]
            joint = (sum(rows for rows, _ in matrices), matrices[0][1]) if matrices else ()
            if len({columns for _, columns in matrices}) != 1 or spec.shape[1:] != joint[:: -1 if turned else 1]:
                break
        else:
            fitting.append(turned)
    return fitting[0] if len(fitting) == 1 else None
