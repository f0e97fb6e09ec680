"""Families of mixtures of experts as they are published: names of tensors, keys of the config, what they are made from.

All have a llama's other tensors (``model.layers.N.self_attn.q_proj.weight`` …), so a dense model's attention, norms,
embedding and head go over under their own names. Dense models that fit have the same attention, norms and activation:
then a mixture of equal experts is that model.

- DeepSeek's second and third version have multi-head latent attention, in which all heads share the rotated part of
  their keys. No other model's attention can be written so; the first version has a llama's.
- OLMoE normalises queries and keys before the heads are cut, and has norms before its sublayers. No dense model of
  transformers does both: OLMo 2 has its norms behind. The mixture of OLMo 2 is FlexOlmo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["gate", "up", "down"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")
PROJECTIONS: Mapping[Role, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
LLAMA = ("llama", "mistral")
# Settings that say which layers have experts, for configs that leave them out.
SPARSE_EVERYWHERE: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True)
class Family:
    """A published family of mixtures.

    Attributes:
        model_type: of its config.
        architecture: the class that its config names.
        title: what users call it; mergekit's name where it has one.
        experts: the key of the number of experts.
        width: the key of an expert's width.
        module: the layer's module of experts and router, below ``model.layers.N``.
        projections: the names of an expert's matrices, by role.
        norm_topk_prob: whether the weights of the chosen experts sum to 1; None where the config can say it.
        shared: the module of shared experts below ``module``; empty where there are none.
        shared_gate: the router of the shared expert below ``module``: one row, through a sigmoid; empty for none.
        shared_width: the key of the shared expert's width; empty where it is ``shared_count`` · ``width``.
        shared_count: the key of the number of shared experts, which are one wide one in the tensors; empty for one.
        most_shared: most shared experts; None for any number.
        made_from: types of dense models that have its attention, norms and activation.
        bias: which biases its attention has: ``none``; ``qkv`` always; or ``config``, as ``attention_bias`` says.
        dense_layers: settings by which some layers have no experts, with the values that give every layer experts.
        settings: what else its config says of a mixture of dense models.
        own_code: where its code lies on the hub, where transformers doesn't know the family.
    """

    model_type: str
    architecture: str
    title: str
    experts: str
    width: str
    made_from: tuple[str, ...]
    module: str = "mlp"
    projections: Mapping[Role, str] = field(default_factory=lambda: PROJECTIONS)
    norm_topk_prob: bool | None = None
    shared: str = ""
    shared_gate: str = ""
    shared_width: str = ""
    shared_count: str = ""
    most_shared: int | None = 0
    bias: Literal["none", "qkv", "config"] = "none"
    dense_layers: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_code: Mapping[str, str] = field(default_factory=dict)

    @property
    def per_token(self) -> str:
        """The key of the number of experts that a token goes through."""
        return "num_experts_per_tok"

    def router(self, layer: int) -> str:
        """Return the name of a layer's router, (experts, hidden)."""
        return f"model.layers.{layer}.{self.module}.gate.weight"

    def expert(self, layer: int, number: int, role: Role) -> str:
        """Return the name of an expert's matrix: gate and up (width, hidden), down (hidden, width)."""
        return f"model.layers.{layer}.{self.module}.experts.{number}.{self.projections[role]}.weight"

    def shared_expert(self, layer: int, role: Role) -> str:
        """Return the name of the shared expert's matrix, of shape as an expert's, or as many side by side."""
        return f"model.layers.{layer}.{self.module}.{self.shared}.{PROJECTIONS[role]}.weight"

    def shared_router(self, layer: int) -> str:
        """Return the name of the shared expert's router, (1, hidden)."""
        return f"model.layers.{layer}.{self.module}.{self.shared_gate}.weight"


def dense(layer: int, role: Role) -> str:
    """Return the name of a matrix of a dense model's MLP, in all the models that mixtures are made from."""
    return f"model.layers.{layer}.mlp.{PROJECTIONS[role]}.weight"


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", "Mixtral", "num_local_experts", "intermediate_size", LLAMA,
    module="block_sparse_moe", projections={"gate": "w1", "up": "w3", "down": "w2"}, norm_topk_prob=True,
    settings={"output_router_logits": False, "router_aux_loss_coef": 0.001},
)  # fmt: skip
QWEN2 = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM", "Qwen MoE", "num_experts", "moe_intermediate_size", (*LLAMA, "qwen2"),
    shared="shared_expert", shared_gate="shared_expert_gate", shared_width="shared_expert_intermediate_size",
    most_shared=1, bias="qkv", dense_layers=SPARSE_EVERYWHERE,
    settings={"output_router_logits": False, "router_aux_loss_coef": 0.001},
)  # fmt: skip
QWEN3 = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3 MoE", "num_experts", "moe_intermediate_size", ("qwen3",),
    bias="config", dense_layers=SPARSE_EVERYWHERE,
    settings={"output_router_logits": False, "router_aux_loss_coef": 0.001},
)  # fmt: skip
DEEPSEEK = Family(
    "deepseek", "DeepseekForCausalLM", "DeepSeek MoE", "n_routed_experts", "moe_intermediate_size", LLAMA,
    shared="shared_experts", shared_count="n_shared_experts", most_shared=None, bias="config",
    dense_layers={"first_k_dense_replace": 0, "moe_layer_freq": 1},
    settings={"scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True},
    own_code={
        name: f"deepseek-ai/deepseek-moe-16b-base--{where}"
        for name, where in {
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        }.items()
    },
)  # fmt: skip
FLEX_OLMO = Family(
    "flex_olmo", "FlexOlmoForCausalLM", "FlexOlmo", "num_experts", "intermediate_size", ("olmo2",), bias="config",
    settings={"output_router_logits": False, "router_aux_loss_coef": 0.01},
)  # fmt: skip
OLMOE = Family("olmoe", "OlmoeForCausalLM", "OLMoE", "num_experts", "intermediate_size", (), bias="config")
FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (MIXTRAL, DEEPSEEK, QWEN2, QWEN3, FLEX_OLMO, OLMOE)
}


def family_of(config: Mapping[str, Any] | None) -> Family | None:
    """Return the family that a mixture's config is of; None for another model."""
    return FAMILIES.get(str((config or {}).get("model_type", "")))


def has_experts(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    """Return whether a layer of a mixture has experts: some families have dense layers among them, as settings say."""
    if "first_k_dense_replace" in family.dense_layers:
        every = config.get("moe_layer_freq", 1)
        return bool(layer >= config.get("first_k_dense_replace", 0) and layer % every == 0)
    every = config.get("decoder_sparse_step", 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % every == 0
