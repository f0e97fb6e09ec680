"""Log-probabilities of responses, held to those of full logits in float64."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mergekit_lite.answers import logprobs
from mergekit_lite.answers.logprobs import check_head, padded, response_log_probs
from mergekit_lite.answers.template import Tokens
from mergekit_lite.errors import UsageError
from tests.causal import ARCHITECTURES, causal_model

HIDDEN = 4  # so small that the head's own weight doesn't count


def rows(seed: int, vocabulary: int = 340) -> list[Tokens]:
    draws = torch.Generator().manual_seed(seed)

    def ids(length):
        return tuple(torch.randint(1, vocabulary, (length,), generator=draws).tolist())

    return [Tokens(ids(7), ids(5)), Tokens(ids(2), ids(11)), Tokens(ids(9), ids(1)), Tokens(ids(1), ids(3))]


def naive(model, row: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, no padding, all logits, one softmax: the log-probability and mean_t log Σ p²."""
    logits = model(input_ids=torch.tensor([[*row.prompt, *row.response]])).logits[0].double()
    logps = logits.log_softmax(-1)
    steps = range(len(row.prompt), len(row.prompt) + len(row.response))
    total = sum(logps[step - 1, token] for step, token in zip(steps, row.response, strict=True))
    return total, torch.stack([(2 * logps[step - 1]).logsumexp(0) for step in steps]).mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_full_logits(architecture, monkeypatch):
    """Sums, lengths, squares and every gradient; in chunks of 3 positions so that several are needed."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 3 * 340)
    model = causal_model(architecture)
    check_head(model)
    weights = torch.tensor([1.0, -0.5, 2.0, 0.25])

    ours = response_log_probs(model, padded(rows(1)), squares=True)
    (ours.sums * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    expected = [naive(model, row) for row in rows(1)]
    sum(weight * total for weight, (total, _) in zip(weights, expected, strict=True)).backward()

    assert ours.lengths.tolist() == [5, 11, 1, 3]
    torch.testing.assert_close(ours.sums.double(), torch.stack([total for total, _ in expected]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.squares.double(), torch.stack([mean for _, mean in expected]), rtol=1e-5, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_no_gradient_where_none_is_wanted():
    model = causal_model()
    with torch.no_grad():
        reference = response_log_probs(model, padded(rows(2)))
    assert not reference.sums.requires_grad
    torch.testing.assert_close(reference.sums, response_log_probs(model, padded(rows(2))).sums.detach())


def test_batch_example():
    """Rows of probabilities, two of them before the response: ln .25 + ln .3."""
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.25, 0.5], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    apply = logprobs._TargetLogProbs.apply
    logps, _ = apply(probabilities.log()[1:3], torch.tensor([0, 1]), logprobs.Shape(1.0, None), False)
    assert logps.sum().item() == pytest.approx(-2.5902672, abs=1e-6)
    assert logps.mean().item() == pytest.approx(-1.2951336, abs=1e-6)


def test_a_head_that_does_more_is_refused():
    model = causal_model()
    forward = model.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = odd
    with pytest.raises(UsageError, match="LlamaForCausalLM makes its logits in a way"):
        check_head(model)


class VocabularyTensors(TorchDispatchMode):
    """Counts the elements of all tensors (float32 ones apart) over a vocabulary that are alive at once."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.alive: dict[int, tuple[StorageWeakRef, torch.dtype, int]] = {}
        self.most = {torch.float32: 0, torch.bfloat16: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            if tensor.shape[-1:] == (self.vocabulary,) and len(tensor) > HIDDEN:
                storage = tensor.untyped_storage()
                elements = storage.nbytes() // tensor.element_size()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), tensor.dtype, elements)
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for dtype in self.most:
            total = sum(elements for _, kind, elements in self.alive.values() if kind is dtype)
            self.most[dtype] = max(self.most[dtype], total)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_never_more_than_one_chunk_of_logits(dtype):
    """2 rows of 3 sequences of 2048 tokens at a vocabulary of 128k, forward and backward."""
    vocabulary = 131_072
    model = causal_model(vocabulary=vocabulary, hidden=HIDDEN, layers=1).to(dtype)
    long = [Tokens((1,) * (2048 - length), (2,) * length) for length in (60, 250, 100, 180, 120, 240)]
    with VocabularyTensors(vocabulary) as seen:
        response_log_probs(model, padded(long)).sums.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    parts = 3 * logprobs.LOGITS_AT_ONCE // logprobs.PARTS  # of the temporaries of a softmax
    assert (
        logprobs.LOGITS_AT_ONCE / 2
        < seen.most[dtype]
        <= logprobs.LOGITS_AT_ONCE + (parts if dtype is torch.float32 else 0)
    )
    if dtype is torch.bfloat16:
        assert 0 < seen.most[torch.float32] <= parts
