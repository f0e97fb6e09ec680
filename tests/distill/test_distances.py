"""Distances to teachers: published numbers, formulas written down naively, gradients, and what mustn't count."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mergekit_lite.distillation.alignment.vocabulary import VocabularyMap
from mergekit_lite.distillation.objectives.distances import DISTANCES, combined_weights
from mergekit_lite.distillation.objectives.targets import Targets
from tests.distill.teachers import Taught, mapping, of_both, projection, taught

SEEDS = (1, 2, 3)
FLOAT32 = 6e-8  # the published numbers were computed in it
STUDENT, TEACHER = 29, 23
CHOICES = [  # every distance, with its options
    ("cross_entropy", {}),
    ("cross_entropy", {"fallback": "one_hot", "top": 5, "temperature": 2.0}),
    ("forward_kl", {}),
    ("forward_kl", {"tail": "ignore"}),
    ("reverse_kl", {}),
    ("reverse_kl", {"tail": "ignore"}),
    ("jsd", {}),
    ("jsd", {"beta": 0.2, "tail": "ignore"}),
    ("alm", {}),
    ("alm", {"temperature": 1.0}),
    ("p_kl", {}),
    ("p_kl", {"columns": 9, "temperature": 1.5}),
    ("p_kl", {"reverse": True}),
    ("uld", {}),
    ("uld", {"merge": "bayesian"}),
    ("uld", {"merge": "observed"}),
    ("gold", {}),
    ("gold", {"merge": "observed", "beta": 0.0, "matched_weight": 0.5}),
    ("h_kl", {}),
    ("h_kl", {"threshold": 0.3, "matched_weight": 0.9}),
]


def test_every_distance_is_here():
    assert {name for name, _ in CHOICES} == set(DISTANCES)
    assert all(set(options) <= set(DISTANCES[name].defaults) for name, options in CHOICES)


def vocabulary_of(name: str, seed: int, twice: bool = False):
    kind = DISTANCES[name].vocabulary
    if kind == "map":
        return mapping(seed, STUDENT, TEACHER, twice)
    return projection(seed, STUDENT, TEACHER) if kind == "projection" else None


def text_of(name: str, seed: int, top: int | None) -> Taught:
    return taught(seed, STUDENT, STUDENT if DISTANCES[name].vocabulary == "same" else TEACHER, top)


# ---------------------------------------------------------------------------------------------------------------------
# Second implementations: a group at a time, dense distributions, no logarithms of sums.


def same_rows(text: Taught):
    """For each group with both: its number, and the two distributions at its first tokens."""
    targets = text.targets
    for group, (mine, theirs) in enumerate(of_both(targets.groups, targets.student_groups, targets.teacher_groups)):
        if mine and theirs:
            yield group, text.teacher[theirs[0]].softmax(0), text.logits[mine[0]].softmax(0), mine, theirs


def events(p: Tensor, q: Tensor, kept: int, tail: str) -> tuple[Tensor, Tensor]:
    """The probabilities of the listed tokens, and of all others as one."""
    listed = p.topk(kept).indices
    p_listed, q_listed = p[listed], q[listed]
    if tail == "ignore":
        return p_listed / p_listed.sum(), q_listed / q_listed.sum()
    if kept == len(p):
        return p_listed, q_listed
    return torch.cat([p_listed, 1 - p_listed.sum()[None]]), torch.cat([q_listed, 1 - q_listed.sum()[None]])


def naive_divergence(text: Taught, beta: float, tail: str) -> Tensor:
    losses = torch.zeros(text.targets.groups, dtype=torch.float64)
    for group, p, q, *_ in same_rows(text):
        p, q = events(p, q, text.targets.top_ids.shape[1], tail)
        m = beta * p + (1 - beta) * q
        forward, backward = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
        mixed = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
        losses[group] = {0.0: forward, 1.0: backward}.get(beta, mixed)
    return losses


def naive_forward_kl(text, _, tail="bucket"):
    return naive_divergence(text, 0.0, tail)


def naive_reverse_kl(text, _, tail="bucket"):
    return naive_divergence(text, 1.0, tail)


def naive_jsd(text, _, beta=0.5, tail="bucket"):
    return naive_divergence(text, beta, tail)


def naive_cross_entropy(text, vocabulary: VocabularyMap, top=None, temperature=1.0, fallback="skip"):
    losses = torch.zeros(text.targets.groups, dtype=torch.float64)
    kept = min(top or TEACHER, text.targets.top_ids.shape[1])
    for group, p, q, mine, _ in same_rows(text):
        target = torch.zeros(STUDENT, dtype=torch.float64)
        for token in p.topk(kept).indices.tolist():
            if vocabulary.student_ids[token] >= 0:
                target[vocabulary.student_ids[token]] += p[token]
        target = target ** (1 / temperature)
        compared = target.sum() > 0
        costs = [-(target / target.sum() * q.log()).sum()] if compared else []
        if fallback == "one_hot":
            costs += [-text.logits[place].log_softmax(0)[text.tokens[place]] for place in mine[len(costs) :]]
        losses[group] = sum(costs) / max(len(costs), 1)
    if fallback == "one_hot":  # groups that the teacher lacks have tokens of the student all the same
        for group in range(text.targets.groups):
            mine = (text.targets.student_groups == group).nonzero()[:, 0]
            if not (text.targets.teacher_groups == group).any() and len(mine):
                own = text.logits[mine].log_softmax(1).gather(1, text.tokens[mine, None])
                losses[group] = -own.mean()
    return losses


def naive_alm(text, _, temperature=100.0):
    losses = torch.zeros(text.targets.groups, dtype=torch.float64)
    for group, _, _, mine, theirs in same_rows(text):
        p = text.targets.log_probs[theirs].sum().div(temperature).sub(1e-6).exp()
        own = text.logits[mine].log_softmax(1).gather(1, text.tokens[mine, None]).sum()
        q = own.div(temperature).sub(1e-6).exp()
        losses[group] = -(p * q.log() + (1 - p) * (1 - q).log())
    return losses


def chain(logits: Tensor, tokens: Tensor, places: list[int], merge: str) -> Tensor:
    rows = logits[places].softmax(1)
    own = rows.gather(1, tokens[places, None])[:, 0]
    return {"bayesian": rows[-1] * own[:-1].prod(), "observed": rows[0] * own[1:].prod(), "first": rows[0]}[merge]


def naive_uld(text, _, merge="first"):
    losses = torch.zeros(text.targets.groups, dtype=torch.float64)
    kept = text.targets.top_ids.shape[1]
    for group, _, _, mine, theirs in same_rows(text):
        p = chain(text.teacher, text.targets.tokens, theirs, merge).sort(descending=True).values
        q = chain(text.logits, text.tokens, mine, merge).sort(descending=True).values
        losses[group] = (p[:kept] - q[:kept]).abs().sum() + (p[kept:].sum() - q[kept:].sum()).abs()
    return losses


def naive_hybrid(text, own: Tensor, merge: str, beta: float | None, weight: float | None) -> Tensor:
    losses = torch.zeros(text.targets.groups, dtype=torch.float64)
    kept, size = text.targets.top_ids.shape[1], len(own)
    matched = own >= 0
    alone = torch.ones(STUDENT, dtype=torch.bool)
    alone[own[matched]] = False
    weight = matched.double().mean().item() if weight is None else weight
    for group, _, _, mine, theirs in same_rows(text):
        p, q = (
            chain(logits, tokens, places, merge)
            for logits, tokens, places in (
                (text.teacher, text.targets.tokens, theirs),
                (text.logits, text.tokens, mine),
            )
        )
        listed = torch.zeros(size, dtype=torch.bool)
        listed[p.topk(kept).indices] = True
        tail = p[~listed].sum()
        share = (matched & ~listed).sum() / max(1, size - kept)
        both = listed & matched
        p_events, q_events = p[both], q[own[both]]
        if share > 0:
            p_events = torch.cat([p_events, (tail * share)[None]])
            q_events = torch.cat([q_events, (q[~alone].sum() - q[own[both]].sum())[None]])
        m = (beta or 0) * p_events + (1 - (beta or 0)) * q_events
        divergence = (beta or 0) * (p_events * (p_events / m).log()).sum()
        divergence = divergence + (1 - (beta or 0)) * (q_events * (q_events / m).log()).sum()
        if not beta:
            divergence = (p_events * (p_events / q_events).log()).sum()
        if beta is None:
            divergence = divergence - p_events.sum() + q_events.sum()
        p_sorted = p[listed & ~matched].sort(descending=True).values
        q_sorted = q[alone].sort(descending=True).values
        p_sorted = torch.cat([p_sorted, p.new_zeros(STUDENT)])[: max(kept, 1)]
        q_sorted = torch.cat([q_sorted, q.new_zeros(STUDENT)])
        others = (tail * (1 - share) - q_sorted[kept:].sum()).abs()
        losses[group] = weight * divergence + (1 - weight) * ((p_sorted - q_sorted[:kept]).abs().sum() + others)
    return losses


def naive_gold(text, vocabulary, merge="bayesian", beta=0.5, matched_weight=None):
    return naive_hybrid(text, torch.from_numpy(vocabulary.student_ids).long(), merge, beta, matched_weight)


def naive_h_kl(text, vocabulary, threshold=0.6, matched_weight=None):
    best: dict[int, tuple[float, int]] = {}
    for row in range(STUDENT):
        place = int(vocabulary.weights[row].argmax())
        token, weight = int(vocabulary.teacher_ids[row, place]), float(vocabulary.weights[row, place])
        if weight >= threshold and weight > best.get(token, (0.0, 0))[0]:
            best[token] = weight, row
    own = torch.tensor([best.get(token, (0, -1))[1] for token in range(TEACHER)])
    return naive_hybrid(text, own, "bayesian", None, matched_weight)


def naive_p_kl(text, vocabulary, columns=8192, temperature=1.0, reverse=False):
    targets = text.targets
    losses = torch.zeros(targets.groups, dtype=torch.float64)
    w = torch.zeros(STUDENT, TEACHER, dtype=torch.float64)
    for row in range(STUDENT):
        for token, weight in zip(vocabulary.teacher_ids[row], vocabulary.weights[row], strict=True):
            if token >= 0:
                w[row, token] += float(weight)
    best: dict[int, float] = {}
    for place in (targets.teacher_groups >= 0).nonzero()[:, 0].tolist():
        for token, value in zip(targets.top_ids[place].tolist(), targets.top_log_probs[place].tolist(), strict=True):
            if w[:, token].sum() > 0:
                best[token] = max(best.get(token, -1e9), value)
    chosen = sorted(best, key=lambda token: -best[token])[:columns]

    def taught_row(place: int) -> Tensor:
        known = dict(zip(targets.top_ids[place].tolist(), targets.top_log_probs[place].exp().tolist(), strict=True))
        lacking = [token for token in chosen if token not in known]
        spread = min((1 - sum(known.values())) / max(len(lacking), 1), min(known.values()))
        row = torch.tensor([known.get(token, spread) for token in chosen], dtype=torch.float64)
        return (row.log() / temperature).log_softmax(0)

    for group, _, _, mine, theirs in same_rows(text):
        q = torch.stack([(text.logits[place] / temperature).softmax(0) @ w for place in mine]).mean(0)[chosen]
        q = q / q.sum()
        log_p = torch.stack([taught_row(place) for place in theirs]).mean(0)
        loss = (q * (q.log() - log_p)).sum() if reverse else (log_p.exp() * (log_p - q.log())).sum()
        losses[group] = temperature**2 * loss
    return losses


@pytest.mark.parametrize("top", [None, 6, 1])
@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_equal_to_the_formula(name, options, top):
    """Losses and gradients; without ``top`` the teacher's list is its whole vocabulary, and the formula is dense."""
    for seed in SEEDS:
        text, vocabulary = text_of(name, seed, top), vocabulary_of(name, seed, twice=name == "cross_entropy")
        logits = text.logits.clone().requires_grad_()
        found = DISTANCES[name](logits, text.tokens, text.targets, vocabulary, **options)
        weights = torch.rand(text.targets.groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
        again = text.logits.clone().requires_grad_()
        expected = globals()[f"naive_{name}"](replace(text, logits=again), vocabulary, **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, msg=lambda text, seed=seed: f"{seed}: {text}")
        (wanted,) = torch.autograd.grad((expected * weights).sum(), again)
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-5, atol=1e-7, msg=lambda text, seed=seed: f"{seed}: {text}"
        )


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_gradients_in_float64(name, options):
    size = 6 if DISTANCES[name].vocabulary == "same" else 5
    text = taught(5, 6, size, 3, shapes=((1, 1), (2, 1), (1, 2)))
    kind = {"map": mapping, "projection": projection}.get(DISTANCES[name].vocabulary, lambda *_: None)
    logits = text.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: DISTANCES[name](logits, text.tokens, text.targets, kind(5, 6, 5), **options), (logits,)
    )


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_what_is_in_no_group_counts_nothing(name, options):
    """Positions of group −1 have no gradient and may say anything; groups that one side lacks lose nothing."""
    text, vocabulary = text_of(name, 4, 6), vocabulary_of(name, 4)
    targets = text.targets
    logits = text.logits.clone().requires_grad_()
    found = DISTANCES[name](logits, text.tokens, targets, vocabulary, **options)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient[targets.student_groups < 0].abs().max() == 0 and gradient.isfinite().all()
    lacks = [
        group
        for group, sides in enumerate(of_both(targets.groups, targets.student_groups, targets.teacher_groups))
        if not all(sides)
    ]
    assert len(lacks) == 2
    if options.get("fallback") != "one_hot":
        assert found[lacks].tolist() == [0, 0]

    none, own = targets.teacher_groups < 0, targets.student_groups < 0
    changed = replace(
        targets,
        log_probs=targets.log_probs.masked_fill(none, -1.0),
        tokens=targets.tokens.masked_fill(none, 0),
        top_ids=targets.top_ids.masked_fill(none[:, None], 0),
        top_log_probs=targets.top_log_probs.masked_fill(none[:, None], -1.0),
    )
    others = text.logits.masked_fill(own[:, None], 0.5)
    again = DISTANCES[name](others, text.tokens.masked_fill(own, 1), changed, vocabulary, **options)
    torch.testing.assert_close(again, found.detach())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "uld"])
