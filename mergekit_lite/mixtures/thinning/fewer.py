"""Fewer experts in a mixture: some of them kept, or groups of them merged, in each layer by itself.

    W' = Σ w·W_expert / Σ w        over a group, for gate, up and down, its rows of the router and their biases

A group of one expert is copied byte for byte. Rows of the router follow their experts, and the config's number of
experts too. What the chosen experts' weights are divided by changes with that: softmax gives a merged expert once what
it gave to each of its members before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.encodings.views import joined, run_of
from mergekit_lite.errors import PlanError, UsageError, counted, listing
from mergekit_lite.layout import OutputPath
from mergekit_lite.mixtures.families import ROLES
from mergekit_lite.mixtures.layers import (
    COUNTS,
    PER_TOKEN,
    ExpertLayer,
    count_key,
    expert_layers,
    text_config,
    unreadable,
    with_settings,
)
from mergekit_lite.mixtures.remade import alike, copied, mean_of, opened_mixture, plan_of
from mergekit_lite.mixtures.thinning.grouping import Group
from mergekit_lite.planning import Job, Plan

PRUNE, MERGE = "moe prune", "moe merge-experts"  # what manifests and cards call them
Groups = Mapping[int, Sequence[Group]]  # for each layer the experts that go into each expert of the output
Weights = Mapping[int, Sequence[float]]  # for each layer what each of its experts counts in a mean


def plan_fewer(
    model: str,
    groups: Groups,
    output: str | OutputPath,
    *,
    weights: Weights | None = None,
    chosen: str = "",
    shard_size: int | None = None,
    copy_code: bool = False,
    opened: Mapping[str, Checkpoint] | None = None,
    card: Sequence[str] = (),
) -> Plan:
    """Plan a mixture with fewer experts.

    Args:
        model: the mixture: any reference.
        groups: for each layer, the experts that go into each expert of the output.
        output: a folder.
        weights: for each layer, what each of its experts counts in a mean; equal by default.
        chosen: how the groups were chosen, in words.
        shard_size: most bytes of data in one file; by default shards as in the model.
        copy_code: copy the code of its own that a model has.
        opened: models that are open already, by reference.
        card: paragraphs for the output's card.

    Raises:
        UsageError: the groups are not of this model.
        CheckpointError: the model can't be opened, or is no mixture.
        PlanError: the output would be no mixture; every problem is named.
    """
    mixture = opened_mixture(model, opened)
    layers = expert_layers(mixture)
    _check(mixture, layers, groups, weights)
    number = len(next(iter(groups.values())))
    if problems := [*unfit(mixture, layers, number)]:
        raise PlanError(problems)
    replaced: dict[str, list[Job]] = {}  # by the first tensor of the layer's experts or router that they stand for
    for layer in layers:
        shares = (weights or {}).get(layer.number) or (1.0,) * len(layer.experts)
        jobs = [*_experts(layer, groups[layer.number], shares), *_router(layer, groups[layer.number], shares)]
        replaced[next(iter(_names(mixture, layer)))] = jobs
    gone = {name for layer in layers for name in _names(mixture, layer)}
    made: list[Job] = []
    for name, spec in mixture.tensors.items():
        made += replaced.get(name, []) if name in gone else [copied(name, spec)]
    is_merge = any(len(group) > 1 for of_layer in groups.values() for group in of_layer)
    recipe: dict[str, Any] = {
        "merge_method": MERGE if is_merge else PRUNE,
        "model": model,
        **({"chosen": chosen} if chosen else {}),
        "experts": {str(layer): groups_as_text(of_layer) for layer, of_layer in groups.items()},
        **({"weights": {str(layer): _numbers(of_layer) for layer, of_layer in weights.items()}} if weights else {}),
    }
    config = text_config(mixture)
    counts = {key: number for key in COUNTS if isinstance(config.get(key), int)}
    return plan_of(
        mixture,
        made,
        with_settings(mixture.config or {}, counts),
        output,
        recipe,
        left_out=_dropped(layers, groups),
        shard_size=shard_size,
        copy_code=copy_code,
        card=card,
    )


def groups_as_text(groups: Sequence[Group]) -> str:
    """Return the groups of a layer in a line, as a recipe has them: ``0+3 1 2+4``."""
    return " ".join("+".join(map(str, group)) for group in groups)


def groups_of_text(text: str) -> list[Group]:
    """Return the groups in a line that ``groups_as_text`` made."""
    return [tuple(map(int, group.split("+"))) for group in text.split()]


def _numbers(values: Sequence[float]) -> str:
    return " ".join(repr(float(value)).removesuffix(".0") for value in values)


def first_experts(layers: Sequence[ExpertLayer], number: int) -> Groups:
    """Return the choice of the first experts: what can be checked of an output before experts are chosen."""
    return {layer.number: [(expert,) for expert in range(number)] for layer in layers}


def unfit(mixture: Checkpoint, layers: Sequence[ExpertLayer], number: int) -> Iterator[str]:
    """Yield why a mixture can't have this many experts in a layer."""
    if problems := [*unreadable(mixture, (*COUNTS, *PER_TOKEN, "n_group"))]:
        yield from problems
        return
    config, before = text_config(mixture), len(layers[0].experts)
    key = count_key(config, COUNTS)
    if key is None:
        yield f"{mixture.reference}: its config has no number of experts ({', '.join(COUNTS)})"
    elif config[key] != before:
        yield f"{mixture.reference}: its config says {key} {config[key]}, its layers have {before}"
    per_token = config.get(count_key(config, PER_TOKEN) or "", 1)
    if not per_token <= number < before:
        expected = f"expected {per_token} to {before - 1}" if per_token < before else "no fewer will do"
        yield f"{counted(number, 'expert')}: it has {before}, and each token goes through {per_token}: {expected}"
    teams = routing_groups(mixture)
    if before % teams:
        yield f"{mixture.reference}: its {before} experts are no {teams} groups of equal size (n_group)"
    elif number % teams:
        yield f"{number} experts: its router chooses among {teams} groups of equal size (n_group): expected a multiple"
    elif teams > 1 and number // teams < 2:
        yield f"{number} experts in {teams} groups of its router (n_group): each needs two"


