"""The report: what it says is what the figures say, in Markdown, JSON, pictures, and a page in a real browser."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lite.answers.prompts import from_row
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands import main
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.table import PairingTable
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.report import report
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.reporting import curves
from mergekit_lite.distillation.reporting.findings import Findings
from mergekit_lite.distillation.score import digest_of
from mergekit_lite.errors import UsageError
from tests.answers.fake_server import Fake, fake_server
from tests.browser import Browser

PROMPTS = 40
HOSTILE = "</pre><script>document.title = 'taken'</script> $\\frac{1}{$ ```` | [x](http://example.invalid)"
MEANS = {"untrained": 0.10, "sft": 0.12, "preference": 0.16}  # of the scorer that improves


def recipe(folder: Path, **settings: Any) -> Recipe:
    source = {"model": "./source", "samples": 1}
    return Recipe.model_validate(
        {
            "folder": folder / "made",
            "target": "org/target",
            "prompts": [{"path": folder / "train.jsonl"}],
            "sources": [{"name": "gemma", **source}, {"name": "qwen", **source}],
            "scorers": [
                {"name": "armorm", "kind": "exact"},
                {"name": "flat", "kind": "exact"},
                {"name": "other", "kind": "exact", "domains": ["elsewhere"]},
            ],
            "pairs": {"rule": "wrpo", "score": "armorm"},
            "train": {"preference": {"objective": "wrpo", "learning_rate": 1e-6, "options": {"beta": 0.01}}},
            "report": {"prompts": [{"path": folder / "held-out.jsonl"}], "examples": PROMPTS},
            **settings,
        }
    )


def prompt_rows(what: str, number: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{what}{index}",
            "messages": [{"role": "user", "content": f"{what} question {index}? {HOSTILE if index == 3 else ''}"}],
            "domain": ("chat", "maths")[index % 2],
            "reference": "42" if index % 2 else None,
            "tests": [],
        }
        for index in range(number)
    ]


def trained_folder(folder: Path) -> None:
    """What the stages before leave: models that needn't be loaded, as their answers are there."""
    made = Folder(folder / "made")
    held_out = prompt_rows("held", PROMPTS)
    write_rows(folder / "held-out.jsonl", held_out)
    write_rows(folder / "train.jsonl", prompt_rows("train", 6))
    write_rows(made.prompts, prompt_rows("train", 6))
    draw = random.Random(1)
    for stage, steps in (("sft", 5), ("preference", 200)):
        made.trained(stage).mkdir(parents=True)
        (made.trained(stage) / "config.json").write_text("{}")
        write_rows(made.trained(stage) / "log.jsonl", (log_row(stage, step, draw) for step in range(1, steps + 1)))
    inner = Folder(made.report)
    hard = [draw.gauss(0, 0.05) for _ in held_out]
    for model in MEANS:
        answers = [
            {
                "prompt": row["id"],
                "source": model,
                "index": 0,
                "text": f"{model} says {HOSTILE}"
                if number == 3
                else f"{model} says {'word ' * (5 + 20 * (model == 'preference'))}",
                "finish": "length" if number == 0 else "stop",
                "tokens": 9,
            }
            for number, row in enumerate(held_out)
        ]
        write_rows(inner.samples(model), answers)
        for scorer in ("armorm", "flat"):
            mean = MEANS[model] if scorer == "armorm" else 0.5
            verdicts = [
                {
                    "prompt": row["id"],
                    "index": 0,
                    "score": mean + easy + draw.gauss(0, 0.005),
                    "why": "",
                    "judged": digest_of(from_row(row), answer["text"]),
                }
                for row, answer, easy in zip(held_out, answers, hard, strict=True)
            ]
            write_rows(inner.scores(scorer, model), verdicts)