def test_a_shorter_list_is_a_lower_bound(name):
    dense = text_of(name, 6, None)
    losses = [DISTANCES[name](dense.logits, dense.tokens, text_of(name, 6, top).targets) for top in (1, 3, 9, 20, None)]
    for shorter, longer in pairwise(losses):
        assert (shorter <= longer + 1e-9).all()
    assert losses[0].sum() < losses[-1].sum()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "uld", "gold", "h_kl", "alm"])
def test_a_student_that_says_the_same(name):
    """Distances to oneself are 0, or where they are cross entropies at their least: without a gradient."""
    text = taught(7, STUDENT, STUDENT, 6, shapes=((1, 1), (2, 2), (1, 1), (1, 1), (3, 3), (1, 1)))
    log_probs = text.teacher.log_softmax(1).gather(1, text.tokens[:, None])[:, 0]
    same = replace(text.targets, tokens=text.tokens, log_probs=log_probs)
    identity = None
    if name == "h_kl":
        identity = projection(7, STUDENT, STUDENT)
        identity.teacher_ids[:, 0], identity.weights[:] = range(STUDENT), (1, 0, 0, 0)
    logits = text.teacher.clone().requires_grad_()
    losses = DISTANCES[name](logits, text.tokens, same, identity)
    if name != "alm":
        torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-9)
    if name not in ("uld", "gold"):  # the slope of an absolute value isn't 0 beside 0, where rounding puts it
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers


