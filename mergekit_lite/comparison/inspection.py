"""What a model is made of, and what looks wrong with it: from headers and the small files beside them.

What looks wrong is a hint, never an error: architectures whose layers differ by design exist.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint, tied_weights
from mergekit_lite.comparison.health import Health, Weights
from mergekit_lite.comparison.survey import Progress, survey
from mergekit_lite.errors import counted
from mergekit_lite.options import named_options
from mergekit_lite.planning.configs import LAYER_COUNTS, NOT_TEXT
from mergekit_lite.planning.tokenizers import is_tokenizer_file, template_of, vocabulary_of
from mergekit_lite.recipe.layers import place, stacks
from mergekit_lite.recipe.templates import TEMPLATES
from mergekit_lite.vectors.matching import alone, module_of

FEW = 0.1  # share of the layers that may differ from the others by accident; above, it is by design
SHOWN_LAYERS = 8
EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Module:
    """Tensors of one name and one kind along the layers (and experts), or a tensor outside the layers."""

    name: str
    tensors: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A model.

    Attributes:
        checkpoint: its tensors and files.
        stacks: its stacks of layers with their lengths.
        modules: its tensors in groups.
        tokenizer: facts of its tokenizer and chat template, as text by name.
        doubts: what looks wrong.
        weights: what a read of the weights found, tensor by tensor; None where they were not read.
    """

    checkpoint: Checkpoint
    stacks: Mapping[str, int]
    modules: tuple[Module, ...]
    tokenizer: Mapping[str, str]
    doubts: tuple[str, ...]
    weights: tuple[Weights, ...] | None = None

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(spec.numel for spec in self.checkpoint.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the disk."""
        return sum(spec.nbytes for spec in self.checkpoint.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Elements by the dtype they are stored in."""
        found: Counter[str] = Counter()
        for spec in self.checkpoint.tensors.values():
            found[spec.stored_dtype] += spec.numel
        return dict(found.most_common())

    @property
    def tied(self) -> str:
        """Whether the model has an output head of its own, as far as names tell."""
        tensors = self.checkpoint.tensors
        heads = [name for name in tensors if tied_weights.is_head(name)]
        embedding = tied_weights.tied_to("lm_head.weight", tensors)
        if heads:
            return f"no: {', '.join(heads)}"
        return f"yes: the head is {embedding.name}" if embedding is not None else "no embedding and no head by name"

    @property
    def quantised(self) -> str:
        """How its weights are quantised."""
        scaled = [spec for spec in self.checkpoint.tensors.values() if spec.scale is not None]
        if not scaled:
            return "no"
        blocks = sorted({"×".join(map(str, spec.scale.block)) for spec in scaled if spec.scale})
        kinds = ", ".join(sorted({spec.stored_dtype for spec in scaled}))
        shown = ", ".join(blocks[:3]) + (" …" if len(blocks) > 3 else "")
        return f"{counted(len(scaled), 'tensor')} in {kinds}, a scale for each block of {shown}"


@named_options
def inspect(
    model: str | Path,
    *,
    stats: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    processes: bool = False,
) -> Inspection:
    """Inspect a model: what it is made of, and what looks wrong with it.

    Args:
        model: a path or hub reference.
        stats: read the weights too, once.
        threads: workers, one for each core by default.
        progress: called with (bytes read, bytes in all).
        processes: fork the workers, as for ``run``.

    Returns:
        Tensors, groups of them, facts of config and tokenizer, and hints at what looks wrong.

    Raises:
        CheckpointError: it can't be opened.
        RunError: a file can't be read.
    """
    checkpoint = open_checkpoint(model)
    depth = stacks(checkpoint.tensors)
    doubts = [*_doubts_of_layers(checkpoint, depth), *_doubts_of_config(checkpoint, depth)]
    weights = None
    if stats:
        found = survey(alone(checkpoint), Health(), threads, progress, processes)
        weights = tuple(of_tensor for _, of_tensor in sorted(found, key=itemgetter(0)))
        checkpoint.check_unchanged()
        doubts += [f"{one.name}: {one.doubt}" for one in weights if one.doubt]
    return Inspection(checkpoint, depth, tuple(_modules(checkpoint)), _tokenizer(checkpoint), tuple(doubts), weights)


def _modules(checkpoint: Checkpoint) -> Iterator[Module]:
    depth = stacks(checkpoint.tensors)
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorSpec]] = {}
    for spec in checkpoint.tensors.values():
        at = place(spec.name)
        name = f"{at.stack}.*.{module_of(at.rest)}".lstrip(".") if at and at.stack in depth else module_of(spec.name)
        groups.setdefault((name, spec.shape, spec.stored_dtype), []).append(spec)
    for (name, shape, dtype), members in groups.items():
        yield Module(name, len(members), shape, dtype, sum(spec.nbytes for spec in members))


