"""Whole boosts on tiny models: what is measured, kept, chosen and written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from mergekit_lite import extrapolate, merge
from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.boosting.boosting import search_and_write
from mergekit_lite.boosting.evaluators import evaluator_of
from mergekit_lite.boosting.measure.answering import Answering
from mergekit_lite.boosting.request import Request, prepare
from mergekit_lite.commands import main
from mergekit_lite.errors import UsageError
from tests.boost.end_to_end import write_models, write_pairs, write_prompts
from tests.models import tree_bytes
from tests.tokenizers import tokenizer

SPACES = "function:tests.boost.end_to_end:spaces"
SHORT = Sampling(temperature=1.0, top_p=1.0, max_tokens=6)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    write_prompts(root)
    write_pairs(root)
    (root / "texts.txt").write_text("It is one.\n\nIt is two, user.\n\n\n\nWhat is one?\n")
    return root


def request_of(models: Path, output: Path, *scores: str, **options: Any) -> Request:
    usual = {"sft": str(models / "sft"), "aligned": str(models / "dpo"), "sampling": SHORT, "limits": ("growth=none",)}
    return Request(output=output, scores=scores, **{**usual, **options})


def command(*arguments: object) -> Result:
    """The command, in this process and folder."""
    return CliRunner().invoke(main, ["boost", *map(str, arguments)])


def rows_of(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By candidate and item."""
    files = (folder / "candidates").glob("*.jsonl")
    read = {file.name.split(".jsonl")[0].removesuffix(".partial"): file.read_text().splitlines() for file in files}
    return {name: {row["item"]: row for row in map(json.loads, lines)} for name, lines in read.items()}


def test_the_chosen_model_is_the_one_that_extrapolate_makes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    synced: list[Path] = []
    monkeypatch.setattr("mergekit_lite.output.workspace.sync_tree", synced.append)
    out = tmp_path / "out"
    arguments = ["--score", "pairs", "--search", "grid", "--grid", "8,16", "-o", out, "--json", "--sync"]
    said = command("sft", "dpo", "--pairs", "pairs.jsonl", *arguments)
    assert said.exit_code == 0, said.stderr
    told = json.loads(said.stdout)
    assert told["chosen"] and told["output"] == str(out)
    assert len(synced) == 1
    made = tree_bytes(out)
    extrapolate("sft", "dpo", out, told["chosen"]["alpha"], force=True)
    assert made == tree_bytes(out)


