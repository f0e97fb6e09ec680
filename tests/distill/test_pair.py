"""The pair stage on files: what it writes, what it says is missing, and that nothing but its inputs matters."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.answers.rows import write_rows
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pair import pair
from mergekit_lite.distillation.recipe.schema import Recipe, Train
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import RunError, UsageError

SOURCES = ("gemma", "qwen")
SAMPLES = 3


class Heard(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.tables: list[list[Sequence[str]]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.tables.append([headings, *rows])


def recipe(folder: Path, **pairs: Any) -> Recipe:
    source = {"server": "http://localhost/v1", "model": "m", "samples": SAMPLES}
    return Recipe.model_validate(
        {
            "folder": folder,
            "seed": 5,
            "target": "target",
            "prompts": [{"path": "prompts.jsonl"}],
            "sources": [{"name": name, **source} for name in SOURCES],
            "target_source": {"name": "target", **source, "server": None},
            "scorers": [
                {"name": "reward", "kind": "reward", "model": "rm", "domains": ["instruction", "maths"]},
                {"name": "checked", "kind": "maths", "domains": ["maths"]},
            ],
            "pairs": {"rule": "fusechat3", "score": "reward", "sft_share": 0.4, **pairs},
            "train": {},
        }
    )


MATHS = {"maths": {"correct": "checked", "split": "availability"}}
WRPO = {"rule": "wrpo", "sft_share": 0.33333333}


def write_prompts(folder: Path, number: int, domains: Sequence[str] = ("instruction",)) -> list[str]:
    names = [f"p{index}" for index in range(number)]
    rows = [
        {
            "id": name,
            "messages": [{"role": "user", "content": f"Question {name}?"}],
            "domain": domains[index % len(domains)],
            "reference": None,
            "tests": [],
        }
        for index, name in enumerate(names)
    ]
    write_rows(Folder(folder).prompts, rows)
    return names


def write_source(folder: Path, source: str, prompts: Sequence[str], seed: int = 0) -> None:
    """Answers of one source, and their scores."""
    draw = random.Random(f"{source} {seed}")
    keys = [(prompt, index) for prompt in prompts for index in range(SAMPLES)]
    write_rows(
        Folder(folder).samples(source),
        [
            {
                "prompt": prompt,
                "source": source,
                "index": index,
                "text": f"{source} says {index} to {prompt}",
                "finish": "stop",
                "tokens": 5,
            }
            for prompt, index in keys
        ],
    )
    for scorer in ("reward", "checked"):
        values = [round(draw.random(), 3) if scorer == "reward" else float(draw.random() > 0.5) for _ in keys]
        rows = [
            {"prompt": prompt, "index": index, "score": value, "why": ""}
            for (prompt, index), value in zip(keys, values, strict=True)
        ]
        write_rows(Folder(folder).scores(scorer, source), rows)


def write_all(folder: Path, number: int = 20, domains: Sequence[str] = ("instruction", "maths")) -> list[str]:
    prompts = write_prompts(folder, number, domains)
    for source in SOURCES:
        write_source(folder, source, prompts)
    return prompts


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Folder(folder).pairs(name).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "pairs").iterdir())}


def test_a_stage_without_a_row_says_why(tmp_path: Path) -> None:
    """The table and the dropped prompts are written all the same."""
    write_all(tmp_path)
    heard = Heard()
    with pytest.raises(RunError) as caught:
        pair(recipe(tmp_path, domains={"maths": {"rule": "fusechat3"}}, gap=(2, 3)), heard)
    assert str(caught.value).splitlines() == [
        "None of 20 prompts became a row, so there is nothing to train on:",
        "  - prompts, preference: gap below 2: 20×",
    ]
    assert len(rows(tmp_path, "dropped")) == 20 and not rows(tmp_path, "preference")


def test_rows(tmp_path: Path) -> None:
    prompts = write_all(tmp_path)
    heard = Heard()
    table = pair(recipe(tmp_path, domains=MATHS), heard)
    sft, preference, dropped = (rows(tmp_path, name) for name in ("sft", "preference", "dropped"))
    assert sorted(row["prompt"] for row in [*sft, *preference, *dropped]) == sorted(prompts)
    assert not Folder(tmp_path).pairs("target").exists()
    for row in sft:
        assert row["response"] == f"{row['source']} says {row['index']} to {row['prompt']}"
        assert row["score"] == row["scores"]["reward"] and row["why"] and row["rule"] == "fusechat3"
        if row["domain"] == "maths":
            assert row["scores"]["checked"] == 1
    for row in preference:
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["source"] == rejected["source"] and chosen["role"] == "source"
        assert row["gap"] == pytest.approx(chosen["score"] - rejected["score"])
        assert chosen["text"] == f"{chosen['source']} says {chosen['index']} to {row['prompt']}"
        if row["domain"] == "maths":
            assert (chosen["scores"]["checked"], rejected["scores"]["checked"]) == (1, 0)
        else:
            assert row["gap"] > 0
    assert {len(sft), table.overall.sft, json.loads((tmp_path / "pairs/table.json").read_text())["all"]["sft"]} == {
        len(sft)
    }
    assert [row[0] for row in heard.tables[0]] == ["domain", "instruction", "maths", "all"]


def test_second_run_changes_no_byte(tmp_path: Path) -> None:
    write_all(tmp_path)
    pair(recipe(tmp_path, domains=MATHS), Reporter())
    first = contents(tmp_path)
    pair(recipe(tmp_path, domains=MATHS), Reporter())
    assert contents(tmp_path) == first


def test_order_of_files_doesn_t_matter(tmp_path: Path) -> None:
    for name in ("straight", "shuffled"):
        write_all(tmp_path / name)
    for file in [*(tmp_path / "shuffled").rglob("*.jsonl")]:
        lines = file.read_text().splitlines(keepends=True)
        random.Random(1).shuffle(lines)
        file.write_text("".join(lines))
    made = {}
    for name in ("straight", "shuffled"):
        pair(recipe(tmp_path / name, domains=MATHS), Reporter())
        made[name] = [sorted(rows(tmp_path / name, kind), key=str) for kind in ("sft", "preference", "dropped")]
    assert made["straight"] == made["shuffled"]


def test_wrpo_in_two_runs(tmp_path: Path) -> None:
    prompts = write_all(tmp_path, domains=("instruction",), number=12)
    wrpo = recipe(tmp_path, **WRPO)
    heard = Heard()
    table = pair(wrpo, heard)
    assert (table.overall.sft, table.overall.waiting, table.overall.preference) == (4, 8, 0)
    assert not Folder(tmp_path).pairs("preference").exists()
    assert "target" in heard.lines[0] and "samples" in heard.lines[0]
    asked = [row["prompt"] for row in rows(tmp_path, "target")]
    sft = rows(tmp_path, "sft")
    assert {*asked, *(row["prompt"] for row in sft)} == set(prompts) and len(asked) == 8
    write_source(tmp_path, "target", asked)
    table = pair(wrpo, Reporter())
    assert (table.overall.sft, table.overall.waiting, table.overall.preference) == (4, 0, 8)
    assert rows(tmp_path, "sft") == sft and [row["prompt"] for row in rows(tmp_path, "target")] == asked
    for row in rows(tmp_path, "preference"):
        assert [one["role"] for one in row["chosen"]] == ["source", "target"]
        assert [one["role"] for one in row["rejected"]] == ["target"]
        assert row["chosen"][1]["score"] > row["rejected"][0]["score"]


def test_the_targets_own_answer_where_the_objective_reads_it(tmp_path: Path) -> None:
    """The first one; a recipe with another objective has rows without it."""
    write_all(tmp_path, domains=("instruction",), number=12)
    pair(recipe(tmp_path, **WRPO), Reporter())
    write_source(tmp_path, "target", [row["prompt"] for row in rows(tmp_path, "target")])
    for objective, own in (("selm", True), ("dpo", False)):
        train = {"preference": {"objective": objective, "learning_rate": 1e-6}}
        pair(recipe(tmp_path, **WRPO).model_copy(update={"train": Train.model_validate(train)}), Reporter())
        found = rows(tmp_path, "preference")
        assert len(found) == 8 and all(("own" in row) == own for row in found)
        assert not own or all(row["own"] == {"text": f"target says 0 to {row['prompt']}", "index": 0} for row in found)


def test_target_that_answered_in_part_only(tmp_path: Path) -> None:
    write_all(tmp_path, domains=("instruction",), number=12)
    pair(recipe(tmp_path, **WRPO), Reporter())
    asked = [row["prompt"] for row in rows(tmp_path, "target")]
    write_source(tmp_path, "target", asked[1:])
    heard = Heard()
    assert pair(recipe(tmp_path, **WRPO), heard).overall.waiting == 8
    assert f"{SAMPLES} answers of target" in heard.lines[0]


def test_what_is_missing_is_told_at_once(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 4)
    write_source(tmp_path, "gemma", prompts)
    scored = Folder(tmp_path).scores("reward", "gemma")
    scored.write_text("".join(scored.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(UsageError) as caught:
        pair(recipe(tmp_path), Reporter())
    assert "no answers of qwen" in str(caught.value)
    assert "2 scores of gemma's answers by reward" in str(caught.value)
    assert not (tmp_path / "pairs").exists()


def test_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run the stage `sample` first"):
        pair(recipe(tmp_path), Reporter())


def test_losses_are_counted(tmp_path: Path) -> None:
    """Blank answers, answers without a verdict, malformed rows: named, and the others go on."""
    write_all(tmp_path, domains=("instruction",), number=6)
    samples = Folder(tmp_path).samples("gemma")
    written = [json.loads(line) for line in samples.read_text().splitlines()]
    written[0]["text"] = " \n"
    samples.write_text("".join(json.dumps(row) + "\n" for row in written) + "no row\n")
    scores = Folder(tmp_path).scores("reward", "qwen")
    verdicts = [json.loads(line) for line in scores.read_text().splitlines()]
    verdicts[4] |= {"score": None, "why": "too long"}
    write_rows(scores, verdicts)
    heard = Heard()
    table = pair(recipe(tmp_path), heard)
    counts = table.domains["instruction"].answers
    assert counts == {"answers": 36, "answers: blank": 1, "answers: no score by reward": 1}
    assert any(f"{samples}:19" in warning for warning in heard.warnings)


def test_wrong_recipes(tmp_path: Path) -> None:
    write_all(tmp_path, number=2)
    wrong = recipe(
        tmp_path,
        score="rewrad",
        gap=(0.2, 0.1),
        options={"sigma": 1},
        domains={"code": {"correct": "checked"}, "maths": {"rule": "wrpo", "split": "availability"}},
    )
    with pytest.raises(UsageError) as caught:
        pair(wrong, Reporter())
    told = str(caught.value)
    for part in (
        "Did you mean 'reward'?",
        "the least is 0.2",
        "no option 'sigma'",
        "doesn't judge the domain 'code'",
        "use share",
    ):
        assert part in told, told


def test_domains_that_no_scorer_judges(tmp_path: Path) -> None:
    write_all(tmp_path, number=4, domains=("instruction", "chinese"))
    with pytest.raises(UsageError, match="doesn't judge the domain 'chinese'"):
        pair(recipe(tmp_path), Reporter())
    pair(recipe(tmp_path, domains={"chinese": {"rule": "as_is"}}), Reporter())
    chinese = [row for row in rows(tmp_path, "sft") if row["domain"] == "chinese"]
    assert [(row["source"], row["index"]) for row in chinese] == [("gemma", 0)] * 2


@pytest.mark.parametrize("settings", [{"domains": MATHS}, WRPO], ids=["fusechat3", "wrpo"])
def test_killed_between_any_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Whatever it was stopped at, and whatever an older recipe left: the next run makes the same files."""
    prompts = write_all(tmp_path)
    write_source(tmp_path, "target", prompts)
    pair(recipe(tmp_path, **settings), Reporter())
    whole = contents(tmp_path)
    for stop in range(len(whole)):
        pair(recipe(tmp_path, **{**settings, "sft_share": 0.0}), Reporter())  # leaves other files
        replaced = 0

        def replace(self: Path, target: Path, *, after: int = stop, real: Any = Path.replace) -> Path:
            nonlocal replaced
            if replaced == after:
                raise KeyboardInterrupt
            replaced += 1
            moved: Path = real(self, target)
            return moved

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                pair(recipe(tmp_path, **settings), Reporter())
        pair(recipe(tmp_path, **settings), Reporter())
        assert {name: text for name, text in contents(tmp_path).items() if not name.endswith(".writing")} == whole


