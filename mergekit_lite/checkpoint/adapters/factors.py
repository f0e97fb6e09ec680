"""What an adapter trained for one module, as terms that are added to the base's tensor.

A LoRA on the experts of a layer that are one tensor (``target_parameters``) is stored as two matrices, as peft's
``ParamWrapper`` has them: in the rows of ``lora_A`` come the ranks of the first expert, then those of the second; in
the columns of ``lora_B`` the experts of the first rank, then those of the second. Up to peft 0.19.0 the axes of the
experts' matrices were taken as (in, out), whatever the model meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_lite.checkpoint.encodings.dora import Dora
from mergekit_lite.checkpoint.encodings.low_rank import LowRank
from mergekit_lite.checkpoint.encodings.rows import Rows
from mergekit_lite.checkpoint.encodings.stack import StackedLowRank
from mergekit_lite.checkpoint.encodings.strided import strides_of, transposed, viewed
from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, counted

AXES_AS_MEANT = (0, 19, 1)  # the version of peft since which the axes of experts are taken as the model means them


@dataclass(frozen=True)
class Factors:
    """The two factors of one module's LoRA."""

    a: TensorSpec  # (r, in)
    b: TensorSpec  # (out, r)
    scale: float  # what their product is multiplied by
    transposed: bool  # whether the weight is stored as (in, out), as far as the config says
    magnitude: TensorSpec | None = None  # (out): the lengths of the rows, of a DoRA

    @property
    def stored(self) -> TensorSpec:
        """The tensor that messages name."""
        return self.a

    def term_for(self, base: TensorSpec) -> Term:
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
        if self.magnitude is not None and orientations[0]:
            raise CheckpointError(
                f"{self.magnitude.name}: is of a DoRA on {base.name}, which is stored with its rows as columns. "
                "Merge it with peft (model.merge_and_unload()), save that, and name the result"
            )
        if orientations[0]:
            return LowRank(transposed(self.a), transposed(self.b), scale=self.scale)
        if self.magnitude is not None:
            return Dora(base, self.b, self.a, self.magnitude, self.scale)
        return LowRank(self.b, self.a, scale=self.scale)


@dataclass(frozen=True)
class TokenRows:
    """The rows of an embedding or a head that were trained apart, and whose they are."""

    rows: TensorSpec  # (tokens, width)
    tokens: tuple[int, ...]  # the number of each

    @property
    def stored(self) -> TensorSpec:
        """The tensor that messages name."""
        return self.rows

    def term_for(self, base: TensorSpec) -> Rows:
        """Return what is added to ``base``. Raises CheckpointError where it lacks a row, or the shapes don't fit."""
        if len(base.shape) != 2 or self.rows.shape != (len(self.tokens), base.shape[1]):
            raise CheckpointError(
                f"{self.rows.name}: has shape {list(self.rows.shape)}, expected a row of {base.name}, "
                f"{list(base.shape)}, for each of {counted(len(self.tokens), 'token')}. Is it the right base?"
            )
        if max(self.tokens) >= base.shape[0]:
            raise CheckpointError(
                f"{self.rows.name}: has a row for token {max(self.tokens)}, but {base.name} of the base has "
                f"{base.shape[0]} rows. The vocabulary was resized for training: load the base, call "
                f"model.resize_token_embeddings with the size it was trained with, save it, and name that"
            )
        return Rows(self.rows, base, self.tokens)


@dataclass(frozen=True)
class ExpertFactors:
    """The factors of a LoRA on the experts of a layer, which are one tensor or several."""

    a: TensorSpec  # (experts · r, in)
    b: TensorSpec  # (out, r · experts)
    ranks: Mapping[str, tuple[int, float]]  # for each parameter of the module that it may be for, its rank and scale

    def fits(self, parameter: str, shape: tuple[int, ...]) -> list[bool]:
        """Return in which orientations it fits a parameter of this shape: as it is (False), turned (True)."""
        if len(shape) != 3:
            return []
        total = shape[0] * self.ranks[parameter][0]
        product = self.b.shape[0], self.a.shape[1]
        if (self.a.shape[0], self.b.shape[1]) != (total, total):
            return []
        return [turned for turned in (False, True) if (product[::-1] if turned else product) == shape[1:]]

    def term_for(self, parameter: str, experts: int, turned: bool) -> StackedLowRank:
        """Return what is added to the stack of all experts."""
        rank, scale = self.ranks[parameter]
        (a_row, a_column), (b_row, b_column) = strides_of(self.a), strides_of(self.b)
        inner, outer = self.a.shape[1], self.b.shape[0]
        if turned:
            left = viewed(self.a, 0, (experts, inner, rank), (rank * a_row, a_column, a_row))
            right = viewed(self.b, 0, (experts, rank, outer), (b_column, experts * b_column, b_row))
        else:
            left = viewed(self.b, 0, (experts, outer, rank), (b_column, b_row, experts * b_column))
            right = viewed(self.a, 0, (experts, rank, inner), (rank * a_row, a_row, a_column))
        return StackedLowRank(left, right, scale=scale)
