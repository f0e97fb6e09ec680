"""Dense models that mixtures are made from: which tensors one has beside its MLPs, and which family fits it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.optional_tensors import layers_promised, why_optional
from mergekit_lite.errors import nearest
from mergekit_lite.mixtures.families import FAMILIES, ROLES, Family, dense
from mergekit_lite.mixtures.layers import text_config, unreadable

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS: Mapping[str, tuple[str, ...]] = {
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "mistral": ("input_layernorm", "post_attention_layernorm"),
    "qwen2": ("input_layernorm", "post_attention_layernorm"),
    "qwen3": ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
}
HEAD = "lm_head.weight"
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # in a base's config
NUMBERS = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers")  # which it may have


def kind_of(model: Checkpoint) -> str:
    """Return the type that a model's config names; empty for none."""
    return str((model.config or {}).get("model_type", ""))


def layers_of(model: Checkpoint) -> int:
    """Return the number of a model's layers, by its config; 0 where that doesn't say."""
    return layers_promised(model.config) or 0


def families_named(architecture: str | None) -> list[Family]:
    """Return the families that a recipe's ``architecture`` stands for: those whose title or type begins so, or all.

    It is mergekit's rule, whatever the spelling of blanks; ``qwen`` stands for two families.
    """
    known = [family for family in FAMILIES.values() if family.made_from]
    if architecture is None:
        return known
    wanted = _plain(architecture)
    return [
        each for each in known if _plain(each.title).startswith(wanted) or _plain(each.model_type).startswith(wanted)
    ]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def no_such_family(architecture: str) -> str:
    """Return what to say of an architecture that stands for no family."""
    titles = [each.title for each in FAMILIES.values() if each.made_from]
    olmoe = ". OLMoE's attention is that of no dense model: the mixture of OLMo 2 is FlexOlmo"
    why = olmoe if _plain(architecture).startswith("olmo") else f".{nearest(architecture, titles)}"
    return f"'architecture' expects one of {', '.join(titles)}, got the text {architecture!r}{why}"


def misfits(family: Family, models: Sequence[Checkpoint], shared: int, gated: bool) -> Iterator[str]:
    """Yield why models can't become a mixture of a family.

    Args:
        family: the family.
        models: the base, then the others.
        shared: the number of shared experts.
        gated: whether those have prompts, or rows that are drawn.
    """
    for model in models:
        if kind_of(model) not in family.made_from:
            is_what = f"is of type {kind_of(model) or 'unknown'}"
            yield f"{model.reference} {is_what}: {family.title} is made from {', '.join(family.made_from)}"
    if not family.shared and shared:
        yield f"{family.title} has no shared experts"
    if family.most_shared == 1 and shared != 1:
        yield f"{family.title} has exactly one shared expert, got {shared}"
    if family.shared_gate and shared and not gated:
        yield f"{family.title} has a router for its shared expert: give that positive_prompts"


def unusable(base: Checkpoint) -> Iterator[str]:
    """Yield what a base's config doesn't say, or says in another way than as numbers."""
    yield from unreadable(base, (*NEEDED, *NUMBERS))
    if lacking := [key for key in NEEDED if not text_config(base).get(key)]:
        yield f"{base.reference}: its config has no {', no '.join(lacking)}"
    elif layers_of(base) > len(base.tensors):
        yield f"{base.reference}: its config has {layers_of(base):,} layers, and it has {len(base.tensors):,} tensors"


def backbone(family: Family, base: Checkpoint) -> tuple[list[str], list[str], list[str]]:
    """Return what a base gives to a mixture beside experts.

    Returns:
        The names of its tensors; those of biases that the family has and the base hasn't, which are zeros; and
        problems: what is missing, and what has no place in the family.
    """
    kind, tensors = kind_of(base), base.tensors
    expected, biases = ["model.embed_tokens.weight"], []
    for layer in range(layers_of(base)):
        prefix = f"model.layers.{layer}"
        expected += [f"{prefix}.self_attn.{name}.weight" for name in PROJECTIONS]
        expected += [f"{prefix}.{name}.weight" for name in NORMS[kind]]
        biased = {"none": (), "qkv": PROJECTIONS[:3], "config": PROJECTIONS}[family.bias]
        biases += [f"{prefix}.self_attn.{name}.bias" for name in biased]
    expected.append("model.norm.weight")
    problems = [f"{base.reference}: has no {name}" for name in expected if name not in tensors]
    names = [*expected, *(name for name in (*biases, HEAD) if name in tensors)]
    lacking = [name for name in biases if name not in tensors]
    if family.bias == "config" and len(lacking) < len(biases):
        problems += [f"{base.reference}: has no {name}, but other biases" for name in lacking]
    used = {*names, *(dense(layer, role) for layer in range(layers_of(base)) for role in ROLES)}
    problems += [
        f"{base.reference}: {name} has no place in {family.title}"
        for name, spec in tensors.items()
        if name not in used and not why_optional(name, spec, tensors, base.config)
    ]
    return names, lacking if family.bias == "qkv" else [], problems


def config_problems(family: Family, base: Checkpoint, others: Iterable[Checkpoint]) -> Iterator[str]:
    """Yield what configs say that a mixture can't follow."""
    config: Mapping[str, Any] = base.config or {}
    act = config.get("hidden_act", "silu")
    for model in others:
        if (own := (model.config or {}).get("hidden_act", "silu")) != act:
            yield f"{model.reference}: its activation is {own}, that of {base.reference} is {act}"
    heads, head, hidden = (config.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size"))
    if family.own_code and head and heads and hidden and head * heads != hidden:
        yield f"{base.reference}: its heads have head_dim {head}, {family.title} has hidden_size / num_attention_heads"
