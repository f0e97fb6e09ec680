"""Rounds: each starts from what the last one made, on its own prompts, and a kill anywhere changes nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_lite.answers.rows import Prompt, read_rows, write_rows
from mergekit_lite.answers.template import ChatTemplate, LengthLimits
from mergekit_lite.commands import main
from mergekit_lite.distillation.distilling import distill
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.replay import replayed
from mergekit_lite.distillation.prompts import settled
from mergekit_lite.distillation.recipe.loading import load, parse
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import (
    add_momentum,
    current,
    is_done,
    made_by,
    prompts_of,
    round_of,
    take_over,
    trained_in,
)
from mergekit_lite.distillation.sample import tasks_of
from mergekit_lite.distillation.train import train
from mergekit_lite.distillation.training.model import tokenizer_of
from mergekit_lite.distillation.training.rows import preference_rows
from mergekit_lite.errors import UsageError
from mergekit_lite.yaml_document import RecipeError
from tests.causal import causal_model
from tests.distill.training import STAGE, log, target, weights
from tests.distill.training import write_rows as write_training_rows
from tests.processes import preload, run, started
from tests.tokenizers import tokenizer

preload(
    "mergekit_lite.distillation.distilling",
    "mergekit_lite.distillation.training.trainer",
    "mergekit_lite.answers.local",
    "transformers.models.llama.modeling_llama",
)

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 6}
ROUNDS = {"number": 2, "momentum": 0.5, "replay": [0.5], "reference": "first"}


def place(folder: Path, prompts: int = 9, **changes: Any) -> Path:
    """A recipe whose target answers alone, with all that it needs; made in the folder ``made``."""
    folder.mkdir(parents=True, exist_ok=True)
    causal_model("llama", seed=0).save_pretrained(folder / "target")
    tokenizer("chatml").save_pretrained(folder / "target")
    write_rows(folder / "prompts.jsonl", ({"prompt": f"question {number}"} for number in range(prompts)))
    (folder / "variety.py").write_text(
        "def score(completions, **columns):\n    return [len(set(answer)) for answer in completions]\n"
    )
    recipe = {
        "folder": "made",
        "target": "./target",
        "rounds": ROUNDS,
        "prompts": [{"path": "prompts.jsonl"}],
        "target_source": {"samples": 3, "sampling": SAMPLING, "device": "cpu"},
        "scorers": [{"name": "variety", "kind": "function", "model": "variety:score"}],
        "pairs": {"rule": "best_worst", "answers": "target", "score": "variety", "sft_share": 0, "cut": "keep"},
        "train": {"preference": {**STAGE, "batch_size": 2, "objective": "dpo", "trainer": {"use_cpu": True}}},
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def rows(path: Path) -> list[dict[str, Any]]:
    return [line.row for line in read_rows(path, [])]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, done, with a report on held-out prompts."""
    folder = tmp_path_factory.mktemp("rounds")
    write_rows(folder / "held-out.jsonl", ({"prompt": f"another {number}"} for number in range(4)))
    recipe = place(folder, report={"prompts": [{"path": "held-out.jsonl"}], "sampling": {"max_tokens": 6}})
    distilled(recipe)
    return recipe


def distilled(recipe: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(recipe.parent))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        distill(recipe)
        torch.set_num_threads(threads)


def test_each_round_starts_from_what_the_last_one_made(done: Path) -> None:
    recipe = load(done)
    first, second = (round_of(recipe, number) for number in (1, 2))
    assert (first.target, second.target) == (recipe.target, str(made_by(first)))
    started_from = [
        json.loads((trained_in(each) / "training.json").read_text())["settings"] for each in (first, second)
    ]
    assert [each["start"] for each in started_from] == [first.target, second.target]
    assert [each.get("reference") for each in started_from] == [None, recipe.target]
    asked = [{row["id"] for row in rows(Folder(each.folder).prompts)} for each in (first, second)]
    assert sorted(map(len, asked)) == [4, 5] and not asked[0] & asked[1]
    assert {row["prompt"] for row in rows(Folder(second.folder).samples("target"))} == asked[1]


