"""All that distances ask of a chunk of logits, from one pass over them, with a gradient that overwrites them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mergekit_lite.answers.logprobs import PARTS, Shape
from mergekit_lite.distillation.objectives.distance import Columns


class Listed(torch.autograd.Function):
    """From a head's output (R, V) to log q of listed tokens (R, U), log of the others' mass (R,), and products (R, C).

    The listed ids are distinct in a row, the tokens of the text among them; −1 stands for these again, and gets no
    gradient. The others' mass is summed without the listed ones, as 1 minus theirs would lose all digits of a small
    one. The products are softmax(z / T) A of each matrix, side by side. Results are in float32, or float64 if the
    output is. The gradient overwrites the head's output, which nothing else needs by then.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, ids: Tensor, tokens: Tensor, shape: Shape, columns: Sequence[Columns]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the three; ``ids`` are (R, U), ``tokens`` (R,)."""
        places = ids.where(ids >= 0, tokens[:, None])
        found = []
        for part, place, given in zip(*(each.chunk(PARTS) for each in (output, places, ids)), strict=True):
            logits = shape.apply(part)
            used = [logits.index_select(1, each.used) for each in columns]
            warm = [None if each.temperature == 1 else _total(logits / each.temperature) for each in columns]
            listed = logits.gather(1, place)
            logits.scatter_(1, place, -torch.inf)
            rest = _total(logits)
            if logits.data_ptr() == part.data_ptr():
                logits.scatter_(1, place, listed)
            total = torch.logaddexp(listed.masked_fill(given < 0, -torch.inf).logsumexp(1), rest)
            totals = [total if each is None else each for each in warm]
            made = [each.product(_probs(z, each, log_z)) for each, z, log_z in zip(columns, used, totals, strict=True)]
            products = torch.cat([*made, rest.new_empty(len(rest), 0)], 1)
            found.append((listed - total[:, None], rest - total, rest, products, torch.stack([total, *totals], 1)))
        log_q, others, rest, products, sums = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.save_for_backward(output, places, log_q, rest, products, sums)
        ctx.shape, ctx.columns = shape, columns
        return log_q, others, products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_listed: Tensor, of_others: Tensor, of_products: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the output, in its place."""
        output, places, log_q, rest, products, sums = (tensor.detach() for tensor in ctx.saved_tensors)
        columns: Sequence[Columns] = ctx.columns
        counts = [each.count for each in columns]
        means = torch.stack([rest.new_zeros(len(rest)), *_sums(products * of_products, counts)], 1)
        plain = torch.tensor([False, *(each.temperature == 1 for each in columns)], device=rest.device)
        of_others = of_others.where(rest > -torch.inf, 0.0)
        # dz = g(others) softmax(z over the others) − every · softmax(z): one exponential with the others' total.
        every = of_listed.sum(1) + of_others + (means * plain).sum(1)
        share = of_others - every * (rest - sums[:, 0]).exp()
        own = -every[:, None] * log_q.exp()
        pieces = (output, places, rest, share, own, of_listed, of_products, sums, means)
        for part, place, base, factor, mine, listed, of_made, totals, mean in zip(
            *(tensor.chunk(PARTS) for tensor in pieces), strict=True
        ):
            logits = ctx.shape.apply(part)
            curve = ctx.shape.slope(logits)  # before the logits, which may be the part itself, are overwritten
            used, whole = [], []
            for each, slope, log_z, middle in zip(
                columns,
                of_made.split(counts, 1) if counts else (),
                totals[:, 1:].unbind(1),
                mean[:, 1:].unbind(1),
                strict=True,
            ):
                probs = _probs(logits.index_select(1, each.used), each, log_z)
                used.append(probs.mul_(each.turned_product(slope)).div_(each.temperature))
                if each.temperature != 1:
                    whole.append(_probs(logits, each, log_z).mul_(middle[:, None]).div_(each.temperature))
            slope = logits.sub_(base[:, None]).exp_().mul_(factor[:, None])
            slope.scatter_(1, place, mine).scatter_add_(1, place, listed)
            for each, values in zip(columns, used, strict=True):
                slope.index_add_(1, each.used, values)
            for values in whole:
                slope.sub_(values)
            part.copy_(slope if isinstance(curve, float) and curve == 1 else slope.mul_(curve))
        return output, None, None, None, None


def _total(logits: Tensor) -> Tensor:
    """Return log Σ eᶻ (R,) of rows; −inf where all are, NaN where one is.

    That is z − log softmax(z) at the largest z, in two thirds of logsumexp's time on a CPU.
    """
    largest = logits.amax(1)
    return (largest - logits.log_softmax(1).amax(1)).where(largest != -torch.inf, -torch.inf)


def _probs(logits: Tensor, columns: Columns, log_z: Tensor) -> Tensor:
    """Return e^(z / T) / Z of logits (R, n)."""
    return (logits / columns.temperature).sub_(log_z[:, None]).exp_()


def _sums(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the sums (R,) of columns that lie side by side."""
    return [each.sum(1) for each in torch.split(values, list(counts), 1)] if counts else []