def _doubts_of_layers(checkpoint: Checkpoint, depth: Mapping[str, int]) -> Iterator[str]:
    """Layers that lack what their likes have, or have it in another shape; numbers that are missing."""
    layers: dict[str, dict[int, dict[str, TensorSpec]]] = {}
    for name, spec in checkpoint.tensors.items():
        if (at := place(name)) is not None:
            layers.setdefault(at.stack, {}).setdefault(at.layer, {})[at.rest] = spec
    for stack, found in layers.items():
        if stack not in depth:
            yield from _gaps(stack, found)
            if not any("." in rest for rests in found.values() for rest in rests) or len(found) < 2:
                continue
        yield from _incomplete(stack, found)
        yield from _odd_shapes(stack, found)


def _gaps(stack: str, found: Mapping[int, Mapping[str, TensorSpec]]) -> Iterator[str]:
    deep = any("." in rest for rests in found.values() for rest in rests)
    gaps = sorted(set(range(max(found))) - found.keys())
    if deep and 0 < len(gaps) < len(found):
        yield f"{stack}: of the layers 0 to {max(found)}, {_listed(gaps)} have no tensors"


def _incomplete(stack: str, found: Mapping[int, Mapping[str, TensorSpec]]) -> Iterator[str]:
    kinds = Counter(frozenset(rests) for rests in found.values())
    for layer, rests in sorted(found.items()):
        own = frozenset(rests)
        fuller = [kind for kind in kinds if own < kind and kinds[kind] > kinds[own]]
        if fuller and kinds[own] <= max(1, FEW * len(found)):
            missing = sorted(max(fuller, key=lambda kind: kinds[kind]) - own)
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            yield f"{stack}.{layer}: lacks {counted(len(missing), 'tensor')} that layers like it have: {shown}"


def _odd_shapes(stack: str, found: Mapping[int, Mapping[str, TensorSpec]]) -> Iterator[str]:
    shapes: dict[str, dict[int, tuple[int, ...]]] = {}
    for layer, rests in found.items():
        for rest, spec in rests.items():
            shapes.setdefault(rest, {})[layer] = spec.shape
    for rest, by_layer in shapes.items():
        (usual, many), *others = Counter(by_layer.values()).most_common()
        odd = sorted(layer for layer, shape in by_layer.items() if shape != usual)
        if others and len(odd) <= max(1, FEW * len(by_layer)) and many > len(odd):
            shape = list(by_layer[odd[0]])
            yield f"{stack}.{_listed(odd)}.{rest}: shape {shape}, in the other layers {list(usual)}"


