"""A PEFT LoRA adapter: which tensors of a base it adds to, and which it replaces.

    base_model.model.X.lora_A.weight (r, in), X.lora_B.weight (out, r)      X.weight + scale · B · A
    base_model.model.X.lora_embedding_A (r, tokens), _B (width, r)          X.weight + scale · (B · A)ᵀ
    base_model.model.X.weight, X.bias, X.base_layer.weight, …               replaces the base's tensor

A layer that stores its weight as (in, out), like GPT-2's, gets the transpose of its product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import safetensors_file, tied_weights, torch_file
from mergekit_lite.checkpoint.adapter_config import MERGE_IT, AdapterConfig, read_config
from mergekit_lite.checkpoint.change import LowRank, Replace, changed, origin
from mergekit_lite.checkpoint.tensor import TensorSpec, WeightFile
from mergekit_lite.errors import CheckpointError, counted, listing, shortened

PREFIX = "base_model.model."
FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "a bias in the LoRA layers",
    "trainable_tokens": "single rows of the vocabulary trained apart",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".ia3_": "IA3",
    ".lora_": "an unknown kind of LoRA",
}


@dataclass(frozen=True)
class Factors:
    """The two factors of one module's LoRA: ``a`` is (r, in) and ``b`` (out, r)."""

    a: TensorSpec
    b: TensorSpec
    scale: float
    transposed: bool

    def over(self, base: TensorSpec) -> LowRank:
        """What is added to ``base``, in its orientation. Raises CheckpointError where the shapes don't fit."""
        product = self.b.shape[0], self.a.shape[1]
        fitting = [
            turned for turned in (self.transposed, not self.transposed) if _turned(product, turned) == base.shape
        ]
        if not fitting:
            raise CheckpointError(
                f"{self.a.name}: makes a product of {list(product)} with {self.b.name.rpartition('.lora_')[2]}, but "
                f"{base.name} of the base is {list(base.shape)}"
            )
        if fitting[0]:
            return LowRank(self.a.transposed(), self.b.transposed(), self.scale)
        return LowRank(self.b, self.a, self.scale)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, known from its config and headers alone.

    Attributes:
        reference: the text it was opened by.
        path: its folder.
        file: the identity of its weight file.
        factors: what it adds, by the name of the weight it adds to.
        replacements: full tensors, by the name of the tensor they replace.
        left_out: what its file holds beside these, and why it is left out.
        revision: the commit a hub repository was fetched at.
    """

    reference: str
    path: Path
    file: WeightFile
    factors: Mapping[str, Factors]
    replacements: Mapping[str, TensorSpec]
    left_out: Mapping[str, str]
    revision: str | None = None

    def over(
        self, base: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, scale: float = 1.0
    ) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        """The tensors of a base with the adapter, times ``scale``, folded in.

        Returns:
            The tensors, those that are added to as float32 (float64 where the base is); and why each tensor of the
            adapter or base that is not read is left out.

        Raises:
            CheckpointError: a tensor of the adapter matches none of the base, or another shape. All are named.
        """
        name_in = self._renaming(base)
        tensors, left_out = dict(base), dict(self.left_out)
        problems: list[str] = []
        for name, spec in self.replacements.items():
            try:
                own = _counterpart(name_in(name), spec.name, base, base)
                tensors[name_in(name)] = _replacement(own, spec, name_in(name), scale)
            except CheckpointError as problem:
                problems.append(str(problem))
                continue
            if own.name == name_in(name) and tensors[own.name].change is None:
                left_out[f"{own.name} of the base"] = f"replaced by the adapter's {spec.name}"
        for name, factors in self.factors.items():
            try:
                own = _counterpart(name_in(name), factors.a.name, tensors, base)
                low_rank = factors.over(own)
                low_rank = replace(low_rank, scale=low_rank.scale * scale)
                tensors[name_in(name)] = changed(own, (low_rank,), name_in(name))
            except CheckpointError as problem:
                problems.append(str(problem))
        for names in (self.factors, self.replacements):
            twice = [name for name, count in Counter(map(name_in, names)).items() if count > 1]
            problems += [
                f"{name}: two tensors of the adapter are for it; it is not clear which is meant" for name in twice
            ]
        touched = {name_in(name) for name in (*self.factors, *self.replacements)}
        problems += _ties_broken(touched, tensors, config)
        if problems:
            title = f"{self.reference}: {counted(len(problems), 'problem')} with this adapter on its base"
            raise CheckpointError(listing(title, problems))
        return tensors, left_out

    def _renaming(self, base: Mapping[str, TensorSpec]) -> _Renaming:
        """How the adapter's names become the base's: either may have a part at the front that the other lacks."""
        names = [*self.factors, *self.replacements]
        cuts, adds = _fronts(names), _fronts(base)
        renamings = [_Renaming(), *(_Renaming(cut=front) for front in cuts), *(_Renaming(add=front) for front in adds)]
        return max(renamings, key=lambda renaming: sum(renaming(name) in base for name in names))  # the first of equals


@dataclass(frozen=True)
class _Renaming:
    cut: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.cut)


def _fronts(names: Iterable[str]) -> list[str]:
    """The commonest first parts of some names, each with its dot."""
    return [front + "." for front, _ in Counter(name.partition(".")[0] for name in names).most_common(4)]


def read_adapter(reference: str, path: Path, revision: str | None = None) -> Adapter:
    """Open the folder of an adapter; only its config and headers are read.

    Raises:
        CheckpointError: it is no LoRA adapter, is damaged or hostile, or of a kind that is refused by name.
    """
    file = folders.inside(path, folders.adapter_weights(path, {entry.name for entry in path.iterdir()}))
    config = read_config(folders.inside(path, folders.ADAPTER_CONFIG))
    if file.suffix == ".safetensors":
        identity, tensors, _ = safetensors_file.read_header(file)
        others: list[str] = []
    else:
        identity, tensors, _, others = torch_file.read_layout(file)
    left_out = dict.fromkeys(others, "not a tensor")
    pairs: dict[str, dict[str, TensorSpec]] = {}
    replacements: dict[str, TensorSpec] = {}
    problems: list[str] = []
    for name, spec in tensors.items():
        module, ending = _parted(name)
        twice = False
        plain = name.replace(".modules_to_save.", ".")
        if ending is not None:
            twice = pairs.setdefault(module, {}).setdefault(ending, spec) is not spec
        elif kind := next((kind for part, kind in REFUSED.items() if part in name), None):
            problems.append(f"{name}: is of {kind}, which can't be folded in. {MERGE_IT}")
        elif ".original_module." in name:
            left_out[name] = "a module as it was before training"
        elif name != plain and plain in tensors:
            left_out[name] = f"saved twice; {plain} is taken"
        else:
            twice = replacements.setdefault(_weight_name(plain), spec) is not spec
        if twice:
            problems.append(
                f"{name}: another tensor of the adapter is for the same place; it is not clear which is meant"
            )
    factors: dict[str, Factors] = {}
    for module, pair in pairs.items():
        try:
            factors[f"{module}.weight"] = _factors(module, pair, config)
        except CheckpointError as problem:
            problems.append(str(problem))
    if not (factors or replacements or problems):
        problems.append("holds no tensors")
    if problems:
        raise CheckpointError(listing(f"{file}: {counted(len(problems), 'problem')} with this adapter", problems))
    return Adapter(reference, path, identity, factors, replacements, left_out, revision)


def _parted(name: str) -> tuple[str, str | None]:
    """The module and the ending of a factor's name, or the whole name and None."""
    for ending in FACTORS:
        if name.endswith(ending):
            return name.removeprefix(PREFIX).removesuffix(ending), ending
    return name, None


