"""Scores as the command line gives them, and files of pairs and texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_lite.boosting.measure.likelihood import read_pairs, read_texts
from mergekit_lite.boosting.measure.scores import parse
from mergekit_lite.errors import UsageError


def test_scores_are_read_with_their_settings() -> None:
    reward, judge, exact, function, task, nll = parse(
        [
            "reward:./rm,batch_size=4,max_length=512",
            "judge:gpt,server=http://localhost:1/v1,name=friend,lowest=0",
            r"exact,pattern=(\d+),?$",
            "function:module:name",
            "lm-eval:gsm8k,limit=50,metric=exact_match",
            "nll:a,b.txt",
        ]
    )
    assert reward.scorer is not None and judge.scorer is not None and exact.scorer is not None
    assert (reward.scorer.model, reward.scorer.batch_size, reward.scorer.options) == ("./rm", 4, {"max_length": 512})
    assert (judge.name, judge.scorer.server, judge.scorer.options) == ("friend", "http://localhost:1/v1", {"lowest": 0})
    assert exact.scorer.options == {"pattern": r"(\d+),?$"}
    assert function.scorer is not None and function.scorer.model == "module:name"
    assert (task.name, task.target, dict(task.settings)) == ("gsm8k", "gsm8k", {"limit": 50, "metric": "exact_match"})
    assert (nll.name, nll.target) == ("nll", "a,b.txt")


def test_a_hyphen_and_an_underscore_are_the_same_in_a_kind() -> None:
    assert [score.kind for score in parse(["log-ratio", "lm_eval:gsm8k"])] == ["log_ratio", "lm-eval"]


def test_wrong_scores_are_told_together() -> None:
    wrong = {
        "rewart:x": "Did you mean 'reward'?",
        "reward": "expected reward:…",
        "pairs:x": "pairs takes nothing after a colon",
        "reward:x,colour=red": "has no option 'colour'",
        "judge:x": "needs 'server'",
        "code": "needs 'allow_code'",
        "lm-eval:x,limit=many": "expected int",
        "lm-eval:x,shot=1": "has no setting 'shot'",
        "nll:x,a=1": "nll has no setting 'a'",
        "reward:x,batch_size=0": "batch_size: Input should be greater",
        "exact,pattern=(": "not a regular expression",
    }
    with pytest.raises(UsageError) as refused:
        parse([*wrong, "maths", "maths"])
    for said in [*wrong.values(), "two scores are called 'maths'"]:
        assert said in str(refused.value)


def test_pairs_are_read_in_the_ways_that_data_sets_have(tmp_path: Path) -> None:
    user, chosen = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}
    rejected = {"role": "assistant", "content": "bad"}
    rows = [
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "id": "first"},
        {"messages": [user], "chosen": "good!", "rejected": "bad"},
        {"chosen": [user, chosen], "rejected": [user, rejected]},
        {"prompt": [user], "chosen": [chosen], "rejected": [{**rejected, "content": "worse"}]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_pairs(path)
    assert next(iter(found)) == "pair:first" and len(found) == 4
    assert {(pair.messages[0]["content"], len(pair.messages)) for pair in found.values()} == {("Q", 1)}
    assert [(pair.chosen, pair.rejected) for pair in found.values()][2:] == [("good", "bad"), ("good", "worse")]
    assert len(read_pairs(path, 2)) == 2


def test_wrong_pairs_and_texts_are_told_with_their_places(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"chosen": "good", "rejected": "bad"},
        {"prompt": "Q", "chosen": 3, "rejected": "bad"},
        {"chosen": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "x"}],
         "rejected": [{"role": "user", "content": "B"}, {"role": "assistant", "content": "y"}]},
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError) as refused:
        read_pairs(path)
    said = (":1: 'chosen' and 'rejected' are the same", ":2: no 'prompt'", ":3: 'chosen' is '3'", ":4: 'chosen' and")
    assert all(each in str(refused.value) for each in said)
    path.write_text('{"text": ""}\n{"text": "a"}\nnonsense\n')
    with pytest.raises(UsageError) as refused:
        read_texts(path)
    assert ":1: no 'text'" in str(refused.value) and ":3: not JSON" in str(refused.value)
    with pytest.raises(UsageError, match="Can't read"):
        read_texts(tmp_path / "missing.txt")