def test_a_score_of_which_lower_is_better_is_minimised_and_told_so(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have the other sign; what is shown has its own, and a gain is a decrease."""
    monkeypatch.chdir(models)
    told: dict[bool, Any] = {}
    for minimise in (False, True):
        score = f"{SPACES}{',minimise=true' * minimise}"
        arguments = ["--score", score, "--search", "grid", "--grid", "25", "--max-tokens", "6", "--limits"]
        arguments += ["growth=none", "--held-out", "0", "--all-items", "-o", tmp_path / str(minimise), "--json"]
        said = command("sft", "dpo", "--prompts", "prompts.jsonl", *arguments)
        assert said.exit_code == 0, said.stderr
        told[minimise] = json.loads(said.stdout)
    [up], [down] = (told[minimise]["candidates"] for minimise in (False, True))
    assert up["score"] == pytest.approx(down["score"]) and up["score"]["mean"] > 0
    assert up["gain"]["mean"] == pytest.approx(-down["gain"]["mean"]) and up["gain"]["mean"]
    assert told[True]["directions"] == {"function": "lower is better"}
    assert any("Lower function is better" in said for said in told[True]["verdict"])
    assert "function: lower is better" in (tmp_path / "True.boost" / "report.html").read_text()
    rows = rows_of(tmp_path / "True.boost")["alpha=25"]
    assert min(row["values"]["function"] for row in rows.values()) < 0


def test_where_nothing_helps_there_is_no_model_and_no_error(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    said = command(
        "sft", "dpo", "--score", "nll:texts.txt", "--search", "grid", "--grid", "25,30", "-o", tmp_path / "out"
    )
    assert said.exit_code == 0, said.stderr
    assert "No candidate helps" in said.stdout
    assert not (tmp_path / "out").exists()


def test_a_second_boost_measures_nothing_and_makes_nothing(models: Path, tmp_path: Path) -> None:
    request = request_of(models, tmp_path / "out", "pairs", pairs=models / "pairs.jsonl", start=16.0, final_step=16.0)
    first = search_and_write(prepare(request))
    assert first.finished is not None
    kept = [*(tmp_path / "out").iterdir(), *(tmp_path / "out.boost" / "candidates").iterdir()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    second = search_and_write(prepare(request))
    assert second.result.chosen == first.result.chosen
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_recipe_is_tuned_and_merged(models: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "models": [{"model": str(models / "dpo"), "parameters": {"weight": 1.0}}],
        "base_model": str(models / "sft"),
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    request = request_of(
        models, tmp_path / "out", "pairs", pairs=models / "pairs.jsonl", sft=None, aligned=None,
        recipe=tmp_path / "recipe.yml", tune=("models.0.parameters.weight=1:33",), search="grid",
        grid={"models.0.parameters.weight": (17.0, 33.0)},
    )  # fmt: skip
    boosted = search_and_write(prepare(request))
    assert boosted.result.baseline.params == {"models.0.parameters.weight": 1.0}
    assert boosted.finished is not None
    made = tree_bytes(tmp_path / "out")
    merge(tmp_path / "out.boost" / "recipe.yml", tmp_path / "out", force=True)
    assert made == tree_bytes(tmp_path / "out")


def test_several_numbers_by_optuna(models: Path, tmp_path: Path) -> None:
    request = request_of(models, tmp_path / "out", "nll", tune=("alpha=0:1", "alpha[filter=mlp]=0:1"), trials=3)
    request = replace(request, scores=(f"nll:{models / 'texts.txt'}",))
    prepared = prepare(request)
    assert prepared.search == "tpe"
    boosted = search_and_write(prepared)
    assert len(boosted.result.points) == 3
    assert (tmp_path / "out.boost" / "study.db").exists()


def test_likelihoods_are_those_of_the_models(models: Path, tmp_path: Path) -> None:
    """log_prob, aligned_log_prob and the log-ratio of answers against models that transformers loads by itself."""
    request = request_of(
        models, tmp_path / "out", "log_ratio", prompts=(models / "prompts.jsonl",), limit=5, batch_size=2
    )
    extrapolate(models / "sft", models / "dpo", tmp_path / "written", 2.0)
    with evaluator_of(prepare(request)) as evaluator:
        rows = list(evaluator.measure({"alpha": 2.0}, evaluator.items, frozenset(evaluator.items)))
        assert evaluator.facts({"alpha": 2.0})["effective"] == pytest.approx(2.0, abs=1e-4)
    assert sorted(row["item"] for row in rows) == [f"q{i}" for i in range(5)]
    for row in rows:
        asked = Prompt(row["item"], ({"role": "user", "content": f"What is {row['item'][1:]}?"},))
        own, aligned, sft = (
            _log_prob(folder, asked, row["text"], row["finish"])
            for folder in (tmp_path / "written", models / "dpo", models / "sft")
        )
        assert row["log_prob"] == pytest.approx(own, rel=1e-4)
        assert row["aligned_log_prob"] == pytest.approx(aligned, rel=1e-4)
        assert row["values"]["log_ratio"] == pytest.approx(aligned - sft, abs=1e-3)


def test_pairs_and_texts_are_measured_as_the_written_model_would_be(models: Path, tmp_path: Path) -> None:
    scores = ("pairs", f"nll:{models / 'texts.txt'}")
    request = request_of(models, tmp_path / "out", *scores, pairs=models / "pairs.jsonl", limit=3)
    extrapolate(models / "sft", models / "dpo", tmp_path / "written", 16.0)
    with evaluator_of(prepare(request)) as evaluator:
        rows = {
            row["item"]: row for row in evaluator.measure({"alpha": 16.0}, evaluator.items, frozenset(evaluator.items))
        }
    assert len(rows) == 6
    pairs = [row["values"] for item, row in rows.items() if item.startswith("pair:")]
    for number, values in enumerate(pairs):
        asked = Prompt("", ({"role": "user", "content": f"What is {number}?"},))
        chosen, rejected = (
            _log_prob(tmp_path / "written", asked, text, "stop") / _length(asked, text)
            for text in (f"It is {number}.", "no no two")
        )
        assert values["pairs.margin"] == pytest.approx(chosen - rejected, abs=1e-4)
        assert values["pairs"] == float(chosen > rejected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    ids = torch.tensor([tokenizer("chatml")("It is two, user.")["input_ids"]])
    with torch.no_grad():
        nll = float(model(ids, labels=ids).loss)
    texts = [row["values"]["nll"] for item, row in rows.items() if item.startswith("text:")]
    assert texts[1] == pytest.approx(-nll, rel=1e-4)


def _length(prompt: Prompt, text: str) -> int:
    return len(ChatTemplate(tokenizer("chatml")).tokens(prompt.messages, text).response)


def _log_prob(folder: Path, prompt: Prompt, text: str, finish: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    before, response = ChatTemplate(tokenizer("chatml")).tokens(prompt.messages, text)
    response = response if finish == "stop" else response[:-1]
    ids = torch.tensor([[*before, *response]])
    with torch.no_grad():
        told = model(ids).logits.double().log_softmax(-1)[0]
    return sum(float(told[len(before) + place - 1, token]) for place, token in enumerate(response))


def test_answers_don_t_depend_on_what_was_measured_before(models: Path, tmp_path: Path) -> None:
    """A candidate's rows are the same after another one, with the baseline put in between, and alone."""
    request = request_of(models, tmp_path / "out", SPACES, "log_ratio", prompts=(models / "prompts.jsonl",))
    request = replace(request, batch_size=5)

    def rows(*alphas: float, wanted: frozenset[str] | None = None) -> dict[str, Any]:
        with evaluator_of(prepare(request)) as evaluator:
            for alpha in alphas:
                found = list(evaluator.measure({"alpha": alpha}, evaluator.items, wanted or frozenset(evaluator.items)))
        return {row["item"]: row for row in found}

    alone = rows(1.5)
    assert alone == rows(0.0, 4.0, 1.5)
    few = frozenset(["q3", "q17"])
    assert rows(1.5, wanted=few) == {item: alone[item] for item in few}


def test_kl_is_estimated_from_the_same_first_items_of_every_candidate(models: Path, tmp_path: Path) -> None:
    request = request_of(
        models, tmp_path / "out", SPACES, prompts=(models / "prompts.jsonl",), search="grid", grid={"alpha": (4.0, 8.0)}
    )
    with evaluator_of(prepare(request)) as evaluator:
        [answering] = evaluator.measures
        assert isinstance(answering, Answering) and answering.likelihoods is not None
        answering.likelihoods = replace(answering.likelihoods, sample=7)
        items = evaluator.items[::-1]
        for alpha in (0.0, 4.0, 8.0):
            rows = {row["item"]: row for row in evaluator.measure({"alpha": alpha}, items, frozenset(items[2:]))}
            compared = {item for item in rows if "log_prob" in rows[item] and "aligned_log_prob" in rows[item]}
            assert compared == (set(items[2:7]) if alpha else set())


@pytest.mark.parametrize("held_out", [pytest.param(0.5, marks=pytest.mark.slow), 0.3])
def test_no_answer_is_made_that_is_not_wanted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: float
) -> None:
    """Looks and held-out items are where batches end, though prompts in a batch are alike in length."""
    made: list[str] = []
    drawn = Local._drawn

    def counted(self: Local, work: Any) -> Any:
        made.extend(one.task.prompt.id for one in work)
        return drawn(self, work)

    monkeypatch.setattr(Local, "_drawn", counted)
    prompts = write_prompts(tmp_path, 128)
    grid = {"search": "grid", "grid": {"alpha": (0.5, 4.0)}, "batch_size": 4, "held_out": held_out}
    request = request_of(models, tmp_path / "out", SPACES, prompts=(prompts,), **grid)
    search_and_write(prepare(request))
    kept = sum(len(rows) for rows in rows_of(tmp_path / "out.boost").values())
    assert len(made) == kept >= 3 * 64


