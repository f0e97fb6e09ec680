"""Splitting: an expert of a mixture, or the mean of several, as a dense model of its own.

    W = Σ w·W_expert / Σ w        for gate, up and down of every layer; all else is the mixture's

A mixture that was built from dense models gives back their MLPs bit for bit, beside the attention that it was given.
The router goes. A shared expert (Qwen2-MoE) is weighed token by token, which no dense MLP can do: it is left out, or
split off by itself as the expert ``shared``. DeepSeek's shared experts have no such weight: they go into the dense MLP
exactly, side by side with the expert, unless they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite.checkpoint import Checkpoint, TensorSpec
from mergekit_lite.checkpoint.encodings.views import joined, side_by_side
from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.errors import PlanError, UsageError, counted
from mergekit_lite.layout import OutputPath
from mergekit_lite.mixtures.families import ROLES, Family, Role, dense, family_of
from mergekit_lite.mixtures.layers import ExpertLayer, expert_layers, unreadable
from mergekit_lite.mixtures.remade import alike, copied, mean_of, opened_mixture, plan_of
from mergekit_lite.options import named_options
from mergekit_lite.planning import Job, Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

METHOD = "moe split"  # what manifests and cards call it
Expert = int | Literal["shared"]
SHARED: Literal["shared"] = "shared"
DENSE: Mapping[str, tuple[str, str]] = {  # the dense type and class that has all of a mixture but its experts
    "mixtral": ("mistral", "MistralForCausalLM"),
    "qwen2_moe": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3_moe": ("qwen3", "Qwen3ForCausalLM"),
    "flex_olmo": ("olmo2", "Olmo2ForCausalLM"),
    "deepseek": ("llama", "LlamaForCausalLM"),
}
# What a mixture's class takes for a setting that its config lacks, where the dense class takes something else.
UNSAID: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6},
    "qwen2_moe": {"num_key_value_heads": 16, "num_attention_heads": 16},
    "qwen3_moe": {"num_key_value_heads": 4},
    "flex_olmo": {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 5e5},
    "deepseek": {},
}
NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")  # settings that are reckoned with
# Settings of mixtures alone, whatever their family.
OF_MIXTURES = (
    "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "n_shared_experts", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    "first_k_dense_replace", "moe_layer_freq", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "scoring_func", "aux_loss_alpha", "seq_aux", "qkv_bias", "auto_map", "routed_scaling_factor", "topk_method",
    "n_group", "topk_group", "quantization_config", "transformers_version",
)  # fmt: skip


def plan_split(
    model: str | Path,
    experts: Sequence[Expert],
    output: str | OutputPath,
    *,
    weights: Sequence[float] = (),
    shard_size: int | None = None,
    opened: Mapping[str, Checkpoint] | None = None,
) -> Plan:
    """Plan a dense model of an expert, or of the weighted mean of several.

    Args:
        model: the mixture: any reference.
        experts: numbers of experts, the same in every layer; or ``shared`` alone.
        output: a folder.
        weights: of the experts; equal by default.
        shard_size: most bytes of data in one file.
        opened: models that are open already, by reference.

    Raises:
        UsageError: there is no such expert, or the weights don't fit.
        CheckpointError: the model can't be opened, or is no mixture.
        PlanError: no dense model computes what an expert does; every problem is named.
    """
    model = str(model)
    mixture = opened_mixture(model, opened)
    layers = expert_layers(mixture)
    family = _family(mixture)
    if problems := [*unreadable(mixture, NUMBERS)]:
        raise PlanError(problems)
    _check(mixture, layers, experts, weights)
    splitting = _Splitting(mixture, family, layers, tuple(experts), tuple(weights) or (1.0,) * len(experts))
    jobs = [*splitting.jobs()]
    if problems := [*splitting.problems()]:
        raise PlanError(problems)
    recipe: dict[str, Any] = {"merge_method": METHOD, "model": model, "experts": list(experts)}
    if weights:
        recipe["weights"] = list(weights)
    return plan_of(
        mixture,
        jobs,
        splitting.config(),
        output,
        recipe,
        left_out=splitting.left_out(),
        shard_size=shard_size,
        notes=[*splitting.notes()],
    )


@named_options
def split_experts(
    model: str | Path,
    experts: Sequence[Expert],
    output: str | Path,
    *,
    weights: Sequence[float] = (),
    shard_size: int | None = None,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Make a dense model of an expert of a mixture, or of the weighted mean of several.

    Args:
        model: the mixture: any reference.
        experts: numbers of experts, the same in every layer; or ``shared`` alone.
        output: a folder.
        weights: of the experts in the mean; equal by default.
        shard_size: most bytes of data in one file; 5 GB by default.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: there is no such expert, the weights don't fit, or the output exists.
        CheckpointError: the model can't be opened, or is no mixture.
        PlanError: no dense model computes what an expert does; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    return run(plan_split(model, experts, output, weights=weights, shard_size=shard_size), **run_options)


def experts_of(model: str, opened: Mapping[str, Checkpoint] | None = None) -> int:
    """Return how many experts a mixture has in a layer; errors as of ``plan_split``."""
    return len(expert_layers(opened_mixture(model, opened))[0].experts)


def _family(mixture: Checkpoint) -> Family:
    family = family_of(mixture.config)
    if family is not None and family.model_type in DENSE:
        return family
    kind = (mixture.config or {}).get("model_type") or "unknown"
    known = ", ".join(f"{kind} → {to}" for kind, (to, _) in DENSE.items())
    why = "no dense model of transformers has its attention and norms" if family else "its dense model isn't known"
    raise PlanError([f"{mixture.reference} is of type {kind}: {why}. Known: {known}"])


def _check(
    mixture: Checkpoint, layers: Sequence[ExpertLayer], experts: Sequence[Expert], weights: Sequence[float]
) -> None:
    """Raise UsageError where experts or weights are none."""
    count = len(layers[0].experts)
    if not experts:
        raise UsageError("Name the experts to split off: --experts 3, --experts 0,2 or --experts all.")
    if SHARED in experts and len(experts) > 1:
        raise UsageError("The shared expert is split off alone: it has another part than the others: --experts shared.")
    strange = [str(each) for each in experts if each != SHARED and not 0 <= int(each) < count]
    if strange:
        raise UsageError(f"{mixture.reference} has experts 0 to {count - 1}, there is no expert {', '.join(strange)}.")
    if len(set(experts)) < len(experts):
        raise UsageError("An expert is named twice.")
    if weights and len(weights) != len(experts):
        raise UsageError(f"{counted(len(weights), 'weight')} for {counted(len(experts), 'expert')}: give one for each.")
    if not all(map(math.isfinite, weights)):
        raise UsageError("A weight is no finite number: there is no mean with it.")
    if weights and sum(weights) == 0:
        raise UsageError("The weights sum to zero: there is no mean with them.")


class _Splitting:
    """The parts of the plan of one dense model."""

    def __init__(
        self,
        mixture: Checkpoint,
        family: Family,
        layers: Sequence[ExpertLayer],
        experts: tuple[Expert, ...],
        weights: tuple[float, ...],
    ) -> None:
        self.mixture = mixture
        self.family = family
        self.layers = {layer.number: layer for layer in layers}
        self.experts = experts
        self.weights = weights
        self.source: Mapping[str, Any] = mixture.config or {}
        self.sum_is_exact = bool(family.shared) and not family.shared_gate  # of an expert and the shared ones

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs of the dense model."""
        for name, spec in self.mixture.tensors.items():
            if not self._is_of_block(name):
                yield copied(name, spec)
        for layer in self.layers.values():
            for role in ROLES:
                name = dense(layer.number, role)
                yield copied(name, self._matrix(layer, role, name), self._what)

    @property
    def _what(self) -> str:
        return f"expert {self.experts[0]}" if len(self.experts) == 1 else f"mean of experts {_listed(self.experts)}"

    def _matrix(self, layer: ExpertLayer, role: Role, name: str) -> TensorSpec:
        shared = self._shared(layer, role)
        if self.experts == (SHARED,):
            if shared is None:
                raise UsageError(f"{self.mixture.reference} has no shared expert in layer {layer.number}.")
            return shared
        chosen = [layer.experts[int(number)][role] for number in self.experts]
        own = mean_of(name, chosen, self.weights)
        if shared is None or not self.sum_is_exact:
            return own
        if role == "down":
            return side_by_side(alike([own, shared]))
        return joined(alike([own, shared]), (own.shape[0] + shared.shape[0], own.shape[1]))

    def _shared(self, layer: ExpertLayer, role: Role) -> TensorSpec | None:
        name = f"{layer.block}.{self.family.shared}.{role}_proj.weight"
        return self.mixture.tensors.get(name) if self.family.shared else None

    def _is_of_block(self, name: str) -> bool:
        return any(name.startswith(f"{layer.block}.") for layer in self.layers.values())

    def _widths(self) -> set[int]:
        """Return how wide the MLPs of all layers will be."""
        return {self._matrix(layer, "gate", "").shape[0] for layer in self.layers.values()} | {
            spec.shape[0]
            for number in range(int(self.source.get("num_hidden_layers", 0)))
            if number not in self.layers
            if (spec := self.mixture.tensors.get(dense(number, "gate"))) is not None
        }

    def problems(self) -> Iterator[str]:
        """Yield why no dense model has these layers."""
        reference = self.mixture.reference
        if len(widths := self._widths()) > 1:
            sizes = " and ".join(map(str, sorted(widths)))
            yield f"{reference}: its layers would have MLPs of widths {sizes}: a dense config has one width for all"
        if self.sum_is_exact and self.source.get("routed_scaling_factor", 1.0) not in (None, 1, 1.0):
            yield f"{reference}: routed_scaling_factor weighs its experts against the shared ones; that isn't split"

    def config(self) -> dict[str, Any]:
        """Return the dense model's config, which says what the mixture's leaves to its class."""
        kind, architecture = DENSE[self.family.model_type]
        unsaid = dict(UNSAID[self.family.model_type])
        if "rope_parameters" in self.source:
            unsaid.pop("rope_theta", None)
        biased = any(name.endswith("self_attn.q_proj.bias") for name in self.mixture.tensors)
        if kind == "qwen2" and not biased:
            kind, architecture = "mistral", "MistralForCausalLM"
            unsaid |= {"sliding_window": None}
        config = unsaid | {key: value for key, value in self.source.items() if key not in OF_MIXTURES}
        if kind == "mistral" and not self.source.get("sliding_window"):
            config["sliding_window"] = None  # its class takes 4,096 for granted
        if kind == "llama":
            config["attention_bias"] = biased
        if kind == "qwen3" and not self.source.get("head_dim"):  # its class takes 128 for granted
            config["head_dim"] = self.source["hidden_size"] // self.source.get("num_attention_heads", 32)
        (width,) = self._widths()
        return config | {"model_type": kind, "architectures": [architecture], "intermediate_size": width}

    def left_out(self) -> dict[str, str]:
        """Return why tensors of the mixture are in no tensor of the output."""
        reasons = {}
        for layer in self.layers.values():
            own = {name: spec for name, spec in self.mixture.tensors.items() if name.startswith(f"{layer.block}.")}
            used = {self._matrix(layer, role, "").name for role in ROLES}
            used |= {layer.experts[number][role].name for number in self.experts if number != SHARED for role in ROLES}
            for name in own.keys() - used:
                if name.startswith(f"{layer.module}."):
                    if name not in layer.stacks or self.experts == (SHARED,):
                        reasons[name] = "another expert"
                elif not name.startswith(f"{layer.block}.{self.family.shared or ' '}."):
                    reasons[name] = "a dense model has no router"
                elif not self.sum_is_exact:
                    reasons[name] = "a gate weighs the shared expert token by token, which no dense MLP can do"
        return {name: reasons[name] for name in self.mixture.tensors if name in reasons}

    def notes(self) -> Iterator[str]:
        """Yield what the user should know."""
        if len(self.experts) > 1:
            yield f"each MLP is the mean of experts {_listed(self.experts)}, computed in float64 and rounded once"
        if self.family.shared_gate and self.experts != (SHARED,) and any(
            self._shared(layer, "gate") for layer in self.layers.values()
        ):  # fmt: skip
            yield (
                "the shared expert is left out: a gate weighs it token by token, which no dense MLP can do. "
                "--experts shared splits it off by itself"
            )
        if self.sum_is_exact and self.experts != (SHARED,):
            yield "the shared experts, which every token goes through, stand beside the expert in each MLP: exactly"


def _listed(experts: Sequence[Expert]) -> str:
    return ", ".join(map(str, experts))
