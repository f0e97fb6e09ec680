"""Distances beside TRL's own code, where it is installed: ULD, GOLD, Jensen–Shannon divergences, lists with a tail.

TRL's batch is what its trainers make: logits over prompt and answer, row k of which predicts token k + 1, labels, and
the bytes that each token ends at.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mergekit_lite.distillation.alignment.vocabulary import VocabularyMap
from mergekit_lite.distillation.objectives.distances import DISTANCES
from tests.distill.teachers import Taught, taught

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its libraries'
STUDENT, TEACHER = 29, 23
SHAPES = ((1, 1), (2, 1), (1, 1), (1, 3), (1, 1), (3, 2), (1, 1), (2, 2))
EXACT = {"rtol": 1e-6, "atol": 1e-6}  # TRL keeps probabilities above 1e-8


def text(seed: int, **sizes) -> Taught:
    return taught(seed, **{"student": STUDENT, "teacher": TEACHER, "shapes": SHAPES, "spread": 1.0, **sizes})


def matches() -> VocabularyMap:
    """Tokens 0 to 16 are the same strings, in another order."""
    ids = torch.full((TEACHER,), -1, dtype=torch.int32)
    ids[:17] = torch.randperm(17, generator=torch.Generator().manual_seed(8)).int() + 5
    return VocabularyMap(ids.numpy())


def answer(
    logits: torch.Tensor, tokens: torch.Tensor, groups: torch.Tensor, odd: int = 0, early: bool = False
) -> tuple[torch.Tensor, ...]:
    """Logits, labels, ids and ends of one row of TRL's: a prompt of two tokens, and those of the groups.

    ``odd`` is 1 for one of two sides. With ``early`` each row of logits stands where the token is that it predicts.
    """
    kept = groups >= 0
    logits, tokens, groups = logits[kept], tokens[kept], groups[kept]
    ids = torch.cat([torch.zeros(2, dtype=torch.int64), tokens])
    labels = torch.cat([torch.full((2,), -100), tokens])
    last = torch.randn(1, logits.shape[1], dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.zeros(1, logits.shape[1], dtype=logits.dtype), logits, last])
    closes = groups != torch.cat([groups[1:], torch.tensor([-1])])
    inner = torch.arange(len(groups)) % 7 * 2 + odd + 1  # ends of no token of the other side
    ends = torch.where(closes, (groups + 1) * 100, groups * 100 + inner).tolist()
    ends = [(0, end) for end in ends]
    ends = torch.tensor([(0, 0)] * 2 + ends)
    return rows[None].roll(int(early), 1), labels[None], ids[None], ends[None]


def of_trl(
    given: Taught, merge: str, vocabulary: VocabularyMap | None = None, beta: float = 0.5, early: bool = False
) -> torch.Tensor:
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=True,
        uld_token_merge_strategy=merge,
        uld_use_hybrid_loss=vocabulary is not None,
        beta=beta,
    )

    def tokenizer(names):
        return SimpleNamespace(get_vocab=lambda: names)

    names = {f"student {token}": token for token in range(STUDENT)}, {}
    if vocabulary is not None:
        own = vocabulary.student_ids.tolist()
        names = names[0], {f"student {mine}" if mine >= 0 else f"teacher {at}": at for at, mine in enumerate(own)}
    loss = ULDLoss(config, *map(tokenizer, names), device=torch.device("cpu"))
    mine = answer(given.logits, given.tokens, given.targets.student_groups, 0, early)
    theirs = answer(given.teacher, given.targets.tokens, given.targets.teacher_groups, 1, early)
    pairs = [each for both in zip(mine, theirs, strict=True) for each in both]
    return loss(*pairs)


def test_the_groups_are_the_same():
    from trl.experimental.gold.gold_trainer import ULDLoss

    targets = text(1).targets
    sides = [
        (text(1).logits, text(1).tokens, targets.student_groups),
        (text(1).teacher, targets.tokens, targets.teacher_groups),
    ]
    ends = [answer(*each, odd)[3][0, 2:].tolist() for odd, each in enumerate(sides)]
    found = [[len(group) for group in side] for side in ULDLoss._align_by_byte_offsets(*ends)]
    assert [*zip(*found, strict=True)] == list(SHAPES)


@pytest.mark.parametrize("seed", [1, 2])
def test_uld(seed):
    given = text(seed)
    ours = DISTANCES["uld"](given.logits, given.tokens, given.targets, merge="bayesian").mean()
    torch.testing.assert_close(ours, of_trl(given, "bayesian"), **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_gold(beta):
    given, own = text(3), matches()
    ours = DISTANCES["gold"](given.logits, given.tokens, given.targets, own, beta=beta).mean()
    torch.testing.assert_close(ours, of_trl(given, "bayesian", own, beta), **EXACT)


def test_the_released_default_of_gold_is_off_by_one():
    """``observed`` looks a token's probability up in the row after it; one row earlier, it says what ours says."""
    given, own = text(4, spread=2.0), matches()
    ours = DISTANCES["gold"](given.logits, given.tokens, given.targets, own, merge="observed").mean()
    released = of_trl(given, "observed", own)
    assert (released - ours).abs() > 1e-3

    from trl.experimental.gold.gold_trainer import ULDLoss

    def merged(rows: torch.Tensor) -> torch.Tensor:
        strategy = SimpleNamespace(token_merge_strategy="observed")
        return ULDLoss._merge_probabilities_with_alignment_groups(strategy, rows.softmax(1), [[0, 1]], [5, 7])[0]

    # Two tokens, 5 and 7. rows[0] predicts 5, rows[1] 7, rows[2] what follows: the released slice begins at rows[1].
    rows = given.logits[:3]
    probs = rows.softmax(1)
    torch.testing.assert_close(merged(rows[1:]), probs[1] * probs[2, 7])
    torch.testing.assert_close(merged(rows[:2]), probs[0] * probs[1, 7])


