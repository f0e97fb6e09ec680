"""A PEFT LoRA adapter over a base: which of its tensors are added to, and which are replaced.

    factors               W + scale · B · A     of an embedding W + scale · (B · A)ᵀ, of experts for each of them
    factors and lengths   m · (W + scale · B · A) / ‖W + scale · B · A‖, row by row (DoRA)
    rows of tokens        these rows instead of W's
    full tensors          instead of W

A layer that stores its weight as (in, out), like GPT-2's, gets the transpose of its product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.adapters.config import AdapterConfig
from mergekit_lite.checkpoint.adapters.experts import terms_of_experts
from mergekit_lite.checkpoint.adapters.factors import ExpertFactors, Factors, TokenRows
from mergekit_lite.checkpoint.adapters.heads import Replaced, resized, task_heads, untied, with_task_head
from mergekit_lite.checkpoint.adapters.names import given_twice, matched, misnamed
from mergekit_lite.checkpoint.encodings.dense import Replace
from mergekit_lite.checkpoint.encodings.sum import Sum, base_of, scaled, with_terms
from mergekit_lite.checkpoint.folded import Folded
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.naming.matching import Naming
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, refuse, shortened


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, known from its config and headers alone."""

    reference: str  # the text it was opened by
    path: Path
    file: WeightFile
    config: AdapterConfig
    factors: Mapping[str, Factors]  # by the name of the weight that they are added to
    experts: Mapping[str, Sequence[ExpertFactors]]  # by the name of the layer whose parameters they are added to
    tokens: Mapping[str, TokenRows]  # by the name of the weight that has the rows
    replacements: Mapping[str, TensorSpec]  # full tensors, by the name of the one they replace
    left_out: Mapping[str, str]  # for all else that its file holds, why it is left out
    revision: str | None = None  # the commit a hub repository was fetched at

    def added_to(self, base: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, scale: float = 1.0) -> Folded:
        """Return a base with the adapter, times ``scale``, folded in.

        Tensors that are added to become float32 (float64 where the base is).

        Args:
            base: the tensors of the base by name.
            config: the base's, which says whether it ties its head to its embedding, and what kind of model it is.
            scale: what everything that the adapter changes is multiplied by.

        Raises:
            CheckpointError: a tensor of the adapter matches none of the base, or another shape. All are named.
        """
        heads = task_heads(self.replacements, base, self.config.task)
        replacements = {name: spec for name, spec in self.replacements.items() if name not in heads}
        found = matched(self.factors, self.tokens, replacements, self.experts, base, config)
        name_in, tensors = found.names, dict(base)
        changed = [*self.factors, *self.tokens, *replacements]
        if why := misnamed(found, dict.fromkeys(changed), base):
            raise CheckpointError(f"{self.reference}: this adapter doesn't fit its base. {why}")
        problems = given_twice(found, changed, base)
        replaced: list[Replaced] = []
        for name, spec in replacements.items():
            target = name_in[name]
            try:
                own = _counterpart(target, spec.name, base, base)
                tensors[target] = _replacement(own, spec, target, scale)
                replaced.append(Replaced(target, spec, own))
            except CheckpointError as problem:
                problems.append(str(problem))
        parts: dict[str, Factors | TokenRows] = {**self.factors, **self.tokens}
        for name, part in parts.items():
            target = name_in[name]
            try:
                own = _counterpart(target, part.stored.name, tensors, base)
                tensors[target] = with_terms(own, scaled((part.term_for(own),), scale), target)
            except CheckpointError as problem:
                problems.append(str(problem))
        terms, misfits = terms_of_experts(self.experts, name_in, base, self.config.peft_version)
        for target, term in terms.items():
            tensors[target] = with_terms(tensors[target], scaled((term,), scale), target)
        refuse(self.reference, problems + misfits, "this adapter on its base")
        left_out = dict(self.left_out) | {
            f"{each.name} of the base": f"replaced by the adapter's {each.by.name}"
            for each in replaced
            if each.own.name == each.name and not isinstance(tensors[each.name].encoding, Sum)
        }
        renamed = Naming({name: name_in[name] for name in changed if name_in[name] in base}).summary
        folded = Folded(tensors, config, left_out, (renamed,) if renamed else ())
        # The rows of single tokens change in a tied head too, as peft ties their adapters.
        apart = {name_in[name] for name in (*self.factors, *replacements)}
        try:
            if heads:
                folded = with_task_head(folded, heads, self.config.task or "", scale)
            else:
                folded = untied(folded, apart, base, replaced)
            return resized(folded, replaced, has_tokens=bool(self.tokens))
        except CheckpointError as problem:
            refuse(self.reference, [str(problem)], "this adapter on its base")
            raise


def _counterpart(name: str, of: str, tensors: Mapping[str, TensorSpec], base: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the tensor of this name, which ``of`` changes, or the base's embedding if the base ties a head to it."""
    own = tensors.get(name) or tied_weights.tied_to(name, base)
    if own is None:
        raise CheckpointError(f"{of}: the base has no tensor {shortened(name)}. Is it the right base?")
    if not dtypes.is_float(own.dtype):
        raise CheckpointError(f"{of}: {own.name} of the base is {own.dtype}, which is not for arithmetic")
    return own


def _replacement(own: TensorSpec, spec: TensorSpec, name: str, scale: float) -> TensorSpec:
    """Return what takes the base's place; if scaled or one of several terms, the base with the difference.

    A tensor of the vocabulary may have other rows than the base's, where it takes its place.
    """
    if not dtypes.is_float(spec.dtype):
        raise CheckpointError(f"{spec.name}: is {spec.dtype}, which is not for arithmetic")
    in_part = scale != 1 or isinstance(own.encoding, Sum)
    if spec.shape != own.shape:
        resized = (
            tied_weights.is_vocabulary(name)
            and 0 < len(spec.shape) == len(own.shape)
            and spec.shape[1:] == own.shape[1:]
        )
        if not resized or in_part:
            hint = (
                ". The vocabulary was resized for training, so what the adapter has can't be scaled or added to"
                if resized
                else ". Is it the right base?"
            )
            raise CheckpointError(
                f"{spec.name}: has shape {list(spec.shape)}, but {own.name} of the base {list(own.shape)}{hint}"
            )
    if in_part:
        return with_terms(own, (Replace(spec, base_of(own), scale=scale),), name)
    return replace(spec, name=name, written_as=own.written_as or own.dtype)