def _doubts_of_config(checkpoint: Checkpoint, depth: Mapping[str, int]) -> Iterator[str]:
    """Counts of the config that disagree with the headers."""
    config = _text_config(checkpoint.config or {})
    for key in LAYER_COUNTS:
        count = config.get(key)
        if isinstance(count, int) and depth and count not in depth.values():
            listed = ", ".join(f"{stack}: {length}" for stack, length in depth.items())
            yield f"config.json: {key} is {count}, the tensors have {listed}"
    for name, spec in checkpoint.tensors.items():
        if tied_weights.is_embedding(name) and len(spec.shape) == 2:
            yield from _differs(config, "vocab_size", spec.shape[0], f"{name} has {spec.shape[0]:,} rows")
            yield from _differs(config, "hidden_size", spec.shape[1], f"{name} has {spec.shape[1]:,} columns")
    yield from _doubts_of_projections(checkpoint, config)
    experts = {int(found[1]) for name in checkpoint.tensors if (found := EXPERT.search(name))}
    for key in EXPERT_COUNTS:
        if experts:
            count = max(experts) + 1
            yield from _differs(config, key, count, f"the tensors have {counted(count, 'expert')}")
    heads = [name for name in checkpoint.tensors if tied_weights.is_head(name)]
    if checkpoint.config is not None and config.get("tie_word_embeddings") is True and heads:
        yield f"config.json: tie_word_embeddings is true, but {heads[0]} is stored; loaders differ in which counts"
    if (
        config.get("tie_word_embeddings") is False
        and tied_weights.tied_to("lm_head.weight", checkpoint.tensors)
        and not heads
    ):
        yield "config.json: tie_word_embeddings is false, but there is no output head"
    said = config.get("dtype", config.get("torch_dtype"))
    stored = {spec.stored_dtype for spec in checkpoint.tensors.values() if dtypes.is_float(spec.stored_dtype)}
    if isinstance(said, str) and stored and said not in stored:
        yield f"config.json: the dtype is {said}, the tensors are {', '.join(sorted(stored))}"
    yield from _doubts_of_tokenizer(checkpoint)


def _doubts_of_projections(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    """The first projection of each kind against the heads and the width of the MLP that the config tells of."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim")
    if size is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        size = hidden // heads
    wanted = {
        "self_attn.q_proj.weight": ("num_attention_heads", size),
        "self_attn.k_proj.weight": ("num_key_value_heads", size),
        "mlp.up_proj.weight": ("intermediate_size", 1),
    }
    for ending, (key, each) in wanted.items():
        spec = next((spec for name, spec in checkpoint.tensors.items() if name.endswith("." + ending)), None)
        count = config.get(key)
        if spec is None or len(spec.shape) != 2 or not isinstance(count, int) or not isinstance(each, int):
            continue
        if spec.shape[0] not in (count * each, 2 * count * each):  # twice with a gate in the same matrix
            heads_of = f"{count} × {each}" if each > 1 else f"{count}"
            yield f"config.json: {key} makes {heads_of} rows, {spec.name} has {spec.shape[0]:,}"


def _doubts_of_tokenizer(checkpoint: Checkpoint) -> Iterator[str]:
    tokens = vocabulary_of(checkpoint)
    rows = [
        spec.shape[0] for name, spec in checkpoint.tensors.items() if tied_weights.is_embedding(name) and spec.shape
    ]
    if tokens and rows and max(tokens) >= max(rows):
        yield f"tokenizer.json: has tokens up to number {max(tokens):,}, the embedding has {max(rows):,} rows"


def _differs(config: Mapping[str, Any], key: str, found: int, what: str) -> Iterator[str]:
    said = config.get(key)
    if isinstance(said, int) and said != found:
        yield f"config.json: {key} is {said:,}, but {what}"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config, with what a nested text model's says instead."""
    nested = [
        value
        for key, value in config.items()
        if key.endswith("_config") and key not in NOT_TEXT and isinstance(value, dict) and "hidden_size" in value
    ]
    return {**config, **nested[0]} if len(nested) == 1 else config


def _tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    folder = checkpoint.folder
    if folder is None:
        return {}
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {"files": ", ".join(name for name in files if is_tokenizer_file(name)) or "none"}
    if tokens := vocabulary_of(checkpoint):
        found["vocabulary"] = f"{counted(len(tokens), 'token')}, numbers up to {max(tokens):,}"
    template = template_of(checkpoint)
    known = next((name for name, text in TEMPLATES.items() if text == template), None)
    lines = f"{counted(len(template), 'character')}" if template else "none"
    found["chat template"] = f"{known} ({lines})" if known else lines
    return found


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:SHOWN_LAYERS])) + (" …" if len(layers) > SHOWN_LAYERS else "")
