"""Inspection of a model: what it is made of, and what looks wrong with it, from headers and small files.

What looks wrong is a hint, never an error: architectures whose layers differ by design exist.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, open_checkpoint, tied_weights
from mergekit_lite.checkpoint.optional_tensors import LAYER_COUNTS, MODALITIES, promises_head
from mergekit_lite.checkpoint.parts import in_folder
from mergekit_lite.comparison.health import WeightMeasurement, WeightStatistics
from mergekit_lite.comparison.shared_tensors import float_tensors, module_name
from mergekit_lite.comparison.survey import survey
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.errors import CheckpointError, counted
from mergekit_lite.options import named_options
from mergekit_lite.planning.tokenizers import is_tokenizer_file, template_of, vocabulary_of
from mergekit_lite.recipe.layers import place, stacks
from mergekit_lite.recipe.templates import TEMPLATES

T = TypeVar("T")
ACCIDENT_SHARE = 0.1  # share of the layers that differ up to which it looks like an accident, above it like design
SHOWN_LAYERS = 8
FROM_CONFIG = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
               "num_key_value_heads", "vocab_size", "max_position_embeddings")  # fmt: skip
# What wrappers put into the names of a model's parts; DDP's stands before the whole model alone.
WRAPPERS = {
    "_orig_mod.": re.compile(r"(^|[./])_orig_mod\."),
    "module.": re.compile(r"(^|/)(_orig_mod\.)?module\."),
    "_fsdp_wrapped_module.": re.compile(r"(^|[./])_fsdp_wrapped_module\."),
}
EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
Layers = Mapping[int, Mapping[str, TensorSpec]]  # of one stack: by number, then by name within the layer
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one name, shape and dtype in all layers (and experts), or a tensor outside the layers."""

    name: str
    tensors: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """Result of an inspection.

    Attributes:
        checkpoint: the model's tensors and files.
        stacks: its stacks of layers with their lengths.
        groups: its tensors, those of one kind in all layers as one group.
        tokenizer: facts of its tokenizer and chat template, as text by name.
        doubts: hints at what looks wrong.
        weights: statistics of each float tensor; None where the weights were not read.
    """

    checkpoint: Checkpoint
    stacks: Mapping[str, int]
    groups: tuple[TensorGroup, ...]
    tokenizer: Mapping[str, str]
    doubts: tuple[str, ...]
    weights: tuple[WeightStatistics, ...] | None = None

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(spec.numel for spec in self.checkpoint.tensors.values())

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors on the disk."""
        return sum(spec.nbytes for spec in self.checkpoint.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of elements by the dtype they are stored in, the most frequent first."""
        elements: Counter[str] = Counter()
        for spec in self.checkpoint.tensors.values():
            elements[spec.stored_dtype] += spec.numel
        return dict(elements.most_common())

    @property
    def tied(self) -> str:
        """Text that says whether the head is tied to the embedding, judged by names."""
        tensors = self.checkpoint.tensors
        heads = [name for name in tensors if tied_weights.is_head(name)]
        embedding = tied_weights.tied_to("lm_head.weight", tensors)
        if heads:
            return f"no: {', '.join(heads)}"
        if not promises_head(self.checkpoint.config):
            return "no: the model has no head"
        return f"yes: the head is {embedding.name}" if embedding is not None else "no embedding and no head by name"

    @property
    def quantised(self) -> str:
        """Text that says how the weights are quantised."""
        quantised = [spec for spec in self.checkpoint.tensors.values() if spec.quantised]
        if not quantised:
            return "no"
        blocks = sorted({"×".join(map(str, spec.encoding.block)) for spec in quantised if spec.encoding.block})
        kinds = ", ".join(sorted({spec.stored_dtype for spec in quantised}))
        schemes = sorted({spec.encoding.scheme for spec in quantised if spec.encoding.scheme})
        named = f" as {', '.join(schemes)}" if schemes else ""
        shown = ", ".join(blocks[:3]) + (" …" if len(blocks) > 3 else "")
        return f"{counted(len(quantised), 'tensor')}{named} in {kinds}, a scale for each block of {shown}"

    @property
    def config(self) -> dict[str, Any]:
        """What its config says of its size and kind."""
        return {key: value for key, value in (self.checkpoint.config or {}).items() if key in FROM_CONFIG}

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data; None where a figure has no meaning."""
        weights = {one.name: asdict(one) for one in self.weights or ()}
        return {
            "model": self.checkpoint.reference,
            "revision": self.checkpoint.revision,
            "files": [{"name": file.name, "bytes": file.size} for file in self.checkpoint.files],
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "stacks": dict(self.stacks),
            "tied": self.tied,
            "quantised": self.quantised,
            "config": self.config,
            "tokenizer": dict(self.tokenizer),
            "left_out": dict(self.checkpoint.left_out),
            "doubts": list(self.doubts),
            "tensors": [
                {
                    "name": name,
                    "dtype": spec.stored_dtype,
                    "shape": list(spec.shape),
                    "bytes": spec.nbytes,
                    **{key: _finite(value) for key, value in weights.get(name, {}).items() if key != "name"},
                }
                for name, spec in self.checkpoint.tensors.items()
            ],
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    doubts = [*_doubts_of_layers(checkpoint, depth), *_doubts_of_prefixes(checkpoint)]
    for folder, part in checkpoint.models.items():
        doubts += [in_folder(folder, doubt) for doubt in _doubts_of_config(part, stacks(part.tensors))]
    weights = None
    if stats:
        measured = survey(float_tensors(checkpoint), WeightMeasurement(), threads, progress, processes)
        weights = tuple(statistics for _, statistics in sorted(measured, key=itemgetter(0)))
        checkpoint.check_unchanged()
        doubts += [f"{tensor.name}: {tensor.doubt}" for tensor in weights if tensor.doubt]
    return Inspection(
        checkpoint, depth, tuple(_groups(checkpoint, depth)), _tokenizer(checkpoint), tuple(doubts), weights
    )


def _groups(checkpoint: Checkpoint, depth: Mapping[str, int]) -> Iterator[TensorGroup]:
    """Yield the tensors in groups of one name, shape and dtype, in the order of the files."""
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorSpec]] = {}
    for spec in checkpoint.tensors.values():
        position = place(spec.name)
        name = module_name(spec.name)
        if position is not None and position.stack in depth:
            name = f"{position.stack}.*.{module_name(position.rest)}".lstrip(".")
        groups.setdefault((name, spec.shape, spec.stored_dtype), []).append(spec)
    for (name, shape, dtype), members in groups.items():
        yield TensorGroup(name, len(members), shape, dtype, sum(spec.nbytes for spec in members))


def _doubts_of_layers(checkpoint: Checkpoint, depth: Mapping[str, int]) -> Iterator[str]:
    """Yield doubts about layers: tensors that other layers have, odd shapes, numbers that are missing."""
    layers: dict[str, dict[int, dict[str, TensorSpec]]] = {}
    for name, spec in checkpoint.tensors.items():
        if (position := place(name)) is not None:
            layers.setdefault(position.stack, {}).setdefault(position.layer, {})[position.rest] = spec
    for stack, members in layers.items():
        if stack not in depth:  # numbered, but not as the layers of a model are
            if not any("." in rest for rests in members.values() for rest in rests):
                continue
            yield from _gaps(stack, members)
            if len(members) < 2:
                continue
        yield from _incomplete(stack, members)
        yield from _odd_shapes(stack, members)


def _gaps(stack: str, layers: Layers) -> Iterator[str]:
    """Yield a doubt where numbers of layers are missing."""
    gaps = sorted(set(range(max(layers))) - layers.keys())
    if 0 < len(gaps) < len(layers):
        yield f"{stack}: of the layers 0 to {max(layers)}, {_listed(gaps)} have no tensors"


def _incomplete(stack: str, layers: Layers) -> Iterator[str]:
    """Yield a doubt for each of few layers that lack tensors which more of the layers have."""
    kinds = Counter(frozenset(rests) for rests in layers.values())
    for layer, rests in sorted(layers.items()):
        own = frozenset(rests)
        fuller = [kind for kind in kinds if own < kind and kinds[kind] > kinds[own]]
        if fuller and kinds[own] <= max(1, ACCIDENT_SHARE * len(layers)):
            missing = sorted(max(fuller, key=lambda kind: kinds[kind]) - own)
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            yield f"{stack}.{layer}: lacks {counted(len(missing), 'tensor')} that layers like it have: {shown}"


def _odd_shapes(stack: str, layers: Layers) -> Iterator[str]:
    """Yield a doubt for each kind of tensor that has another shape in few of the layers."""
    shapes: dict[str, dict[int, tuple[int, ...]]] = {}
    for layer, rests in layers.items():
        for rest, spec in rests.items():
            shapes.setdefault(rest, {})[layer] = spec.shape
    for rest, by_layer in shapes.items():
        (usual, many), *others = Counter(by_layer.values()).most_common()
        odd = sorted(layer for layer, shape in by_layer.items() if shape != usual)
        if others and len(odd) <= max(1, ACCIDENT_SHARE * len(by_layer)) and many > len(odd):
            shape = list(by_layer[odd[0]])
            yield f"{stack}.{_listed(odd)}.{rest}: shape {shape}, in the other layers {list(usual)}"


def _doubts_of_prefixes(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a doubt for each wrapper of training whose name stands in the names of tensors: loaders don't know it."""
    for wrapper, where in WRAPPERS.items():
        wrapped = [name for name in checkpoint.tensors if where.search(name)]
        if wrapped:
            such = f"{counted(len(wrapped), 'tensor')} under {wrapper!r}, as {wrapped[0]}"
            yield f"{such}: transformers finds no weights under such names"


