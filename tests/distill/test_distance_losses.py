"""Distances computed in chunks from a model's hidden states, held to those of all its logits at once."""

from __future__ import annotations

import pytest
import torch

from mergekit_lite.answers import logprobs
from mergekit_lite.answers.logprobs import Shape, padded
from mergekit_lite.answers.packing import packed, packs
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.objectives import groups
from mergekit_lite.distillation.objectives.distance import Ask, Columns, answered
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.training.distances import _answered, _parts, distance_losses
from tests.answers.test_logprobs import HIDDEN, VocabularyTensors
from tests.causal import causal_model
from tests.distill.teachers import in_float32, mapping, projection, taught

VOCABULARY = 340
TEACHER = {"same": VOCABULARY, "map": 300, "projection": 300, "any": 300}


def batch_of(positions: int) -> list[Tokens]:
    draws = torch.Generator().manual_seed(3)
    rows, sizes = [], [5, 3, positions - 8]
    for size in sizes:
        ids = torch.randint(1, VOCABULARY, (4 + size,), generator=draws).tolist()
        rows.append(Tokens(tuple(ids[:4]), tuple(ids[4:])))
    return rows


def vocabulary_of(name: str, seed: int):
    kind = DISTANCES[name].vocabulary
    return {"map": mapping, "projection": projection}.get(kind, lambda *_: None)(seed, VOCABULARY, TEACHER[kind])


