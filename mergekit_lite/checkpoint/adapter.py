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
from mergekit_lite.checkpoint import formats, tied_weights
from mergekit_lite.checkpoint.adapter_config import MERGE_IT, AdapterConfig, read_config
from mergekit_lite.checkpoint.encodings.dense import Replace
from mergekit_lite.checkpoint.encodings.low_rank import LowRank
from mergekit_lite.checkpoint.encodings.strided import transposed
from mergekit_lite.checkpoint.encodings.sum import Sum, base_of, scaled, with_terms
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, refuse, shortened

PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")
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
    """The two factors of one module's LoRA."""

    a: TensorSpec  # (r, in)
    b: TensorSpec  # (out, r)
    scale: float  # what their product is multiplied by
    transposed: bool  # whether the weight is stored as (in, out), as far as the config says

    def term_for(self, base: TensorSpec) -> LowRank:
        """Return what is added to ``base``, in its orientation. Raises CheckpointError where the shapes don't fit."""
        product = self.b.shape[0], self.a.shape[1]
        shapes = {False: product, True: product[::-1]}
        # A square weight fits both ways, so the config's goes first.
        orientations = [way for way in (self.transposed, not self.transposed) if shapes[way] == base.shape]
        if not orientations:
            raise CheckpointError(
                f"{self.a.name}: makes a product of {list(product)} with {self.b.name.rpartition('.lora_')[2]}, but "
                f"{base.name} of the base is {list(base.shape)}"
            )
        if orientations[0]:
            return LowRank(transposed(self.a), transposed(self.b), scale=self.scale)
        return LowRank(self.b, self.a, scale=self.scale)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, known from its config and headers alone."""

    reference: str  # the text it was opened by
    path: Path
    file: WeightFile
    factors: Mapping[str, Factors]  # by the name of the weight that they are added to
    replacements: Mapping[str, TensorSpec]  # full tensors, by the name of the one they replace
    left_out: Mapping[str, str]  # for all else that its file holds, why it is left out
    revision: str | None = None  # the commit a hub repository was fetched at

    def added_to(
        self, base: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, scale: float = 1.0
    ) -> tuple[dict[str, TensorSpec], dict[str, str]]:
        """Return the tensors of a base, by name, with the adapter, times ``scale``, folded in.

        Those that are added to become float32 (float64 where the base is). Returned as well is why each tensor of the
        adapter or base that is not read is left out.

        Raises:
            CheckpointError: a tensor of the adapter matches none of the base, or another shape. All are named.
        """
        name_in = _names_in(base, [*self.factors, *self.replacements])
        tensors, left_out = dict(base), dict(self.left_out)
        problems: list[str] = []
        for name, spec in self.replacements.items():
            try:
                own = _counterpart(name_in[name], spec.name, base, base)
                tensors[name_in[name]] = _replacement(own, spec, name_in[name], scale)
            except CheckpointError as problem:
                problems.append(str(problem))
                continue
            if own.name == name_in[name] and not isinstance(tensors[own.name].encoding, Sum):
                left_out[f"{own.name} of the base"] = f"replaced by the adapter's {spec.name}"
        for name, factors in self.factors.items():
            try:
                own = _counterpart(name_in[name], factors.a.name, tensors, base)
                tensors[name_in[name]] = with_terms(own, scaled((factors.term_for(own),), scale), name_in[name])
            except CheckpointError as problem:
                problems.append(str(problem))
        for names in (self.factors, self.replacements):
            twice = [name for name, count in Counter(name_in[name] for name in names).items() if count > 1]
            problems += [
                f"{name}: two tensors of the adapter are for it; it is not clear which is meant" for name in twice
            ]
        problems += _broken_ties(set(name_in.values()), tensors, config)
        refuse(self.reference, problems, "this adapter on its base")
        return tensors, left_out


def _names_in(base: Mapping[str, TensorSpec], names: list[str]) -> dict[str, str]:
    """Return the base's name for each of an adapter's: either may begin with a part that the other lacks.

    Of all ways to cut or add one, the way by which most names are in the base, and of equals the first.
    """
    ways = [("", ""), *((front, "") for front in _fronts(names)), *(("", front) for front in _fronts(base))]
    renamings = [{name: add + name.removeprefix(cut) for name in names} for cut, add in ways]
    return max(renamings, key=lambda renaming: sum(renaming[name] in base for name in names))


def _fronts(names: Iterable[str]) -> list[str]:
    """Return the commonest first parts of names, each with its dot."""
    return [front + "." for front, _ in Counter(name.partition(".")[0] for name in names).most_common(4)]


def read_adapter(reference: str, path: Path, revision: str | None = None) -> Adapter:
    """Open an adapter's folder. Raises CheckpointError where it is no LoRA, damaged, hostile or of a refused kind."""
    file = folders.inside(path, folders.adapter_weights(path, {entry.name for entry in path.iterdir()}))
    config = read_config(folders.inside(path, folders.ADAPTER_CONFIG))
    header = formats.read_header(file)
    left_out = dict.fromkeys(header.left_out, "not a tensor")
    pairs: dict[str, dict[str, TensorSpec]] = {}
    replacements: dict[str, TensorSpec] = {}
    problems: list[str] = []
    for name, spec in header.tensors.items():
        ending = next((ending for ending in (*FACTORS, *EMBEDDING_FACTORS) if name.endswith(ending)), None)
        twice = False
        plain = name.replace(".modules_to_save.", ".")
        if ending is not None:
            pair = pairs.setdefault(name.removeprefix(PREFIX).removesuffix(ending), {})
            twice = pair.setdefault(ending, spec) is not spec
        elif kind := next((kind for part, kind in REFUSED.items() if part in name), None):
            problems.append(f"{name}: is of {kind}, which can't be folded in. {MERGE_IT}")
        elif ".original_module." in name:
            left_out[name] = "a module as it was before training"
        elif name != plain and plain in header.tensors:
            left_out[name] = f"saved twice; {plain} is taken"
        else:
            replaced = plain.removeprefix(PREFIX).replace(".base_layer.", ".")
            twice = replacements.setdefault(replaced, spec) is not spec
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
    refuse(file, problems, "this adapter")
    return Adapter(reference, path, header.file, factors, replacements, left_out, revision)