def _doubts_of_config(checkpoint: Checkpoint, depth: Mapping[str, int]) -> Iterator[str]:
    """Yield doubts about the config where it disagrees with the headers."""
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
    experts = {int(number[1]) for name in checkpoint.tensors if (number := EXPERT.search(name))}
    for key in EXPERT_COUNTS:
        if experts:
            count = max(experts) + 1
            yield from _differs(config, key, count, f"the tensors have {counted(count, 'expert')}")
    yield from _doubts_of_head(checkpoint, {**config, **(checkpoint.config or {})}.get("tie_word_embeddings"))
    dtype = config.get("dtype", config.get("torch_dtype"))
    stored = {spec.stored_dtype for spec in checkpoint.tensors.values() if spec.stored_dtype in dtypes.FLOATS}
    if isinstance(dtype, str) and stored and dtype not in stored:
        yield f"config.json: the dtype is {dtype}, the tensors are {', '.join(sorted(stored))}"
    yield from _doubts_of_tokenizer(checkpoint)


def _doubts_of_head(checkpoint: Checkpoint, tied: object) -> Iterator[str]:
    """Yield a doubt where the config ties a head that is stored, or doesn't tie one that is missing."""
    heads = [name for name in checkpoint.tensors if tied_weights.is_head(name)]
    if tied is True and heads:
        yield f"config.json: tie_word_embeddings is true, but {heads[0]} is stored; loaders differ in which counts"
    lacks = not heads and tied_weights.tied_to("lm_head.weight", checkpoint.tensors) is not None
    if tied is False and lacks and promises_head(checkpoint.config):
        yield "config.json: tie_word_embeddings is false, but there is no output head"