def log_row(stage: str, step: int, draw: random.Random) -> dict[str, float]:
    row: dict[str, float] = {
        "step": step,
        "epoch": step / 200,
        "loss": 1 / step,
        "learning_rate": 1e-6,
        "grad_norm": 1.0,
    }
    if stage == "sft":
        return {**row, "length/response": 120}
    noise = draw.gauss(0, 0.01)
    rewards = {"source": 0.001 * step + noise, "target": 0.002 * step, "rejected": -0.003 * step}
    return {
        **row,
        **{f"rewards/{role}": value for role, value in rewards.items()},
        **{f"length/{role}": 100.0 + 10 * place for place, role in enumerate(rewards)},
        "accuracy": min(0.5 + step / 400, 1),
        "accuracy/source": 0.6,
        "accuracy/target": 0.7,
        "margin": 0.004 * step,
        "alpha": 0.1 * step / 200,
        "kl": 0.01 * step,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("distilled")
    trained_folder(place)
    return place


@pytest.fixture(scope="module")
def findings(folder: Path) -> Findings:
    return report(recipe(folder), Reporter())


def test_says_what_is_beyond_noise(findings: Findings) -> None:
    assert findings.comparison is not None
    found = {(one.metric, one.after, one.before): one for one in findings.comparison.differences}
    for after, before in (("preference", "untrained"), ("sft", "untrained"), ("preference", "sft")):
        improved, flat = found["armorm", after, before], found["flat", after, before]
        assert improved.beyond_noise and improved.interval.low < MEANS[after] - MEANS[before] < improved.interval.high
        assert not flat.beyond_noise
    assert "other" not in findings.comparison.scorers  # it judges no held-out domain
    said = " ".join(findings.conclusions)
    assert (
        "By armorm, the preference model is first: +0.0591 [+0.0571, +0.0611] against the target as it was (beyond"
        in said
    )
    assert "times the length" in said and "2.5 % of the SFT model" in said and "97.6 % of the rows" in said


def test_json(folder: Path, findings: Findings) -> None:
    written = json.loads((folder / "made/report/report.json").read_text())
    assert written["said"] == findings.conclusions
    assert written["held_out"]["models"]["sft"]["armorm"]["mean"] == pytest.approx(0.12, abs=0.03)
    assert set(written["held_out"]["domains"]) == {"chat", "maths"}
    assert written["training"]["preference"]["last"]["step"] == 200


def test_what_goes_with_a_higher_score(folder: Path, findings: Findings) -> None:
    """The preference model's answers are longer, and armorm scores all of them higher; flat prefers neither."""
    why = json.loads((folder / "made" / "report" / "report.json").read_text())["held_out"]["reasons"]
    assert why.keys() == {"armorm", "flat"} and why["armorm"]["prompts"] == PROMPTS
    assert why["armorm"]["win_rate"] == 1 and why["flat"]["win_rate"] < 0.8
    length = next(trait for trait in why["armorm"]["traits"] if trait["trait"].startswith("length"))
    assert length["after"] > length["before"] and length["part"] > 0
    page = (folder / "made" / "report" / "report.md").read_text()
    assert (
        "### What goes with a higher armorm of the preference model" in page and "| length, log of characters |" in page
    )


def test_second_run_changes_no_byte(folder: Path, findings: Findings) -> None:
    def contents() -> dict[str, bytes]:
        files = sorted(path for path in (folder / "made/report").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    first = contents()
    report(recipe(folder), Reporter())
    assert contents() == first


def test_markdown(folder: Path, findings: Findings) -> None:
    text = (folder / "made/report/report.md").read_text()
    for name in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        assert (folder / "made/report" / name).stat().st_size > 10_000
    fence = next(line for line in text.splitlines() if re.fullmatch("`{5}text", line))
    inside = text.split(fence)[1].split("`" * 5)[0]
    assert "````" in inside  # what a model wrote doesn't end its own block
    for lines in re.findall(r"(?:^\|.*\|$\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1


def test_examples_are_drawn_not_chosen(folder: Path, findings: Findings) -> None:
    assert findings.comparison is not None
    drawn = findings.comparison.examples(2, seed=0)
    assert len(drawn) == 2 and drawn == findings.comparison.examples(2, seed=0)
    assert {prompt.id for prompt in findings.comparison.examples(PROMPTS, seed=0)} == {
        f"held{i}" for i in range(PROMPTS)
    }


def test_pictures_show_what_the_log_has(findings: Findings) -> None:
    from matplotlib.figure import Figure

    assert [picture.name for picture in findings.pictures] == ["held-out.png", "sft.png", "preference.png"]
    for picture in findings.pictures:
        figure = Figure()
        picture.draw(figure)
        for axes in figure.axes:
            if axes.get_visible():
                assert axes.get_title() and axes.get_xlabel() and (axes.get_ylabel() or picture.name == "held-out.png")
    figure = Figure()
    findings.pictures[2].draw(figure)
    lines = {line.get_label() for line in figure.axes[0].get_lines()}
    assert {"source, chosen", "target, chosen", "rejected"} <= lines


def test_log_of_a_resumed_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "log.jsonl", [{"step": 1, "loss": 1}, {"step": 2, "loss": 9}, {"step": 2, "loss": 2}])
    assert [row["loss"] for row in curves.read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_parts_of_cut_are_drawn() -> None:
    """SFT with judgments logs two parts of its loss; without them there are no panels for them."""
    from matplotlib.figure import Figure

    plain = {"loss": 2.0, "length/response": 3}
    for more in ({}, {"clm": 1.0, "unlikelihood": 3.0, "criticised": 0.5}):
        picture = curves.training("round-1-sft", [{"step": step, **plain, **more} for step in (1, 2)])
        assert picture is not None
        picture.draw(figure := Figure())
        titles = [axes.get_title() for axes in figure.axes]
        assert sum("CUT" in title for title in titles) == (3 if more else 0), titles


def test_what_was_held_out_of_a_training_is_shown(tmp_path: Path) -> None:
    """Figures of one step in two rows are one point; the panel has both curves; the page says what was chosen."""
    from matplotlib.figure import Figure

    trained_folder(tmp_path)
    made = Folder(tmp_path / "made").trained("sft")
    with (made / "log.jsonl").open("a") as log:
        for step in (0, 3, 5):
            log.write(json.dumps({"step": step, "time": "2026-01-01T00:00:00Z", "eval_loss": 4.0 - step}) + "\n")
    chosen = {"step": 3, "by": "eval_loss", "checkpoints": {"3": 1.0, "5": 1.25}}
    (made / "training.json").write_text(json.dumps({"settings": {}, "published": chosen}))
    rows = curves.read_log(made / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[3].keys() > {"loss", "eval_loss"} and "time" not in rows[3]
    assert curves.ends(rows)["eval_loss"] == (4.0, -1.0)
    assert curves.ends(rows)["loss"] == (rows[1]["loss"], rows[5]["loss"])
    findings = report(recipe(tmp_path, report={}), Reporter())
    told = "step 3 has the least held-out loss (1; step 5: 1.25)"
    assert findings.choices == {"sft": told} and told in (tmp_path / "made/report/report.md").read_text()
    figure = Figure()
    findings.pictures[0].draw(figure)
    lines = {line.get_label(): line.get_xdata() for line in figure.axes[0].get_lines()}
    assert list(lines["held out"]) == [0, 3, 5] and list(lines["training"]) == [1, 2, 3, 4, 5]


def test_held_out_prompts_of_the_training_data_are_refused(tmp_path: Path) -> None:
    trained_folder(tmp_path)
    rows = prompt_rows("held", 4)
    rows[2]["messages"][0]["content"] = " TRAIN   question 2?"
    write_rows(tmp_path / "held-out.jsonl", rows)
    with pytest.raises(UsageError, match="1 held-out prompt of 4") as caught:
        report(recipe(tmp_path), Reporter())
    assert "held2 is train2" in str(caught.value)


def test_a_model_that_was_trained_anew_answers_anew(tmp_path: Path) -> None:
    trained_folder(tmp_path)
    report(recipe(tmp_path), Reporter())
    inner = Folder(tmp_path / "made/report")
    log = Folder(tmp_path / "made").trained("sft") / "log.jsonl"
    log.write_text(log.read_text().replace("120", "121"))
    with pytest.raises(Exception):  # noqa: B017  the sft model here is no model: that it is asked is what matters
        report(recipe(tmp_path), Reporter())
    assert not inner.samples("sft").exists() and not inner.scores("flat", "sft").exists()
    assert inner.samples("preference").exists()


def test_what_is_given_has_no_part_in_the_report(tmp_path: Path) -> None:
    """Rows that are given and a scorer of given scores: the models are asked and judged all the same."""
    trained_folder(tmp_path)
    scorers = [{"name": "armorm", "kind": "exact"}, {"name": "gpt4", "kind": "given"}]
    rows = {"preference": [{"path": tmp_path / "rows.jsonl"}]}
    PairingTable({}).write(tmp_path / "made" / "pairs" / "table.json")
    findings = report(recipe(tmp_path, scorers=scorers, rows=rows), Reporter())
    assert findings.comparison is not None
    assert findings.comparison.scorers == ["armorm"] and len(findings.comparison.answers) == len(MEANS)


@pytest.mark.parametrize("asks", [True, False])
def test_without_training(tmp_path: Path, asks: bool) -> None:
    """With held-out prompts or without them nothing is written."""
    write_rows(tmp_path / "held-out.jsonl", prompt_rows("held", 4))
    write_rows(Folder(tmp_path / "made").prompts, prompt_rows("train", 4))
    with pytest.raises(UsageError, match="no trained model"):
        report(recipe(tmp_path, **({} if asks else {"report": {}})), Reporter())
    assert not Folder(tmp_path / "made").report.exists()


def wordy(text: str, seed: int) -> str:
    """A judge of pairs that likes words."""
    first, second = (text.split(f"<answer_{place}>\n")[1].split(f"\n</answer_{place}>")[0] for place in "ab")
    counts = first.count("word"), second.count("word")
    return f"Better: {'tie' if counts[0] == counts[1] else 'A' if counts[0] > counts[1] else 'B'}"


def test_models_are_judged_in_pairs(tmp_path: Path) -> None:
    """``distill report`` with a served judge: against the references, and the models among each other, both orders."""
    trained_folder(tmp_path)
    with fake_server(Fake(say=wordy)) as judge:
        pairwise = {"kind": "pairwise", "model": "m", "server": judge.url}
        data = {
            "folder": "made",
            "target": "org/target",
            "prompts": [{"path": "train.jsonl"}],
            "sources": [{"name": "gemma", "model": "org/gemma"}],
            "scorers": [
                {"name": "flat", "kind": "exact"},
                {"name": "wins", **pairwise},
                {"name": "duels", **pairwise, "options": {"against": "rivals"}},
            ],
            "pairs": {"rule": "best_worst", "score": "flat"},
            "train": {"preference": {"objective": "dpo", "learning_rate": 1e-6}, "sft": {"learning_rate": 1e-6}},
            "report": {"prompts": [{"path": "held-out.jsonl"}], "scores": ["wins", "duels"]},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
        ran = CliRunner().invoke(main, ["distill", "report", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
        assert ran.exit_code == 0, ran.stderr
        asked = len(judge.bodies)
        again = CliRunner().invoke(main, ["distill", "report", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
        assert again.exit_code == 0 and len(judge.bodies) == asked, "nothing is asked twice"
    # 39 prompts to which one model says more, one on which all say the same number of words; half have a reference.
    found = json.loads((tmp_path / "made/report/report.json").read_text())["held_out"]["models"]
    assert {name: model["wins"]["prompts"] for name, model in found.items()} == dict.fromkeys(MEANS, 20)
    assert {name: model["wins"]["mean"] for name, model in found.items()} == dict.fromkeys(MEANS, (19 + 0.5) / 20)
    means = {name: model["duels"]["mean"] for name, model in found.items()}
    less, more = (39 * 0.25 + 0.5) / 40, (39 + 0.5) / 40
    assert means == pytest.approx({"untrained": less, "sft": less, "preference": more})
    assert asked == 3 * 20 * 2 + 3 * 40 * 4
    told = (tmp_path / "made/report/report.md").read_text()
    assert "By duels, the preference model is first" in told and "By wins," in told


def test_without_held_out_prompts(tmp_path: Path) -> None:
    trained_folder(tmp_path)
    findings = report(recipe(tmp_path, report={}), Reporter())
    assert findings.comparison is None and "no held-out prompts" in findings.conclusions[0]
    assert (tmp_path / "made/report/report.html").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.mark.parametrize("width, dark", [(1100, False), (390, True)], ids=["wide", "narrow-dark"])
def test_page(browser: Browser, folder: Path, findings: Findings, width: int, dark: bool) -> None:
    browser.events.clear()
    browser.open(folder / "made/report/report.html", width=width, dark=dark)
    assert browser.run("document.title") == "What org/target learnt from 2 sources"
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)
    assert browser.run("document.querySelectorAll('figure svg').length") == 3
    assert browser.run("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert browser.run("document.querySelectorAll('pre').length") >= 8