def alone(student: list[list[float]], labels: list[int], lists: list[tuple[list[float], list[int]]]):
    """Logits, tokens and targets whose groups are single tokens; the lists are a teacher's logits and ids."""
    width = max(len(ids) for _, ids in lists)
    log_probs = torch.full((len(lists), width), -torch.inf, dtype=torch.float64)
    ids = torch.zeros(len(lists), width, dtype=torch.int64)
    for row, (scores, tokens) in enumerate(lists):
        log_probs[row, : len(tokens)] = torch.tensor(scores, dtype=torch.float64).log_softmax(0)
        ids[row, : len(tokens)] = torch.tensor(tokens)
    groups, tokens = torch.arange(len(lists)), torch.tensor(labels)
    targets = Targets(groups, groups, tokens, log_probs[:, 0], ids, log_probs, len(lists))
    return torch.tensor(student, dtype=torch.float64), tokens, targets


# The valid positions of the two rows of the reference example.
LOGITS = [[1, 0, 0, 0], [0, 2, 0, 1], [0, 0, 3, 0]]
LABELS = [1, 3, 2]
PIVOT = [([2, 1], [1, 0]), ([3, 1], [3, 1]), ([2, 0], [2, 3])]
SOURCE = [([4, 0], [1, 2]), ([1], [3]), ([4, 1], [2, 0])]


