"""The k largest by passes: what a sample guesses, what has to be counted in full, and ties, against a stable sort."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from mergekit_lite.methods.contract import Block, Reduction, TensorInfo, Totals
from mergekit_lite.methods.statistics import WORTH_SAMPLING, largest
from mergekit_lite.methods.tensor_merge import sample
from mergekit_lite.ops.operations import Cut
from mergekit_lite.ops.torch_ops import figures_of
from mergekit_lite.ops.torch_ops import total as summed

ELEMENTS = WORTH_SAMPLING + 777


def cuts(tensors: list[torch.Tensor], ks: list[int], group: str | None = None, gaps: int = 0) -> tuple[list[Cut], int]:
    """The cut of each k over all tensors, found as an engine does, and the number of full passes it took.

    ``gaps`` elements of other tensors lie before each one.
    """
    extent = sum(len(tensor) + gaps for tensor in tensors)
    searches = []
    offset = 0
    for tensor in tensors:
        offset += gaps
        info = TensorInfo("w", tuple(tensor.shape), 1, False, 0, offset, extent)
        searches.append(steps(info, ks, group, sum(map(len, tensors))))
        offset += len(tensor)
    full = 0
    requests = [next(search) for search in searches]
    while True:
        totals = [total(request, tensor) for request, tensor in zip(requests, tensors, strict=True)]
        full += not requests[0].sampled and requests[0].within is None
        requests, found = sent(searches, torch.stack(totals).sum(0).numpy())
        if not requests:
            return found, full


def sent(
    searches: list[Generator[Reduction, Totals, list[list[Cut]]]], of_all: Totals
) -> tuple[list[Reduction], list[Cut]]:
    """The next requests; where there are none, the cuts that the first search found."""
    requests, found = [], []
    for search in searches:
        try:
            requests.append(search.send(of_all))
        except StopIteration as finished:
            found.append(finished.value)
    return requests, found[0][0] if found else []


def steps(
    info: TensorInfo, ks: list[int], group: str | None, whole: int
) -> Generator[Reduction, Totals, list[list[Cut]]]:
    def counts(_: int, elements: int, __: int) -> list[int]:
        return [k * elements // whole for k in ks]

    return largest(info, lambda block, _: [block[0].abs()], counts, group)


def total(request: Reduction, tensor: torch.Tensor) -> torch.Tensor:
    if request.sampled:
        picked: Block = [torch.cat([tensor[start : start + count] for start, count in sample(0, len(tensor))])]
        return figures_of(request.of, picked, 0)
    return torch.stack(
        [figures_of(request.of, [tensor[start : start + 100_000]], start) for start in range(0, len(tensor), 100_000)]
    ).sum(0)


def kept(tensor: torch.Tensor, k: int) -> torch.Tensor:
    """Which elements a stable sort puts among the k largest."""
    mask = torch.zeros(len(tensor))
    mask[tensor.abs().sort(descending=True, stable=True).indices[:k]] = 1
    return mask


def noise(seed: int = 0, count: int = ELEMENTS) -> torch.Tensor:
    print("seed", seed)
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_few_different_values_take_one_full_pass() -> None:
    tensor = (noise() * 4).round()
    for k in (1, 1000, ELEMENTS // 2, ELEMENTS - 5, ELEMENTS):
        [cut], full = cuts([tensor], [k])
        assert torch.equal(cut.mask(tensor.abs(), 0), kept(tensor, k)), k
        assert torch.equal(cut.largest(tensor, 0), tensor * kept(tensor, k)), k
        if k > 1000:
            assert full == 1, k


def test_all_values_different() -> None:
    tensor = noise()
    for k in (1, ELEMENTS // 3, ELEMENTS):
        [cut], full = cuts([tensor], [k])
        assert torch.equal(cut.mask(tensor.abs(), 0), kept(tensor, k)), k
        assert full <= 3


def test_a_sample_that_misleads() -> None:
    """All that is large lies between the sample's pieces."""
    tensor = torch.ones(ELEMENTS)
    for start, count in sample(0, ELEMENTS):
        tensor[start : start + count] = 0
    for k in (5, ELEMENTS // 2):
        [cut], full = cuts([tensor], [k])
        assert torch.equal(cut.mask(tensor, 0), kept(tensor, k))
        assert full == 3  # the comparison that fails, and both halves of the bits


def test_nothing_of_a_thousand_zeros() -> None:
    tensor = torch.zeros(ELEMENTS)
    [none, some], _ = cuts([tensor], [0, 10])
    assert none.mask(tensor, 0).sum() == 0 and none.largest(tensor, 0).abs().sum() == 0
    assert torch.equal(some.mask(tensor, 0), kept(tensor, 10))


def test_several_cuts_at_once() -> None:
    tensor = (noise(3) * 4).round()
    ks = [0, 10, ELEMENTS // 4, ELEMENTS]
    found, _ = cuts([tensor], ks)
    for cut, k in zip(found, ks, strict=True):
        assert torch.equal(cut.mask(tensor.abs(), 0), kept(tensor, k)), k


@pytest.mark.parametrize("gaps", [0, 12_345, 3_000_000])
def test_a_group_with_other_tensors_between(gaps: int) -> None:
    """Ties are split by the place in the model, whatever lies between the tensors of the group."""
    tensors = [(noise(n, count) * 4).round() for n, count in enumerate((70_000, 300, 250_001))]
    whole = torch.cat(tensors)
    for k in (7, 100_000, len(whole) - 1):
        [cut], _ = cuts(tensors, [k], "model", gaps)
        offset, masks = 0, []
        for tensor in tensors:
            offset += gaps
            masks.append(cut.mask(tensor.abs(), offset))
            offset += len(tensor)
        assert torch.equal(torch.cat(masks), kept(whole, k)), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_that_holds_the_last_tie(dtype: torch.dtype) -> None:
    delta = torch.tensor([2.0, -1, 1, 0.5, -1, 3], dtype=dtype)
    for end, expected in ((0, [2, 0, 0, 0, 0, 3]), (12, [2, -1, 0, 0, 0, 3]), (99, [2, -1, 1, 0, -1, 3])):
        cut = Cut(1.0, end)
        assert cut.largest(delta, 10).tolist() == expected
        assert (delta * cut.mask(delta.abs(), 10)).tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 100_001])
def test_totals(count: int) -> None:
    for dtype in (torch.float32, torch.float64):
        values = noise(count, count).to(dtype)
        assert summed(values.abs()).item() == pytest.approx(values.double().abs().sum().item(), rel=1e-8)