def write_answers(folder: Path, source: str, prompt: str, answers: Sequence[dict[str, Any]]) -> None:
    """Answers of one source to one prompt; the later, the better."""
    keys = [{"prompt": prompt, "index": index} for index in range(len(answers))]
    write_rows(
        Folder(folder).samples(source),
        [{**key, "source": source, "finish": "stop", **answer} for key, answer in zip(keys, answers, strict=True)],
    )
    scores = [{**key, "score": key["index"] / 10, "why": ""} for key in keys]
    write_rows(Folder(folder).scores("reward", source), scores)


CUT = {"finish": "length"}
NOT_CHOSEN = "answers: cut by the limit of tokens, so not chosen"
ENDS = [{"text": "no"}, {"text": "yes"}, {"text": "yes, of course that", **CUT}]


def test_answers_that_were_cut_are_not_chosen_and_counted(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 1)
    for source in SOURCES:
        write_answers(tmp_path, source, prompts[0], ENDS)
    heard = Heard()
    table = pair(recipe(tmp_path, rule="best_worst", sft_share=0), heard)
    (row,) = rows(tmp_path, "preference")
    assert (row["chosen"][0]["text"], row["rejected"][0]["text"]) == ("yes", "no")
    assert table.overall.answers == {"answers": 6, NOT_CHOSEN: 2}
    assert {source: each.cut for source, each in table.sources.items()} == dict.fromkeys(SOURCES, 1)
    assert [*heard.tables[-2][1]] == ["gemma", "3", "1", "0", "8"]  # characters: (2 + 3 + 19) / 3
    assert [[*line] for line in heard.tables[-1][1:]] == [
        ["chosen, source", "1", "0", "0", "3"],
        ["rejected, source", "1", "0", "0", "2"],
    ]
    written = json.loads((tmp_path / "pairs" / "table.json").read_text())
    assert written["sources"]["qwen"]["cut"] == 1
    assert written["roles"]["chosen, source"]["mean_length"] == 3