def test_killed_and_run_again_no_row_is_measured_twice(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    arguments = [
        "sft", "dpo", "--prompts", "prompts.jsonl", "--score", "function:tests.boost.end_to_end:slow_and_logged",
        "--search", "grid", "--grid", "0.5,2", "--max-tokens", "6", "--all-items", "--batch-size", "8",
    ]  # fmt: skip
    scored, folder = tmp_path / "scored", tmp_path / "killed.boost"
    running = subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", "boost", *arguments, "-o", str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCORED": str(scored)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while running.poll() is None and (not scored.exists() or len(scored.read_text().splitlines()) < 30):
        time.sleep(0.01)
    running.kill()
    assert running.wait() != 0
    kept = {(name, item) for name, rows in rows_of(folder).items() for item in rows}
    assert 0 < len(kept) < 24 * 3

    monkeypatch.setenv("SCORED", str(tmp_path / "scored-again"))
    again = command(*arguments, "-o", tmp_path / "killed")
    assert again.exit_code == 0, again.stderr
    assert len((tmp_path / "scored-again").read_text().splitlines()) == 24 * 3 - len(kept)
    whole = command(*arguments, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    assert rows_of(folder) == rows_of(tmp_path / "whole.boost")


def test_a_candidate_that_overflows_is_out_and_the_search_goes_on(tmp_path: Path) -> None:
    write_models(tmp_path, rms=0.05, dtype=torch.float16)
    data = {"pairs": write_pairs(tmp_path, 8), "prompts": (write_prompts(tmp_path, 8),)}
    wide = {"tune": ("alpha=0:10000000",), "search": "grid", "grid": {"alpha": (1.0, 1e7)}}
    request = request_of(tmp_path, tmp_path / "out", "pairs", SPACES, **data, **wide)
    boosted = search_and_write(prepare(request))
    last = boosted.result.points[-1]
    assert last.facts["nonfinite"] and not last.score.items and not last.allowed
    assert boosted.result.points[0].score.items == 8


def test_everything_wrong_with_a_request_is_told_at_once(models: Path, tmp_path: Path) -> None:
    request = request_of(
        models, tmp_path / "out", "reward:./rm", "rewart:x", tune=("alpha=1:0",), limits=("grow=2",), device="cudo"
    )
    with pytest.raises(UsageError) as refused:
        prepare(request)
    for said in ("Did you mean 'reward'?", "alpha=1:0", "no such limit", "Unknown device 'cudo'"):
        assert said in str(refused.value)
    for scores, options, said in [
        (("reward:./rm",), {}, "it needs --prompts"),
        (("pairs",), {}, "needs --pairs"),
        ((), {}, "What are candidates scored by?"),
        (("log_ratio",), {"prompts": (models / "prompts.jsonl",), "serve_command": "x"}, "no --serve-command"),
        (("pairs",), {"pairs": models / "pairs.jsonl", "sft": None}, "exactly one"),
        (("pairs",), {"pairs": models / "prompts.jsonl"}, "prompts.jsonl:1: 'chosen' is 'None'"),
        (("lm-eval:gsm8k",), {}, "pip install lm_eval"),
        (("judge:m",), {"prompts": (models / "prompts.jsonl",)}, "needs 'server'"),
        (("pairs",), {"pairs": models / "pairs.jsonl", "tune": ("alpha=0:1", "alpha[filter=a]=0:1"),
                      "search": "bracket"}, "The bracket searches one alpha"),
    ]:  # fmt: skip
        with pytest.raises(UsageError) as refused:
            prepare(request_of(models, tmp_path / "out", *scores, **options))
        assert said in str(refused.value)


def test_an_output_that_can_not_be_is_refused_before_the_search(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "out").mkdir()
    said = command("sft", "dpo", "--pairs", "pairs.jsonl", "--score", "pairs", "-o", tmp_path / "out")
    assert said.exit_code == 2 and "exists. --force replaces it." in said.stderr
    said = command("sft", "dpo", "--pairs", "pairs.jsonl", "--score", "pairs", "-o", "dpo/out")
    assert said.exit_code == 2 and "Inputs are never touched" in said.stderr
    assert not (models / "dpo" / "out.boost").exists()


def test_a_dry_run_reads_headers_and_writes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    said = command(
        "sft", "dpo", "--prompts", "prompts.jsonl", "--score", "log_ratio", "-o", tmp_path / "out", "--dry-run",
        "--json",
    )  # fmt: skip
    assert said.exit_code == 0, said.stderr
    told = json.loads(said.stdout)
    assert (told["search"], told["measured on"]) == ("bracket", "24 prompts")
    assert not list(tmp_path.iterdir())