def routing_groups(mixture: Checkpoint) -> int:
    """Return in how many groups, one behind the other, the router chooses experts (``n_group``); 1 for no groups."""
    count = text_config(mixture).get("n_group")
    return count if isinstance(count, int) and count > 0 else 1


def _check(mixture: Checkpoint, layers: Sequence[ExpertLayer], groups: Groups, weights: Weights | None) -> None:
    """Raise UsageError where groups and weights are not those of the model's layers."""
    wrong = []
    numbers = {layer.number for layer in layers}
    if groups.keys() != numbers:
        wrong.append(f"layers {sorted(groups)}: those with experts are {sorted(numbers)}")
    if len({len(of_layer) for of_layer in groups.values()}) > 1:
        wrong.append("layers with different numbers of experts: a config has one number for all")
    for layer in layers:
        count, members = len(layer.experts), [each for group in groups.get(layer.number, ()) for each in group]
        if strange := [each for each in members if not 0 <= each < count]:
            wrong.append(f"layer {layer.number}: has experts 0 to {count - 1}, there is no {strange[0]}")
        if len(set(members)) < len(members) or not all(groups.get(layer.number, ())):
            wrong.append(f"layer {layer.number}: an expert is in two groups, or a group is empty")
        own = (weights or {}).get(layer.number)
        if own is not None and (len(own) != count or not all(0 < each < math.inf for each in own)):
            wrong.append(f"layer {layer.number}: weights are {count} numbers above zero")
    if wrong:
        raise UsageError(listing(f"{mixture.reference}: these are no groups of its experts", wrong))


def _experts(layer: ExpertLayer, groups: Sequence[Group], weights: Sequence[float]) -> Iterator[Job]:
    """Yield the jobs of a layer's experts, stored as they were: each by itself, or in stacks."""
    if layer.stacks:
        for name, whole in layer.stacks.items():
            size = whole.numel // whole.shape[0]
            parts = [run_of(whole, expert * size, whole.shape[1:]) for expert in range(whole.shape[0])]
            yield copied(name, _gathered(name, whole, parts, groups, weights), _what(groups))
        return
    for number, group in enumerate(groups):
        for role in ROLES:
            name = layer.experts[number][role].name
            members = [layer.experts[expert][role] for expert in group]
            yield copied(name, mean_of(name, members, [weights[expert] for expert in group]), _of(group))


def _router(layer: ExpertLayer, groups: Sequence[Group], weights: Sequence[float]) -> Iterator[Job]:
    for name, whole in layer.router.items():
        size = whole.numel // whole.shape[0]
        parts = [run_of(whole, expert * size, whole.shape[1:]) for expert in range(whole.shape[0])]
        yield copied(name, _gathered(name, whole, parts, groups, weights), _what(groups))


def _gathered(
    name: str, whole: TensorSpec, parts: Sequence[TensorSpec], groups: Sequence[Group], weights: Sequence[float]
) -> TensorSpec:
    """Return the means of groups of parts of a tensor, one behind the other."""
    means = [
        mean_of(f"{name}\0{number}", [parts[expert] for expert in group], [weights[expert] for expert in group])
        for number, group in enumerate(groups)
    ]
    return joined(alike(means), (len(groups), *whole.shape[1:]))


def _of(group: Group) -> str:
    return f"expert {group[0]}" if len(group) == 1 else f"mean of experts {', '.join(map(str, group))}"


def _what(groups: Sequence[Group]) -> str:
    return f"{len(groups)} of its experts" if all(len(group) == 1 for group in groups) else f"{len(groups)} means"


def _names(mixture: Checkpoint, layer: ExpertLayer) -> list[str]:
    """Return the names of a layer's experts and router, in the order of the model's tensors."""
    own = {*layer.router, *layer.stacks, *(spec.name for expert in layer.experts for spec in expert.values())}
    return [name for name in mixture.tensors if name in own]


def _dropped(layers: Sequence[ExpertLayer], groups: Groups) -> dict[str, str]:
    """Return why tensors of the model are in no tensor of the output."""
    return {
        spec.name: "its expert is not kept"
        for layer in layers
        if not layer.stacks
        for number, expert in enumerate(layer.experts)
        if not any(number in group for group in groups[layer.number])
        for spec in expert.values()
    }