def test_momentum_is_a_step_beyond(done: Path) -> None:
    """θ_K = θ̂_K + a (θ̂_K − θ̂_{K−1}), element by element in float64, from the models that were trained."""
    recipe = load(done)
    before = Path(recipe.target)
    for number in (1, 2):
        each = round_of(recipe, number)
        old, new, beyond = (weights(path) for path in (before, trained_in(each), made_by(each)))
        moved = 0.0
        for name, tensor in new.items():
            a, b = old[name].double().numpy(), tensor.double().numpy()
            np.testing.assert_allclose(beyond[name].double().numpy(), b + 0.5 * (b - a), rtol=1e-6, atol=1e-7)
            moved = max(moved, float(np.abs(b - a).max()))
        assert moved > 1e-4
        before = trained_in(each)  # without its momentum
    assert (made_by(each) / "mergekit_lite_manifest.json").exists()


def test_rows_of_the_last_round_are_replayed(done: Path) -> None:
    recipe = load(done)
    old, new = (rows(Folder(round_of(recipe, number).folder).pairs("preference")) for number in (1, 2))
    again = [row for row in new if row.get("round") == 1]
    assert len(again) == len(old) // 2 > 0 and all("round" not in row for row in old)
    assert all({key: value for key, value in row.items() if key != "round"} in old for row in again)
    assert new[-len(again) :] == again


def test_the_report_is_of_all_rounds(done: Path) -> None:
    folder = Folder(done.parent / "made").report
    written = json.loads((folder / "report.json").read_text())
    assert list(written["held_out"]["models"]) == ["untrained", "round-1", "round-2"]
    counts = [(each["round"], each["prompts"], each["steps"]) for each in written["rounds"]]
    assert counts == [(1, 5, 2), (2, 4, 3)]
    assert {path.name for path in folder.glob("*.png")} == {
        *("held-out.png", "rounds.png", "round-1-preference.png", "round-2-preference.png")
    }
    text = (folder / "report.md").read_text()
    tables = [json.loads((done.parent / f"made/round-{n}/pairs/table.json").read_text()) for n in (1, 2)]
    assert [each["pairs"] for each in written["rounds"]] == tables and tables[0]["all"]["preference"] > 0
    lines = [f"| {n} | – | {table['all']['prompts']} | {table['all']['total']} |" for n, table in enumerate(tables, 1)]
    assert "| round | domain | prompts | rows |" in text and all(line in text for line in lines)
    assert "## Over the rounds" in text and "Preference training, round 2" in text and "the model of round 1" in text


@pytest.mark.slow
def test_a_second_run_does_nothing(done: Path) -> None:
    def stamps() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (done.parent / "made").rglob("*") if path.is_file()}

    before = stamps()
    distilled(done)
    assert stamps() == before


def test_the_plan_lists_rounds(done: Path) -> None:
    told = CliRunner().invoke(main, ["distill", "run", str(done), "--dry-run", "--json"], catch_exceptions=False)
    plan = json.loads(told.stdout)
    assert [(each["round"], each["prompts"], each["replayed"], each["done"]) for each in plan["rounds"]] == [
        *((1, 5, 0, True), (2, 4, 2, True))
    ]
    assert [each["stage"] for each in plan["training"]] == ["round-1 preference", "round-2 preference"]
    assert [each["rows"] for each in plan["training"]] == [5, 6]
    (source,) = plan["sources"]
    assert source["requests"] == source["done"] == 27
    assert plan["domains"][0]["prompts"] == 9


def test_another_momentum_is_refused_and_so_is_another_model(done: Path, tmp_path: Path) -> None:
    recipe = load(done)
    assert recipe.rounds is not None
    changed = recipe.model_copy(update={"rounds": recipe.rounds.model_copy(update={"momentum": 0.25})})
    with pytest.raises(UsageError, match=r"momentum: was 0\.5, is 0\.25"):
        train(round_of(changed, 1), Reporter())
    # The last step alone can't be taken anew: the model before it was made with the other momentum.
    copy = tmp_path / "made"
    shutil.copytree(recipe.folder, copy)
    shutil.rmtree(copy / "round-2" / "momentum")
    with pytest.raises(UsageError, match=r"The step in .*round-1/momentum was taken in another way"):
        add_momentum(round_of(changed.model_copy(update={"folder": copy}), 2), Reporter())
    other = recipe.model_copy(update={"folder": copy, "target": str(trained_in(round_of(recipe, 2)))})
    with pytest.raises(UsageError, match="weights before: was "):
        add_momentum(round_of(other, 2), Reporter())
    assert not (copy / "round-2" / "momentum").exists()