def _weight_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _factors(module: str, pair: Mapping[str, TensorSpec], config: AdapterConfig) -> Factors:
    """The two factors of a module. Raises CheckpointError where one is missing, or they aren't what the config says."""
    by_letter = {FACTORS[ending]: spec for ending, spec in pair.items()}
    names = ", ".join(spec.name for spec in pair.values())
    embedding = any("embedding" in ending for ending in pair)
    if len(pair) != 2 or len(by_letter) != 2 or not all(embedding == ("embedding" in ending) for ending in pair):
        raise CheckpointError(f"{names}: expected one lora_A and one lora_B. The adapter is damaged: download it again")
    a, b = by_letter["A"], by_letter["B"]
    for spec in (a, b):
        if len(spec.shape) != 2 or not spec.numel:
            raise CheckpointError(
                f"{spec.name}: has shape {list(spec.shape)}, expected a matrix. A LoRA on a convolution can't be "
                f"folded in. {MERGE_IT}"
            )
        if not dtypes.is_float(spec.dtype):
            raise CheckpointError(f"{spec.name}: is {spec.dtype}, expected one of {', '.join(dtypes.FLOATS)}")
    rank = config.rank_of(module)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{a.name}: has rank {a.shape[0]}, its lora_B rank {b.shape[1]}, and {folders.ADAPTER_CONFIG} says {rank}: "
            "they don't belong together. Download the adapter again"
        )
    return Factors(a, b, config.scale_of(module), embedding or config.transposed)


def _turned(shape: tuple[int, int], turned: bool) -> tuple[int, int]:
    return (shape[1], shape[0]) if turned else shape


def _counterpart(name: str, of: str, tensors: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec]) -> TensorSpec:
    """The tensor of this name that ``of`` changes, or the base's embedding that stands in for a head it lacks."""
    found = tensors.get(name) or tied_weights.tied_to(name, base)
    if found is None:
        raise CheckpointError(f"{of}: the base has no tensor {shortened(name)}. Is it the right base?")
    if not dtypes.is_float(found.dtype):
        raise CheckpointError(f"{of}: {found.name} of the base is {found.dtype}, which is not for arithmetic")
    return found


def _replacement(own: TensorSpec, spec: TensorSpec, name: str, scale: float) -> TensorSpec:
    """The tensor in place of the base's; where it is scaled or not alone, its distance from the base is added."""
    if not dtypes.is_float(spec.dtype):
        raise CheckpointError(f"{spec.name}: is {spec.dtype}, which is not for arithmetic")
    if spec.shape != own.shape:
        grown = tied_weights.is_vocabulary(name) and len(spec.shape) and spec.shape[1:] == own.shape[1:]
        hint = (
            ". The vocabulary was resized for training: load the base, call "
            f"model.resize_token_embeddings({spec.shape[0]}), save it with the adapter's tokenizer, and name that"
            if grown
            else ". Is it the right base?"
        )
        raise CheckpointError(
            f"{spec.name}: has shape {list(spec.shape)}, but {own.name} of the base {list(own.shape)}{hint}"
        )
    if scale != 1 or own.change is not None:
        return changed(own, (Replace(spec, origin(own), scale),), name)
    return replace(spec, name=name, written_as=own.written_as or own.dtype)


def _ties_broken(changed: set[str], tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> list[str]:
    """What changes an embedding that a head is tied to: whether the head follows is not told by the adapter."""
    if any(tied_weights.is_head(name) for name in tensors) or (config or {}).get("tie_word_embeddings") is False:
        return []
    return [
        f"{name}: the base ties its output head to it, and the adapter doesn't say whether the head changes too. "
        f"Untie the base first (give it an output head of its own, and tie_word_embeddings false in its config)"
        for name in sorted(changed)
        if tied_weights.is_embedding(name)
    ]