def two_teachers(name: str):
    """Teachers whose groups differ, the second with fewer tokens a position."""
    shapes = ((2, 1), (1, 1), (1, 2), (1, 1), (4, 3), (1, 1), (1, 1), (1, 1), (1, 0), (0, 1))
    size = TEACHER[DISTANCES[name].vocabulary]
    both = [taught(1, VOCABULARY, size, top=20), taught(2, VOCABULARY, size, top=7, shapes=shapes)]
    assert len({len(each.tokens) for each in both}) == 1
    return [in_float32(each.targets) for each in both], [vocabulary_of(name, seed) for seed in (1, 2)]


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_equal_to_all_logits(name, architecture, monkeypatch):
    """Losses, log-probabilities and every gradient, with two teachers, whatever the chunks."""
    distance = DISTANCES[name]
    model = causal_model(architecture, VOCABULARY)
    targets, vocabularies = two_teachers(name)
    batch = padded(batch_of(len(targets[0].student_groups)))
    draws = torch.Generator().manual_seed(4)
    weights = [torch.rand(each.groups, generator=draws) for each in targets]

    def gradients(log_probs, losses):
        total = -0.1 * log_probs.sum() + sum(
            (each * weight).sum() for each, weight in zip(losses, weights, strict=True)
        )
        model.zero_grad()
        total.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.states]
    expected = [
        distance(logits, batch.targets, each, vocabulary)
        for each, vocabulary in zip(targets, vocabularies, strict=True)
    ]
    log_probs = logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    wanted = gradients(log_probs, expected)
    for rows in (1, 4, 7, 1000):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", rows * VOCABULARY)
        found = distance_losses(model, batch, targets, distance, distance.defaults, vocabularies)
        torch.testing.assert_close(found[0], log_probs, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(found[1], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for key, gradient in gradients(*found).items():
            scale = wanted[key].abs().max().item()
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4 * scale, msg=f"{key}, {rows} rows")


def asked(seed: int, rows: int, size: int, temperature: float = 1.0) -> Ask:
    """Lists with gaps, likeliest tokens among some, and columns."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(size // 2, generator=draws)[:5] for _ in range(rows)])
    ids[:, 3] = ids[:, 3].where(torch.rand(rows, generator=draws) < 0.5, -1)
    tokens, columns = torch.randint(size, (12,), generator=draws), torch.randint(4, (12,), generator=draws)
    weights = torch.rand(12, generator=draws, dtype=torch.float64)
    return Ask(ids, 3, torch.arange(size) >= size // 2, Columns(tokens, columns, weights, 4, temperature))


@pytest.mark.parametrize("shape", [Shape(1.0, None), Shape(0.5, 3.0)])
def test_one_pass_answers_all_that_is_asked(shape):
    """Two questions, one with a temperature, in float64: the answers, and the gradient of a function of them all."""
    rows, size = 17, 24
    draws = torch.Generator().manual_seed(9)
    logits = torch.randn(rows, size, generator=draws, dtype=torch.float64) * 3
    tokens = torch.randint(size, (rows,), generator=draws)
    asks = [asked(1, rows, size), asked(2, rows, size, temperature=2.0), Ask()]

    def value(students):
        parts = [
            part.masked_fill(part.isneginf(), 0.0)
            for each in students
            for part in vars(each).values()
            if part is not tokens
        ]
        return torch.cat(
            [(part * torch.linspace(1, 2, part.numel()).view(part.shape)).flatten().sin() for part in parts]
        )

    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = value(_answered(asks, ours * 1.0, tokens, shape)[1])
    expected = value([answered(ask, shape.apply(theirs), tokens) for ask in asks])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each.sum(), given)[0] for each, given in ((found, ours), (expected, theirs))]
    torch.testing.assert_close(*gradients)


def test_a_small_tail_keeps_its_digits():
    """The listed tokens have all but 1e-12 of the student's mass, which 1 − Σ q can't tell from 0 in float32."""
    logits = torch.full((1, 50), -35.0).index_fill(1, torch.arange(3), 0.0).requires_grad_()
    ids = torch.arange(3)[None]
    _, (student,) = _answered([Ask(ids)], logits * 1.0, torch.tensor([0]), Shape(1.0, None))
    exact = logits.detach().double().requires_grad_()
    wanted = answered(Ask(ids), exact, torch.tensor([0]))
    torch.testing.assert_close(student.rest.double(), wanted.rest)
    (found,) = torch.autograd.grad(student.rest.sum(), logits)
    (expected,) = torch.autograd.grad(wanted.rest.sum(), exact)
    torch.testing.assert_close(found.double(), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", DISTANCES)
def test_models_in_bfloat16(name, autocast):
    """What is summed is in float32: losses differ from those of float32 logits by the logits' own rounding.

    Trainings in 16 bits have weights in float32 and autocast, which would have products in 16 bits.
    """
    distance, model = DISTANCES[name], causal_model(vocabulary=VOCABULARY)
    model = model if autocast else model.bfloat16()
    targets, vocabularies = two_teachers(name)
    batch = padded(batch_of(len(targets[0].student_groups)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = distance_losses(model, batch, targets, distance, distance.defaults, vocabularies)
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.states]
    assert logits.dtype is torch.bfloat16
    for losses, each, vocabulary in zip(found[1], targets, vocabularies, strict=True):
        assert losses.dtype is torch.float32
        torch.testing.assert_close(
            losses, distance(logits.float(), batch.targets, each, vocabulary), rtol=1e-4, atol=1e-5
        )
    sum(each.mean() for each in found[1]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_logit_that_is_no_number_is_not_hidden():
    """It is of no token that a teacher lists: it shows in the mass of the others, and so in all."""
    logits = torch.zeros(1, 20).index_fill(1, torch.tensor([7]), torch.nan)
    log_probs, (student,) = _answered([Ask(torch.arange(3)[None])], logits, torch.tensor([0]), Shape(1.0, None))
    assert log_probs.isnan().all() and student.at.isnan().all() and student.rest.isnan().all()


def test_packed_rows_are_the_same():
    model = causal_model(vocabulary=VOCABULARY)
    targets, vocabularies = two_teachers("gold")
    rows = batch_of(len(targets[0].student_groups))
    assert packs(model)
    given = [packed([[row] for row in rows]), padded(rows)]
    model.set_attn_implementation("sdpa")
    alone = distance_losses(model, given[1], targets, DISTANCES["gold"], DISTANCES["gold"].defaults, vocabularies)
    assert packs(model)
    together = distance_losses(model, given[0], targets, DISTANCES["gold"], DISTANCES["gold"].defaults, vocabularies)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_no_gradient_where_none_is_wanted():
    model = causal_model(vocabulary=VOCABULARY)
    targets, vocabularies = two_teachers("uld")
    batch = padded(batch_of(len(targets[0].student_groups)))
    with torch.no_grad():
        log_probs, losses = distance_losses(model, batch, targets, DISTANCES["uld"], {}, vocabularies)
    assert not log_probs.requires_grad and not losses[0].requires_grad


def test_a_batch_that_no_teacher_says_anything_of():
    model = causal_model(vocabulary=VOCABULARY)
    batch = padded(batch_of(12))
    log_probs, losses = distance_losses(model, batch, [], DISTANCES["jsd"], {}, [])
    torch.testing.assert_close(log_probs.sum(), logprobs.response_log_probs(model, batch).sums.sum())
    assert losses == []


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_no_group_is_split(rows):
    """Parts follow each other, hold whole groups with all tokens of both teachers, and are no longer than may be."""
    targets, _ = two_teachers("alm")
    positions = len(targets[0].student_groups)
    parts = list(_parts(targets, positions, rows))
    assert [part.positions.start for part in parts] == [0, *(part.positions.stop for part in parts[:-1])]
    assert parts[-1].positions.stop == positions
    for number, each in enumerate(targets):
        taken = [part.targets[number] for part in parts]
        assert sum(part.groups for part in taken) == each.groups
        for name in ("student_groups", "teacher_groups"):
            sizes = torch.cat([groups.sizes(getattr(part, name), part.groups) for part in taken])
            assert sizes.tolist() == groups.sizes(getattr(each, name), each.groups).tolist()
    assert rows < 5 or all(part.positions.stop - part.positions.start <= rows for part in parts)


@pytest.mark.parametrize("name", ["forward_kl", "uld", "gold", "p_kl"])
def test_never_more_than_one_chunk_of_logits(name, monkeypatch):
    """Four chunks, forward and backward: hardly more in memory than the logits of one."""
    vocabulary, rows = 16_384, 128
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", rows * vocabulary)
    model = causal_model(vocabulary=vocabulary, hidden=HIDDEN, layers=1)
    batch = padded([Tokens((1,) * 20, tuple(range(2, 252))) for _ in range(2)])
    given = in_float32(taught(1, 64, 64, 8, shapes=((1, 1),) * 497).targets)
    assert len(given.student_groups) == len(batch.states)
    kind = {"map": mapping, "projection": projection}.get(DISTANCES[name].vocabulary, lambda *_: None)
    known = kind(1, vocabulary if kind is projection else 64, 64)
    with VocabularyTensors(vocabulary) as seen:
        _, (losses,) = distance_losses(model, batch, [given], DISTANCES[name], DISTANCES[name].defaults, [known])
        losses.mean().backward()
    assert rows * vocabulary // 2 < seen.most[torch.float32] <= rows * vocabulary * 1.25


def test_the_last_chunk_is_full_and_computed_once(monkeypatch):
    """The head's rows, forward and backward, of 12 positions in chunks of 5: only 2 and 5 are computed again."""
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    model = causal_model(vocabulary=VOCABULARY)
    batch = padded(batch_of(12))
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    logprobs.response_log_probs(model, batch).sums.sum().backward()
    assert seen == [2, 5, 5, 5, 2]
    seen.clear()
    distance_losses(model, batch, [], DISTANCES["jsd"], {}, [])[0].sum().backward()
    assert seen == [2, 5, 5, 5, 2]