@pytest.mark.parametrize(("lists", "loss"), [(PIVOT, 1.1153835), (SOURCE, 1.1729879)])
def test_fusellm_as_published(lists, loss):
    found = DISTANCES["cross_entropy"](*alone(LOGITS, LABELS, lists))
    assert found.mean().item() == pytest.approx(loss, abs=2e-7)


def test_min_ce_as_published():
    """Row 0 takes the source's whole distribution, row 1 the pivot's; with the likelihood at λ = .9."""
    losses = torch.stack([DISTANCES["cross_entropy"](*alone(LOGITS, LABELS, lists)) for lists in (PIVOT, SOURCE)], 1)
    weights = combined_weights(torch.tensor([[2.0, 1.5], [0.5, 0.9]]), "min_ce")
    assert weights.tolist() == [[0, 1], [1, 0]]
    fusion = (losses * weights[[0, 0, 1]]).sum(1).mean().item()
    likelihood = torch.nn.functional.cross_entropy(torch.tensor(LOGITS).double(), torch.tensor(LABELS)).item()
    assert fusion == pytest.approx(1.2447649, abs=2e-7) and likelihood == pytest.approx(1.1255621, abs=2e-7)
    assert 0.9 * likelihood + 0.1 * fusion == pytest.approx(1.1374824, abs=2e-7)


