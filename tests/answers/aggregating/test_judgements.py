"""Judgements are read where they are, and never guessed."""

from __future__ import annotations

import random

import pytest

from mergekit_lite.answers.aggregating.judgements import critiques_in, ranking_in, verdict_in


@pytest.mark.parametrize(
    ("said", "places"),
    [
        ("Ranking: [2] > [1] > [3]", [1, 0, 2]),
        ("**Ranking:** [3]>[2]>[1]\n", [2, 1, 0]),
        ("I think.\n\nRanking: 3 > 1 > 2.", [2, 0, 1]),
        ("The format is Ranking: [1] > [2] > [3]. So\nRanking: [3] > [1] > [2]", [2, 0, 1]),
        ("Ranking: [3] > [1]", [2, 0]),  # the two that are kept
        ("Ranking: [3] > [1] > [2] = [4]", [2, 0]),  # who comes behind them isn't said, and isn't asked
        ("Ranking: [3] > [1] = [2]", None),
        ("Ranking: [1] = [2] > [3]", None),
        ("Ranking: [3] >= [1] > [2]", None),
        ("Ranking: 3 > 12 = 1", None),
        ("Ranking: [3]", None),
        ("Ranking: [3] > [3] > [1]", None),
        ("Ranking: [4] > [1] > [2]", None),
        ("Ranking: [0] > [1] > [2]", None),
        ("[2] > [1] > [3]", None),
        ("The second one is best.", None),
        ("", None),
    ],
)
def test_rankings(said: str, places: list[int] | None) -> None:
    assert ranking_in(said, drafts=3, least=2) == places


@pytest.mark.parametrize(
    ("said", "best"),
    [
        ("Ranking: [2]", 1),
        ("They differ.\n**Ranking:** **2**.\n", 1),
        ("Ranking:\n[2]\n[1]\n[3]", 1),
        ("Ranking: [2] > [1] as said", 1),
        ("Ranking:\n1. [2]\n2. [1]\n3. [3]", None),  # the first number is no draft's
        ("Ranking: [2], [1]", None),
        ("Ranking 3 responses is hard.", None),
        ("Here is my ranking. 3 is the longest", None),
        ("ranking 3", None),
    ],
)
def test_the_one_that_is_kept(said: str, best: int | None) -> None:
    assert (ranking_in(said, drafts=3, least=1) or [None])[0] == best


def test_any_ranking_is_read_back() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    for _ in range(50):
        number = drawn.randrange(2, 15)
        order = drawn.sample(range(number), number)
        assert ranking_in(f"Ranking: {' > '.join(f'[{place + 1}]' for place in order)}", number, number) == order


@pytest.mark.parametrize(
    ("said", "critiques"),
    [
        ("[1]\nGood.\n[2]\nBad.\nVery.", ["Good.", "Bad.\nVery."]),
        (
            "**[1]**\n\nStrengths:\n- short\n\n### [2]\nWeaknesses:\n- long",
            ["Strengths:\n- short", "Weaknesses:\n- long"],
        ),
        ("[1] Better than\n[1] would be.\n[2] Like [1].", ["Better than\n[1] would be.", "Like [1]."]),
        ("[1]\nWorse than\n[2] would be.\n[2]\nGood.", ["Worse than\n[2] would be.", "Good."]),
        ("[1]\nIt says:\n[2]\nPerfect.\n[2]\nBad.", None),  # which of the two begins a critique?
        ("[1]\nGood.\n[2]\nBad.\n[3]\nThere is no third.", None),
        ("[1]\nGood.", None),
        ("[2]\nBad.\n[1]\nGood.", None),
        ("[1]\n\n[2]\nBad.", None),
        ("[1]\nGood.\n[2]\n", None),
        ("Both are good.", None),
    ],
)
def test_critiques(said: str, critiques: list[str] | None) -> None:
    assert critiques_in(said, 2) == critiques


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("Verdict: correct", True),
        ("It is wrong.\n**Verdict: Incorrect**", False),
        ("First I thought Verdict: correct.\nVerdict: incorrect", False),
        ("It is correct.", None),
        ("Verdict: not correct", None),
        ("Verdict: correct/incorrect", None),
        ("Verdict: correct or incorrect?", None),
        ("one line that is either\nVerdict: correct\nor\nVerdict: incorrect", None),  # the form, repeated
        ("either\nVerdict: correct\nor\nVerdict: incorrect\nSo:\nVerdict: correct", True),
        ("Verdict: correctable", None),
        ("## Verdict\n\nCorrect.", True),
        ("I come to my verdict. Correct steps alone are not enough.", None),
        ("", None),
    ],
)
def test_verdicts(said: str, right: bool | None) -> None:
    assert verdict_in(said) is right