def test_observed_from_the_right_rows():
    """TRL's loss with each row put where its slice looks for it."""
    given, own = text(5), matches()
    ours = DISTANCES["gold"](given.logits, given.tokens, given.targets, own, merge="observed").mean()
    torch.testing.assert_close(ours, of_trl(given, "observed", own, early=True), **EXACT)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0.3)])
def test_divergences(name, beta):
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.server_distillation import server_distillation_trainer as server

    shapes = ((1, 1),) * 9
    options = {"beta": beta} if name == "jsd" else {}
    dense = text(6, teacher=STUDENT, shapes=shapes)
    kept = dense.targets.student_groups >= 0
    ours = DISTANCES[name](dense.logits, dense.tokens, dense.targets, **options).mean()
    found = GKDTrainer.generalized_jsd_loss(dense.logits[kept], dense.teacher[kept], beta=beta)
    torch.testing.assert_close(ours, found, **EXACT)

    short = text(6, teacher=STUDENT, shapes=shapes, top=5)
    log_q = short.logits[kept].log_softmax(1).gather(1, short.targets.top_ids[kept])
    log_p = short.targets.top_log_probs[kept]
    valid = torch.ones_like(log_p, dtype=torch.bool)
    (theirs, mask), (own, _) = (server._add_tail_bucket(each, valid) for each in (log_p, log_q))
    bucket = server._jsd_divergence(own, theirs, beta, mask).sum(1)
    torch.testing.assert_close(DISTANCES[name](short.logits, short.tokens, short.targets, **options), bucket, **EXACT)
    theirs, own = (each - each.logsumexp(1, keepdim=True) for each in (log_p, log_q))
    ignore = server._jsd_divergence(own, theirs, beta, valid).sum(1)
    ours = DISTANCES[name](short.logits, short.tokens, short.targets, tail="ignore", **options)
    torch.testing.assert_close(ours, ignore, **EXACT)