def test_weights_of_teachers():
    nan = float("nan")
    assert combined_weights(torch.tensor([[1.0, 1.0], [nan, 5.0], [5.0, nan], [nan, nan]]), "min_ce").tolist() == [
        [1, 0],
        [0, 1],
        [1, 0],
        [0, 0],
    ]
    average = combined_weights(torch.tensor([[2.0, 1.5, 3.0]], dtype=torch.float64), "avg_ce")
    assert average[0].tolist() == pytest.approx([0.33225098, 0.36273971, 0.30500934], abs=FLOAT32)
    assert combined_weights(torch.tensor([[nan, 1.0], [nan, nan]]), "avg_ce").tolist() == [[0, 1], [0, 0]]
    assert combined_weights(torch.tensor([[nan, 1.0, 2.0]]), "sum").tolist() == [[0, 1, 1]]
    assert combined_weights(torch.tensor([[float("inf")] * 2]), "min_ce").tolist() == [[1, 0]]
    # In bfloat16, as released, the two would be equal and the first would win.
    close = torch.tensor([[2.004, 2.0]])
    assert torch.exp(-close.bfloat16()).unique().numel() == 1
    assert combined_weights(close, "min_ce").tolist() == [[0, 1]]


@pytest.mark.parametrize(("temperature", "losses"), [(1, (0.7870053, 0.2377477)), (100, (0.0329485, 0.135325))])
def test_alm_as_published(temperature, losses):
    """Teacher ℓ −.5 and −3, student ℓ −1 and −2."""
    groups = torch.arange(2)
    taught_text = torch.tensor([-0.5, -3.0], dtype=torch.float64)
    empty = torch.zeros(2, 0)
    targets = Targets(groups, groups, groups, taught_text, empty.long(), empty, 2)
    own = torch.tensor([[-1.0, -2.0]], dtype=torch.float64).exp().T
    logits = torch.cat([own, 1 - own], 1).log()
    found = DISTANCES["alm"](logits, torch.zeros(2, dtype=torch.int64), targets, temperature=temperature)
    assert found.tolist() == pytest.approx(losses, abs=3e-6)