@pytest.mark.parametrize(
    "moments",
    [
        ("round-2/pairs/target.jsonl",),
        pytest.param(
            ("round-1/pairs", "round-1/train/preference", "round-1/momentum.json", "round-2/samples", "round-2/train"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_in_any_round(done: Path, tmp_path: Path, moments: tuple[str, ...]) -> None:
    """What is there after kills and a last run has the bytes of a run that nobody disturbed."""
    recipe = place(tmp_path)
    for moment in moments:
        with started(recipe.parent, "distill", "run", recipe, before=on_path) as process:
            until = time.monotonic() + 600
            while not (recipe.parent / "made" / moment).exists():
                assert process.running and time.monotonic() < until, f"{moment}: {process.end().stderr}"
                time.sleep(0.002)
            process.send(signal.SIGKILL)
            assert process.end().returncode == -signal.SIGKILL
    ended = run(recipe.parent, "distill", "run", recipe, before=on_path)
    assert ended.returncode == 0, ended.stderr
    assert made(recipe) == made(done)
    assert not list((recipe.parent / "made").rglob("*.partial*"))


def on_path() -> None:
    """Let scorers find functions in the working folder."""
    import sys

    sys.path.insert(0, ".")


def made(recipe: Path) -> dict[str, bytes]:
    """Rows and weights by their paths; logs and settings have times and paths."""
    root = recipe.parent / "made"
    files = [*root.glob("round-*/**/*.safetensors"), *root.glob("round-*/**/*.jsonl"), root / "prompts.jsonl"]
    found = {str(path.relative_to(root)): path.read_bytes() for path in files if path.name != "log.jsonl"}
    assert {"round-2/momentum/model.safetensors", "round-2/pairs/preference.jsonl"} <= found.keys()
    return found


@pytest.mark.slow
def test_stage_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' commands work on the first round that isn't done."""
    recipe = place(tmp_path, prompts=4, rounds=2)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number in (1, 2):
        assert current(load(recipe), Reporter()).folder.name == f"round-{number}"
        for stage in ("sample", "score", "pair", "sample", "score", "pair", "train"):
            told = CliRunner().invoke(main, ["distill", stage, str(recipe)], catch_exceptions=False)
            assert told.exit_code == 0 and f"[round {number} of 2: " in told.output, told.output
    assert all(is_done(round_of(load(recipe), number)) for number in (1, 2))
    settings = json.loads((tmp_path / "made/round-2/train/preference/training.json").read_text())["settings"]
    assert settings["start"] == str(tmp_path / "made/round-1/train/preference") and "reference" not in settings


@pytest.mark.parametrize("changed", [{"number": 3}, {"prompts": "reuse"}])
def test_other_parts_are_refused(done: Path, changed: dict[str, Any]) -> None:
    """A third round of two would have prompts of the first; where all rounds have all prompts, there may be more."""
    recipe = load(done)
    assert recipe.rounds is not None
    other = recipe.model_copy(update={"rounds": recipe.rounds.model_copy(update=changed)})
    with pytest.raises(UsageError, match="parts: was 2, is"):
        settled(round_of(other, changed.get("number", 2)), Reporter())


def test_prompts_that_change_between_rounds_are_refused(done: Path) -> None:
    path = done.parent / "prompts.jsonl"
    before = path.read_text()
    try:
        path.write_text(before + '{"prompt": "one more"}\n')
        with pytest.raises(UsageError, match="no longer those"):
            distilled(done)
    finally:
        path.write_text(before)


def test_the_reference_is_the_first_model(tmp_path: Path) -> None:
    """The loss of the first step, by a second implementation: log-probabilities of both models in float64."""
    recipe = Recipe.model_validate(
        {
            "folder": tmp_path / "made",
            "target": str(target(tmp_path / "first")),
            "rounds": {"number": 2, "reference": "first"},
            "train": {"preference": {**STAGE, "batch_size": 6, "objective": "dpo", "options": {"beta": 0.3}}},
        }
    )
    first, start, each = tmp_path / "first", made_by(round_of(recipe, 1)), round_of(recipe, 2)
    causal_model("llama", seed=7).save_pretrained(start)
    tokenizer("chatml").save_pretrained(start)
    write_training_rows(each.folder, preference=6, chosen=("target",))
    train(each, Reporter())
    rows = preference_rows(Folder(each.folder).pairs("preference"), ChatTemplate(tokenizer_of(str(start))), LIMITS).rows
    ratios = [
        [log_prob(start, row.prompt, answer) - log_prob(first, row.prompt, answer) for answer in row.answers]
        for row in rows
    ]
    losses = [np.log1p(np.exp(-0.3 * (chosen - rejected))) for chosen, rejected in ratios]
    (logged,) = log(trained_in(each))
    assert logged["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert logged["kl"] == pytest.approx(-np.mean(ratios), rel=1e-3)
    assert abs(logged["loss"] - np.log(2)) > 1e-3  # what it would be with the start as reference


LIMITS = LengthLimits(2048, None, "drop")


def log_prob(model: Path, prompt: Any, answer: Any) -> float:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokens = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = network(tokens).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(sum(logits[place, token] for place, token in zip(places, answer, strict=True)))


def without_files(**changes: Any) -> Recipe:
    """A recipe that nothing is made by."""
    data = {
        "folder": "/nowhere",
        "target": "org/target",
        "train": {"sft": {"learning_rate": 1}},
        "rounds": {"number": 3},
        **changes,
    }
    return Recipe.model_validate(data)


def test_parts_of_the_prompts() -> None:
    """Each prompt is in one part, parts are even in each domain, and the order of the data doesn't matter."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(20):
        number, count = draw.randint(1, 5), draw.randint(5, 60)
        prompts = [Prompt(f"p{name}", ({"role": "user", "content": "?"},), draw.choice("ab")) for name in range(count)]
        recipe = without_files(seed=draw.randrange(100), rounds={"number": number})
        parts = [prompts_of(round_of(recipe, each), prompts) for each in range(1, number + 1)]
        assert sorted(prompt.id for part in parts for prompt in part) == sorted(prompt.id for prompt in prompts)
        for domain in "ab":
            sizes = [sum(prompt.domain == domain for prompt in part) for part in parts]
            assert max(sizes) - min(sizes) <= 1
        for each, part in enumerate(parts, 1):
            assert [prompts.index(prompt) for prompt in part] == sorted(prompts.index(prompt) for prompt in part)
            mixed = draw.sample(prompts, count)
            assert {prompt.id for prompt in prompts_of(round_of(recipe, each), mixed)} == {prompt.id for prompt in part}
    with pytest.raises(UsageError, match="1 prompt can't be split between 3 rounds"):
        prompts_of(round_of(without_files(), 1), prompts[:1])


def test_reused_prompts_have_new_answers_of_the_target_alone(tmp_path: Path) -> None:
    """Every round asks for all prompts; the target's draws differ, what sources said is taken over with its scores."""
    recipe = without_files(
        folder=tmp_path,
        rounds={"number": 3, "prompts": "reuse"},
        sources=[{"name": "strong.v0.1", "model": "org/strong"}],
        target_source={"name": "target", "model": "target"},
        scorers=[{"name": "rm.v2", "kind": "reward", "model": "org/rm"}],
    )
    prompts = [Prompt("p", ({"role": "user", "content": "?"},))]
    rounds = [round_of(recipe, number) for number in (1, 2, 3)]
    seeds = []
    for each in rounds:
        assert prompts_of(each, prompts) == prompts and each.target_source is not None
        seeds += [task.seed for task in tasks_of(each, each.target_source, prompts)]
    assert len(set(seeds)) == len(seeds) == 15
    assert len({tuple(task.seed for task in tasks_of(each, each.sources[0], prompts)) for each in rounds}) == 1
    then = Folder(rounds[0].folder)
    files = [then.samples("strong.v0.1"), then.scores("rm.v2", "strong.v0.1")]
    files += [then.root / "samples/strong.v0.1.json", then.root / "scores/rm.v2.json"]
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    take_over(rounds[2])
    for path in files:
        assert (rounds[2].folder / path.relative_to(then.root)).read_text() == path.read_text()
    take_over(round_of(recipe.model_copy(update={"rounds": without_files().rounds}), 2))
    assert not rounds[1].folder.exists()


def test_shares_of_older_rounds(tmp_path: Path) -> None:
    """DNO's 30 % of the last round and 15 % of the one before it; rows that a round replayed itself don't count."""
    recipe = without_files(folder=tmp_path, rounds={"number": 4, "replay": [0.3, 0.15]})
    for number, count in ((1, 40), (2, 60), (3, 20)):
        own = [{"prompt": f"{number}.{name}"} for name in range(count)]
        write_rows(Folder(tmp_path / f"round-{number}").pairs("preference"), [*own, {"prompt": "old", "round": 0}])
    found = [list(replayed(round_of(recipe, number), "preference")) for number in (1, 2, 3, 4)]
    counts = [Counter(row["round"] for row in rows) for rows in found]
    assert counts == [{}, {1: 12}, {2: 18, 1: 6}, {3: 6, 2: 9}]
    assert all(row["prompt"].startswith(f"{row['round']}.") for rows in found for row in rows)
    assert found == [list(replayed(round_of(recipe, number), "preference")) for number in (1, 2, 3, 4)]
    torn = Folder(tmp_path / "round-2").pairs("preference")
    torn.write_text(torn.read_text()[:-20])
    with pytest.raises(UsageError, match=r"rows of round 2, and some can't be read:\n.*preference\.jsonl:61: not JSON"):
        list(replayed(round_of(recipe, 4), "preference"))
    torn.unlink()
    with pytest.raises(UsageError, match="replays rows of round 2"):
        list(replayed(round_of(recipe, 4), "preference"))


SOUND = """\
folder: out
target: org/target
rounds: {number: 3, reference: first, replay: [0.3, 0.15], momentum: 0.3}
prompts: [{path: p.jsonl}]
target_source: {samples: 5}
scorers: [{name: rm, kind: reward, model: org/rm}]
pairs: {rule: best_worst, answers: target, score: rm, sft_share: 0}
train:
  preference: {learning_rate: 1e-5, objective: dpo}
"""

WRONG = [
    ("number: 3", "number: 2", "3:47: 'replay' has 2 shares, and the last round has 1 round before it"),
    ("number: 3", "numbre: 3", "3:10: unknown key 'numbre' in rounds. Did you mean 'number'?"),
    ("number: 3, ", "", "3:9: rounds has no 'number'"),
    ("{number: 3, reference: first, replay: [0.3, 0.15], momentum: 0.3}", "0", "3:9: 'rounds' is the number 0"),
    ("{number: 3, reference: first, replay: [0.3, 0.15], momentum: 0.3}", "three", "3:9: 'rounds' is the text 'three'"),
    ("reference: first", "reference: frist", "Did you mean 'first'?"),
    ("0.3, 0.15", "0.3, 30", "expected less than or equal to 1"),
    ("train:\n", "report: {servers: {rond-2: x}}\ntrain:\n", "no model is named 'rond-2'. Did you mean 'round-2'?"),
    ("train:\n", "report: {servers: {sft: x}}\ntrain:\n", "There are: untrained, round-1, round-2, round-3"),
    (
        "train:\n",
        "teachers: [{name: t, model: org/target}]\ntrain:\n  fuse: {learning_rate: 1e-5, objective: alm}\n",
        "3:9: the teacher t is the target, which is another model in each round",
    ),
    ("momentum: 0.3", "momentum: -0.3", "expected greater than or equal to 0"),
    ("objective: dpo", "objective: simpo", "3:32: 'reference' has no effect here: simpo has none"),
    ("objective: dpo", "objective: dpo, reference: org/x", "3:32: 'train.preference' names a 'reference' already"),
    ("samples: 5", "server: 'http://x/v1', model: policy", "put {round} into its 'model', or take 'serve'"),
    ("sft_share: 0", "sft_share: 0.5", "the recipe has no 'sources'"),
    ("answers: target, ", "gap_own: [1, 2], ", "'gap_own' has no effect here"),
]


@pytest.mark.parametrize(("old", "new", "told"), WRONG)
def test_wrong_recipes(old: str, new: str, told: str) -> None:
    assert old in SOUND
    with pytest.raises(RecipeError) as error:
        parse(SOUND.replace(old, new), "recipe.yaml", Path())
    assert told in str(error.value), str(error.value)


def test_a_number_alone_is_a_section(tmp_path: Path) -> None:
    short = parse(SOUND.replace("{number: 3, reference: first, replay: [0.3, 0.15], momentum: 0.3}", "3"), "", tmp_path)
    assert short.rounds is not None
    defaults = (short.rounds.number, short.rounds.prompts, short.rounds.reference, short.rounds.momentum)
    assert defaults == (3, "split", "start", 0)
    served = SOUND.replace("samples: 5", "server: 'http://x/v1', model: 'policy-{round}'")
    own = round_of(parse(served, "", tmp_path), 2).target_source
    assert own is not None and own.model == "policy-2"


def test_inpo_needs_the_first_model() -> None:
    wrong = SOUND.replace("objective: dpo", "objective: inpo").replace("reference: first", "reference: start")
    with pytest.raises(RecipeError, match="3:9: inpo is held to the first model and to the start of the round"):
        parse(wrong, "", Path())
    recipe = parse(SOUND.replace("objective: dpo", "objective: inpo"), "", Path())
    references = [round_of(recipe, number).train.preference.reference for number in (1, 2, 3)]  # type: ignore[union-attr]
    assert references == [None, "org/target", "org/target"]  # in the first round it is where training starts