def _factors(module: str, pair: Mapping[str, TensorSpec], config: AdapterConfig) -> Factors:
    embedding = pair.keys() == set(EMBEDDING_FACTORS)
    if not embedding and pair.keys() != set(FACTORS):
        names = ", ".join(spec.name for spec in pair.values())
        raise CheckpointError(f"{names}: expected one lora_A and one lora_B. The adapter is damaged: download it again")
    a, b = (pair[ending] for ending in (EMBEDDING_FACTORS if embedding else FACTORS))
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


def _counterpart(name: str, of: str, tensors: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the tensor of this name, which ``of`` changes, or the base's embedding if the base ties a head to it."""
    own = tensors.get(name) or tied_weights.tied_to(name, base)
    if own is None:
        raise CheckpointError(f"{of}: the base has no tensor {shortened(name)}. Is it the right base?")
    if not dtypes.is_float(own.dtype):
        raise CheckpointError(f"{of}: {own.name} of the base is {own.dtype}, which is not for arithmetic")
    return own


def _replacement(own: TensorSpec, spec: TensorSpec, name: str, scale: float) -> TensorSpec:
    """Return what takes the base's place; if scaled or one of several terms, the base with the difference."""
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
    if scale != 1 or isinstance(own.encoding, Sum):
        return with_terms(own, (Replace(spec, base_of(own), scale=scale),), name)
    return replace(spec, name=name, written_as=own.written_as or own.dtype)


def _broken_ties(changed: set[str], tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> list[str]:
    """Return a problem for each changed embedding that a head is tied to: no adapter says whether the head follows."""
    if any(tied_weights.is_head(name) for name in tensors) or (config or {}).get("tie_word_embeddings") is False:
        return []
    return [
        f"{name}: the base ties its output head to it, and the adapter doesn't say whether the head changes too. "
        f"Untie the base first (give it an output head of its own, and tie_word_embeddings false in its config)"
        for name in sorted(changed)
        if tied_weights.is_embedding(name)
    ]