def test_uld_as_published():
    p, q = [0.5, 0.3, 0.1, 0.1], [[0.7, 0.2, 0.1]]
    logits, tokens, targets = alone(
        torch.tensor(q).log().tolist(), [0], [(torch.tensor(p).log().tolist(), [3, 1, 0, 2])]
    )
    assert DISTANCES["uld"](logits, tokens, targets).item() == pytest.approx(0.4)


def test_published_positions_are_compared():
    """▁I ▁gets ▁it and ĠI Ġget s Ġit: what follows ▁I is compared with what follows ĠI, what follows ▁gets with s."""
    own = VocabularyMap(torch.tensor([1, 4, 5, 3, 6, -1, -1], dtype=torch.int32).numpy())
    student, teacher = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 2, 3])
    lists = [([0.0], [0]), ([3.0, 1.0], [1, 5]), ([4.0, 2.0], [2, 3]), ([2.5, 0.5], [3, 4]), ([1.5, 1.0], [4, 6])]
    _, _, targets = alone([], [0] * 5, lists)
    targets = replace(targets, student_groups=student, teacher_groups=teacher, groups=4)
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_q = logits.log_softmax(1)
    found = DISTANCES["cross_entropy"](logits, torch.tensor([1, 2, 3, 0]), targets, own)
    share = torch.tensor([2.5, 0.5], dtype=torch.float64).softmax(0)
    assert found[1:].tolist() == pytest.approx(
        [-log_q[1, 4].item(), -(share @ log_q[2, [3, 6]]).item(), -log_q[3, 6].item()]
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_only_the_text_is_needed_by_alm():
    text = text_of("alm", 1, 6)
    nothing = replace(
        text.targets, top_ids=text.targets.top_ids[:, :0], top_log_probs=text.targets.top_log_probs[:, :0]
    )
    assert [name for name, each in DISTANCES.items() if not each.top] == ["alm"]
    with_lists = DISTANCES["alm"](text.logits, text.tokens, text.targets)
    torch.testing.assert_close(DISTANCES["alm"](text.logits, text.tokens, nothing), with_lists)
    with pytest.raises(ValueError, match="uld needs the teacher's likeliest tokens"):
        DISTANCES["uld"](text.logits, text.tokens, nothing)
    with pytest.raises(ValueError, match="p_kl needs a projection"):
        DISTANCES["p_kl"](text.logits, text.tokens, text.targets)
    with pytest.raises(ValueError, match="jsd needs a teacher with the student's own vocabulary"):
        DISTANCES["jsd"](text.logits, text.tokens, text.targets, mapping(1, STUDENT, TEACHER))


@pytest.mark.parametrize("name", ["cross_entropy", "gold", "h_kl", "p_kl"])
def test_tokens_beyond_the_teachers_tokenizer(name):
    """Heads may be wider than tokenizers: the student has none of those tokens."""
    text, vocabulary = text_of(name, 1, 6), vocabulary_of(name, 1)
    ids = text.targets.top_ids.clone()
    ids[:, 2] = TEACHER + 40
    found = DISTANCES[name](text.logits, text.tokens, replace(text.targets, top_ids=ids), vocabulary)
    assert found.isfinite().all() and found.sum() > 0


def test_options():
    problems: list[str] = []
    assert DISTANCES["jsd"].options({"beta": 0.25}, problems) == {"beta": 0.25, "tail": "bucket"} and not problems
    DISTANCES["jsd"].options({"beta": 2, "tial": "ignore"}, problems)
    DISTANCES["gold"].options({"merge": "first"}, problems)
    assert "option beta" in problems[0] and "less than or equal to 1" in problems[0]
    assert "no option 'tial'. Did you mean 'tail'?" in problems[1]
    assert "objective gold, option merge" in problems[2]
