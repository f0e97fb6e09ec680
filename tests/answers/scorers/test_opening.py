"""Settings to scorers: what is wrong is told by name, all at once."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_lite.answers.scorers.registry import KINDS, open_scorer, wrong_settings
from mergekit_lite.answers.scorers.settings import ScorerSettings
from mergekit_lite.errors import UsageError
from tests.answers.scorers.asked import judged

SOUND: dict[str, dict[str, Any]] = {
    "reward": {"model": "rm"},
    "maths": {},
    "code": {"allow_code": True},
    "judge": {"model": "m", "server": "http://127.0.0.1:9/v1"},
    "log_ratio": {"strong": "a", "weak": "b"},
    "exact": {},
    "function": {"model": "os.path:join"},
}


def wrong(kind: str, **changes: Any) -> list[tuple[str, str]]:
    settings = ScorerSettings.model_validate({"name": "s", "kind": kind, **SOUND[kind], **changes})
    return [(".".join(at), text) for at, text in wrong_settings(settings)]


@pytest.mark.parametrize("kind", KINDS)
def test_sound_settings(kind: str) -> None:
    assert wrong(kind) == []


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, parts in KINDS.items() for key in parts.needs])
def test_what_is_needed(kind: str, key: str) -> None:
    [(at, text)] = wrong(kind, **{key: False if key == "allow_code" else None})
    assert at == "" and f"needs {key!r}" in text


@pytest.mark.parametrize(
    ("kind", "changes", "at", "text"),
    [
        ("exact", {"model": "m"}, "model", "'model' has no effect on a scorer of the kind 'exact'"),
        ("maths", {"batch_size": 3}, "batch_size", "no effect"),
        ("reward", {"server": "http://x"}, "server", "no effect"),
        ("reward", {"options": {"max_lenght": 3}}, "options.max_lenght", "Did you mean 'max_length'?"),
        ("reward", {"options": {"dtype": "float8"}}, "options.dtype", "'float32', 'bfloat16' or 'float16'"),
        ("exact", {"options": {"pattern": "("}}, "options.pattern", "not a regular expression"),
        ("function", {"options": {"x": 1}}, "options.x", "has no option 'x': it has none"),
        ("function", {"model": "join"}, "model", "'join': a function is given as module:function"),
        ("code", {"allow_code": False}, "", "say `allow_code: true`"),
        ("code", {"options": {"seconds": 0}}, "options.seconds", "greater than or equal to 1"),
    ],
)
def test_what_is_wrong(kind: str, changes: dict[str, Any], at: str, text: str) -> None:
    [found] = wrong(kind, **changes)
    assert found[0] == at and text in found[1]


def test_all_problems_are_told_together() -> None:
    settings = ScorerSettings(name="rm", kind="reward", server="x", options={"a": 1, "max_length": -1})
    with pytest.raises(UsageError) as told, open_scorer(settings):
        pass
    for part in ("'rm'", "needs 'model'", "server:", "options.a:", "options.max_length:"):
        assert part in str(told.value)


def test_scorers_bear_their_name() -> None:
    for kind in ("maths", "exact", "function", "judge"):
        with open_scorer(ScorerSettings.model_validate({"name": f"my-{kind}", "kind": kind, **SOUND[kind]})) as scorer:
            assert scorer.name == f"my-{kind}"
    with open_scorer(ScorerSettings(name="exact", kind="exact")) as scorer:
        assert scorer.score([judged("4", reference="4")])[0].value == 1