def test_answers_that_were_cut_are_kept_on_demand(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 2)
    for source in SOURCES:
        write_answers(tmp_path, source, prompts[0], [*ENDS[1:], {"text": "of", **CUT}][::-1])
    pair(recipe(tmp_path, rule="best_worst", sft_share=0, cut="keep"), Heard(), skip_missing=True)
    (row,) = rows(tmp_path, "preference")
    assert ("cut" in row["chosen"][0], row["rejected"][0]["cut"]) == (False, True)
    pair(recipe(tmp_path, rule="best_worst", sft_share=0), Heard(), skip_missing=True)
    assert rows(tmp_path, "preference") == [row]  # it may be rejected in any case
    table = pair(recipe(tmp_path, rule="as_is", cut="keep"), Heard(), skip_missing=True)
    (row,) = rows(tmp_path, "sft")
    assert (row["response"], row["cut"]) == ("of", True)
    assert table.roles["SFT"].cut == 1
    pair(recipe(tmp_path, rule="as_is"), Heard(), skip_missing=True)
    assert [row["response"] for row in rows(tmp_path, "sft")] == ["yes"]  # the first that is whole


WHOLE = "<think>\nwhy not\n</think>\n\nyes"


@pytest.mark.parametrize(
    ("thoughts", "chosen", "losses"),
    [
        ("keep", WHOLE, {NOT_CHOSEN: 2}),
        ("strip", "yes", {"answers: blank": 2}),
        ("only", WHOLE, {NOT_CHOSEN: 2, "answers: without thoughts": 2}),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_thoughts(tmp_path: Path, thoughts: str, chosen: str, losses: dict[str, int], apart: bool) -> None:
    prompts = write_prompts(tmp_path, 1)
    yes = {"text": "yes", "thoughts": "why not"} if apart else {"text": WHOLE}
    no = {"text": "no", "thoughts": "well"} if apart else {"text": "<think>well</think>no"}
    spent = {"text": "", "thoughts": "so m", **CUT} if apart else {"text": "<think>\nso m"}
    for source in SOURCES:
        write_answers(tmp_path, source, prompts[0], [{"text": "perhaps"}, no, yes, spent])
    made = recipe(tmp_path, rule="best_worst", sft_share=0)
    sources = tuple(source.model_copy(update={"thoughts": thoughts}) for source in made.sources)
    table = pair(made.model_copy(update={"sources": sources}), Heard())
    (row,) = rows(tmp_path, "preference")
    assert row["chosen"][0]["text"] == chosen
    assert table.overall.answers == {"answers": 8, **losses}
    assert table.sources["gemma"].thoughts == 3
    assert table.roles["chosen, source"].thoughts == (thoughts != "strip")
