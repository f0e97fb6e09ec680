"""Settings to scorers: what is wrong is told by name, all at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.answers import scorers
from mergekit_lite.answers.scoring.registry import kind_of, open_scorer, wrong_settings
from mergekit_lite.answers.scoring.scorer import ScorerSettings, names
from mergekit_lite.boosting.measure.scores import forms, parse
from mergekit_lite.errors import UsageError
from tests.answers.scorers.asked import judged

DOCS = Path(__file__).parents[3] / "docs"
SOUND: dict[str, dict[str, Any]] = {
    "pair_rm": {"model": "pr"},
    "reward": {"model": "rm"},
    "maths": {},
    "code": {"allow_code": True},
    "judge": {"model": "m", "server": "http://127.0.0.1:9/v1"},
    "prompt_judge": {"model": "m", "server": "http://127.0.0.1:9/v1"},
    "pairwise": {"model": "m", "server": "http://127.0.0.1:9/v1"},
    "log_ratio": {"strong": "a", "weak": "b"},
    "exact": {},
    "function": {"model": "os.path:join"},
    "given": {},
}


def wrong(kind: str, **changes: Any) -> list[tuple[str, str]]:
    settings = ScorerSettings.model_validate({"name": "s", "kind": kind, **SOUND[kind], **changes})
    return [(".".join(at), text) for at, text in wrong_settings(settings)]


@pytest.mark.parametrize("kind", names())
def test_sound_settings(kind: str) -> None:
    assert wrong(kind) == []


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in names() for key in kind_of(kind).needs])
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


TOY = """
from mergekit_lite.answers.scoring.scorer import Positive, Score, Scorer, ScorerOptions, scorer

class Options(ScorerOptions):
    times: Positive = 1

@scorer("shouting", needs={"model": "WORD"})
class Shouting(Scorer):
    def __init__(self, settings, options: Options):
        self.name, self.word, self.times = settings.name, settings.model, options.times

    def score_one(self, judged):
        return Score(self.times * judged.answer.count(self.word.upper()))
"""


def test_a_file_in_the_package_is_a_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "shouting" not in names()
    (tmp_path / "shouting.py").write_text(TOY)
    monkeypatch.setattr(scorers, "__path__", [*scorers.__path__, str(tmp_path)])
    assert "shouting" in names() and forms()["shouting"] == "shouting:WORD"
    [spec] = parse(["shouting:help,times=2"])
    assert spec.scorer is not None
    with open_scorer(spec.scorer) as scorer:
        assert scorer.score([judged("HELP, HELP")])[0].value == 4
    with pytest.raises(UsageError, match=r"options.times: Input should be greater(.|\n)*has no option 'time'"):
        parse(["shouting:help,times=0,time=1"])


def test_kinds_are_listed_and_described_without_heavy_libraries() -> None:
    code = (
        "import sys; from mergekit_lite.boosting.measure.scores import forms; forms(); "
        "print([name for name in ('torch', 'transformers', 'httpx2', 'math_verify') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    below = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    rows = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert rows is not None
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[0].splitlines()[2:]]


def coded(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def test_the_table_of_docs_distill_has_every_scorer() -> None:
    rows = {
        coded(kind)[0]: (coded(needs), coded(options)) for kind, _, needs, options in table("distill.md", "Scorers")
    }
    assert rows == {
        name: (
            [key for key in kind_of(name).needs if key != "allow_code"],
            list(kind_of(name).options.model_fields),
        )
        for name in names()
    }


def test_the_table_of_docs_boost_has_every_score() -> None:
    written = [form for cell, *_ in table("boost.md", "Which score") for form in coded(cell)]
    assert sorted(written) == sorted(forms().values())
