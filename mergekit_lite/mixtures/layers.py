"""The layers of a mixture that have experts, read from a model's headers: one name for experts that lie in two ways."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.encodings.views import run_of
from mergekit_lite.checkpoint.naming.experts import APART, ROLES, STACKED, taken_apart
from mergekit_lite.errors import CheckpointError, listing, shortened

LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.[^.]+(?:\.[^.]+)*")
ROUTERS = ("gate", "router")  # what a router is called beside its experts
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # keys of the number of experts
PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")


@dataclass(frozen=True)
class ExpertLayer:
    """One layer with experts.

    Attributes:
        number: of the layer.
        module: the beginning of its experts' names: ``model.layers.3.mlp.experts``.
        experts: each expert's matrices by role: gate and up (width, hidden), down (hidden, width).
        router: what has a row or an entry for each expert, by name: the router itself comes first.
        stacks: the experts' tensors by name, where they lie in stacks.
    """

    number: int
    module: str
    experts: tuple[Mapping[str, TensorSpec], ...]
    router: Mapping[str, TensorSpec]
    stacks: Mapping[str, TensorSpec] = field(default_factory=dict)

    @property
    def block(self) -> str:
        """The module of experts and router."""
        return self.module.rpartition(".")[0]

    @property
    def rows(self) -> TensorSpec:
        """The router's matrix (experts, hidden)."""
        return next(iter(self.router.values()))

    @property
    def router_rows(self) -> list[TensorSpec]:
        """Each expert's row in the router (hidden,)."""
        hidden = self.rows.shape[1]
        return [run_of(self.rows, number * hidden, (hidden,)) for number in range(len(self.experts))]

    @property
    def width(self) -> int:
        """The width of an expert."""
        return self.experts[0]["gate"].shape[0]


def text_config(model: Checkpoint) -> Mapping[str, Any]:
    """Return a model's config, or the section about its language model."""
    config = model.config or {}
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def unreadable(model: Checkpoint, keys: Iterable[str]) -> Iterator[str]:
    """Yield which settings of a model's config should be whole numbers from 0 on and are something else."""
    config = text_config(model)
    for key in keys:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            yield f"{model.reference}: its config has {shortened(repr(value), 40)} as {key}: expected a whole number"


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with other settings, in its section about the language model where it has one."""
    nested = config.get("text_config")
    return {**config, "text_config": {**nested, **settings}} if isinstance(nested, dict) else {**config, **settings}


def count_key(config: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the first of some keys that a config has with a number."""
    return next((key for key in keys if isinstance(config.get(key), int)), None)


def expert_layers(model: Checkpoint) -> list[ExpertLayer]:
    """Return the layers of a mixture that have experts, in order.

    Raises:
        CheckpointError: the model has none, or they are not as expected; every problem is named.
    """
    tensors = taken_apart(model.tensors)
    modules: dict[str, dict[int, dict[str, TensorSpec]]] = defaultdict(lambda: defaultdict(dict))
    for name, spec in tensors.items():
        if match := APART.fullmatch(name):
            modules[match[1]][int(match[2])][ROLES[match[3]]] = spec
    odd = sorted({match[1] for name in tensors if (match := STACKED.fullmatch(name))} - modules.keys())
    problems = [f"{module}: its experts lie in one tensor in a way that isn't known" for module in odd]
    if not modules and not problems:
        raise CheckpointError(f"{model.reference}: has no experts. Name a mixture: Mixtral, Qwen3-MoE, DeepSeek …")
    layers = [*_layers(model, modules, problems)]
    if len(counts := {len(layer.experts) for layer in layers}) > 1:
        problems.append(f"layers with {', '.join(map(str, sorted(counts)))} experts: a config has one number for all")
    if len({layer.number for layer in layers}) < len(layers):
        problems.append("a layer's number stands for two modules of experts, as of a text and a vision model")
    if problems:
        raise CheckpointError(listing(f"{model.reference}: not a mixture whose experts can be told apart", problems))
    return sorted(layers, key=lambda layer: layer.number)


def _layers(
    model: Checkpoint, modules: Mapping[str, Mapping[int, Mapping[str, TensorSpec]]], problems: list[str]
) -> Iterator[ExpertLayer]:
    for module, experts in modules.items():
        place = LAYER.fullmatch(module)
        block = module.rpartition(".")[0]
        count = len(experts)
        if place is None:
            problems.append(f"{module}: is not within a layer")
        elif experts.keys() != set(range(count)) or any(
            each.keys() != {"gate", "up", "down"} for each in experts.values()
        ):
            problems.append(f"{module}: not every expert from 0 to {max(experts)} has a gate, up and down matrix")
        elif len({spec.shape for each in experts.values() for spec in each.values()}) > 2:
            problems.append(f"{module}: the experts differ in their shapes")
        elif not (router := _router(model, block, count)):
            problems.append(f"{block}: has no router {ROUTERS[0]}.weight with a row for each of {count} experts")
        else:
            own = {name: spec for name, spec in model.tensors.items() if name.startswith(f"{module}.")}
            stacks = {name: spec for name, spec in own.items() if STACKED.fullmatch(name)}
            yield ExpertLayer(int(place[1]), module, tuple(experts[n] for n in range(count)), router, stacks)


def _router(model: Checkpoint, block: str, count: int) -> dict[str, TensorSpec]:
    """Return a layer's router and what else has an entry for each expert; empty where there is none."""
    for name in ROUTERS:
        weight = model.tensors.get(f"{block}.{name}.weight")
        if weight is not None and len(weight.shape) == 2 and weight.shape[0] == count:
            begins = f"{block}.{name}."
            others = {key: spec for key, spec in model.tensors.items() if key.startswith(begins) and spec is not weight}
            return {weight.name: weight} | {key: spec for key, spec in others.items() if spec.shape[:1] == (count,)}
    return {}