def _doubts_of_projections(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[str]:
    """Hold the first projection of each kind to the config's number of heads and width of the MLP."""
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
    tokens: dict[int, str] = {}
    try:
        tokens = vocabulary_of(checkpoint)
        template_of(checkpoint)
    except CheckpointError as error:
        yield str(error)
    rows = [
        spec.shape[0] for name, spec in checkpoint.tensors.items() if tied_weights.is_embedding(name) and spec.shape
    ]
    if tokens and rows and max(tokens) >= max(rows):
        yield f"tokenizer.json: has tokens up to number {max(tokens):,}, the embedding has {max(rows):,} rows"


def _differs(config: Mapping[str, Any], key: str, count: int, what: str) -> Iterator[str]:
    """Yield a doubt where the config gives another number than the tensors."""
    configured = config.get(key)
    if isinstance(configured, int) and configured != count:
        yield f"config.json: {key} is {configured:,}, but {what}"


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config, overridden by that of a nested text model."""
    nested = [
        value
        for key, value in config.items()
        if key.endswith("_config") and key not in MODALITIES and isinstance(value, dict) and "hidden_size" in value
    ]
    return {**config, **nested[0]} if len(nested) == 1 else config


def _readable(read: Callable[[Checkpoint], T], checkpoint: Checkpoint) -> T | None:
    """Return what is read of a model; None where its file can't be read, of which the doubts speak."""
    try:
        return read(checkpoint)
    except CheckpointError:
        return None


def _tokenizer(checkpoint: Checkpoint) -> dict[str, str]:
    """Return facts of the tokenizer and the chat template, as text by name."""
    folder = checkpoint.tokenizer_folder
    if folder is None:
        return {}
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    facts = {"files": ", ".join(name for name in files if is_tokenizer_file(name)) or "none"}
    if tokens := _readable(vocabulary_of, checkpoint):
        facts["vocabulary"] = f"{counted(len(tokens), 'token')}, numbers up to {max(tokens):,}"
    template = _readable(template_of, checkpoint)
    known = next((name for name, text in TEMPLATES.items() if text == template), None)
    lines = f"{counted(len(template), 'character')}" if template else "none"
    facts["chat template"] = f"{known} ({lines})" if known else lines
    return facts


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:SHOWN_LAYERS])) + (" …" if len(layers) > SHOWN_LAYERS else "")
