"""Packed sequences have the log-probabilities and gradients of padded ones, or the model is not packed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mergekit_lite.answers.logprobs import Batch, padded, response_log_probs
from mergekit_lite.answers.packing import Packed, attend, packed, packs
from mergekit_lite.answers.template import Tokens
from tests.causal import causal_model

PACKED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3text", "mistral", "gpt2", "gptneox", "granite", "qwen3moe", "opt")
# A state, a convolution, positions that don't restart, sinks of attention.
NOT_PACKED = ("mamba", "lfm2", "bloom", "gptoss")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' of token ids that the tiny vocabulary lacks


def groups(seed: int, number: int = 3) -> list[list[Tokens]]:
    """Prompts of 1 to 60 tokens with two responses each."""
    print("seed", seed)
    draws = torch.Generator().manual_seed(seed)

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most, (), generator=draws))
        return tuple(torch.randint(1, 300, (length,), generator=draws).tolist())

    prompts = [ids(60) for _ in range(number)]
    return [[Tokens(prompt, ids(80)), Tokens(prompt, ids(80))] for prompt in prompts]


def flat(rows: Sequence[Sequence[Tokens]]) -> list[Tokens]:
    return [row for group in rows for row in group]


def scored(model, batch: Batch | Packed) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and each weight's gradient of a sum with signs, as of chosen and rejected responses."""
    model.zero_grad()
    sums = response_log_probs(model, batch).sums
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    return sums.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold each weight's gradient to its norm, and to that of the whole gradient where its own is only rounding.

    So is that of a key's bias: softmax takes no notice of what is added to all keys, and the true gradient is zero.
    """
    assert found.keys() == expected.keys()
    whole = torch.stack([each.norm() for each in expected.values()]).norm()
    for name, each in expected.items():
        assert (found[name] - each).norm() < 2e-6 * each.norm() + 2e-8 * whole, name


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_is_padded(architecture):
    model, rows = causal_model(architecture), groups(seed=len(architecture))
    sums, gradients = scored(model, padded(flat(rows)))
    assert packs(model)
    for share in (False, True):
        packed_sums, packed_gradients = scored(model, packed(rows, share))
        torch.testing.assert_close(packed_sums, sums, rtol=1e-6, atol=0)
        assert_same(packed_gradients, gradients)


@pytest.mark.parametrize("architecture", NOT_PACKED)
def test_models_that_mix_packed_sequences_are_left_as_they_are(architecture):
    model, rows = causal_model(architecture), padded(flat(groups(seed=1)))
    own, before = model.config._attn_implementation, response_log_probs(model, rows).sums
    assert not packs(model)
    assert model.config._attn_implementation == own
    assert torch.equal(before, response_log_probs(model, rows).sums)


def test_the_layout():
    """The example of the module's docstring, and a row without a prompt."""
    batch = packed([[Tokens((1, 2, 3), (4, 5)), Tokens((1, 2, 3), (6,))], [Tokens((), (7, 8))]])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert batch.sizes == (5, 4, 2)
    assert batch.taken.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert batch.taken[batch.given].tolist() == list(range(8))
    assert batch.states.tolist() == [2, 3, 2, 6] and batch.targets.tolist() == [4, 5, 6, 8]
    assert batch.lengths.tolist() == [2, 1, 1]
    assert packed([[Tokens((1,), (2,))]]).taken is None


def test_flash_attention_is_told_of_the_borders():
    """Transformers' flash attention takes ``cu_seq_lens_q`` and its like: a kernel by them alone gives the same."""
    from transformers import AttentionInterface

    def by_borders(module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, **named):
        sizes = tuple(cu_seq_lens_q.diff().tolist())
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k) and max(sizes) == max_length_q
        named.pop("packed")
        return attend(module, query, key, value, mask, Packed(*[None] * 2, sizes, *[None] * 5), **named)

    model, rows = causal_model("qwen3"), groups(seed=2)
    sums = response_log_probs(model, padded(flat(rows))).sums
    AttentionInterface.register("by_borders", by_borders)
    model.set_attn_implementation("by_borders")
    torch.testing.assert_close(response_log_probs(model, packed(rows, share=False)).sums, sums, rtol=1e-6, atol=0)


def test_sixteen_bits_and_checkpointed_activations():
    model, rows = causal_model("gemma2").to(torch.bfloat16), groups(seed=3)
    sums, _ = scored(model, padded(flat(rows)))
    assert packs(model)
    packed_sums, gradients = scored(model, packed(rows))
    torch.testing.assert_close(packed_sums, sums, rtol=2e-2, atol=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = scored(model, packed(rows))[1]
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-3)
