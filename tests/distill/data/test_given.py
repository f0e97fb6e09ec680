"""Data in the place of stages, and rows for other tools, through the commands and on real files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lite.answers.data_files import Data
from mergekit_lite.commands import main
from mergekit_lite.distillation.data.given import examples
from tests.distill.recipes import recipe_data

QUESTIONS = [f"question {number}?" for number in range(6)]
TRAIN = {"learning_rate": 1e-5, "batch_size": 2}


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["distill", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def write_recipe(folder: Path, *without: str, **changes: Any) -> Path:
    data = {key: value for key, value in recipe_data(**changes).items() if key not in without}
    (folder / "target").mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def ultrafeedback(folder: Path) -> Path:
    """Two models' answers with scores; the second one's last score is missing."""
    table = [
        {
            "instruction": question,
            "completions": [
                {"model": "a", "response": f"a says {number}", "overall_score": number},
                {"model": "b", "response": f"b says {number}", "overall_score": 3 if number < 5 else "N/A"},
            ],
        }
        for number, question in enumerate(QUESTIONS)
    ]
    path = folder / "ultrafeedback.json"
    path.write_text(json.dumps(table, indent=1))
    return path


def given_sources(folder: Path, **changes: Any) -> Path:
    ultrafeedback(folder)
    answers = {"path": "ultrafeedback.json", "scorer": "gpt4"}
    return write_recipe(
        folder,
        "prompts",
        sources=[{"name": name, "answers": [{**answers, "model": name}]} for name in "ab"],
        scorers=[{"name": "gpt4", "kind": "given"}],
        pairs={"rule": "best_worst", "score": "gpt4", "sft_share": 0.5},
        **changes,
    )


def test_answers_with_scores_skip_two_stages(tmp_path: Path) -> None:
    path = given_sources(tmp_path)
    code, told, error = invoke("run", path, "--dry-run")
    assert code == 0, error
    assert not (tmp_path / "out").exists()
    assert [line.split() for line in told.splitlines() if line.startswith(("a ", "b "))] == [
        [name, "given", "6", "6", "0"] for name in "ab"
    ]
    for stage in ("sample", "score", "pair"):
        code, told, error = invoke(stage, path)
        assert code == 0, error
        if stage == "score":
            assert "1 answer of b without a score: the data have no score of it (1×)" in error
            assert ["gpt4", "a", "6", "2.5", "1.71", "0"] in [line.split() for line in told.splitlines()]
    samples = rows(tmp_path / "out" / "samples" / "b.jsonl")
    assert [(row["text"], row["index"]) for row in samples] == [(f"b says {number}", 0) for number in range(6)]
    preferences = rows(tmp_path / "out" / "pairs" / "preference.jsonl")
    assert len(preferences) == 2 and len(rows(tmp_path / "out" / "pairs" / "sft.jsonl")) == 2
    for row in preferences:
        number = QUESTIONS.index(row["messages"][0]["content"])
        best, worst = ("a", "b") if number > 3 else ("b", "a")
        assert (row["chosen"][0]["source"], row["rejected"][0]["source"]) == (best, worst)
        assert row["gap"] == abs(number - 3)


def test_answers_are_taken_anew_and_told_apart(tmp_path: Path) -> None:
    """Prompts of the recipe's own: answers to others are counted, and what changed is judged again."""
    given = [{"prompt": f"question {number}?", "completion": f"{number}"} for number in (1, 0, 7, 1)]
    write_lines(tmp_path / "given.jsonl", [*given, "{", {"text": "no answer"}])
    write_lines(tmp_path / "prompts.jsonl", [{"id": f"p{n}", "prompt": f"question {n}?"} for n in range(3)])
    path = write_recipe(tmp_path, sources=[{"name": "a", "answers": [{"path": "given.jsonl"}]}])
    code, told, error = invoke("sample", path)
    assert code == 0
    assert "a: 3 answers given" in told and "a: 1 left out: to other prompts than the recipe's" in told
    file = tmp_path / "given.jsonl"
    assert f"{file}:5: not JSON" in error and f"{file}:6: the columns 'text' are none of those that are known" in error
    samples = tmp_path / "out" / "samples" / "a.jsonl"
    assert [(r["prompt"], r["index"], r["text"]) for r in rows(samples)] == [
        ("p0", 0, "0"),
        ("p1", 0, "1"),
        ("p1", 1, "1"),
    ]
    write_lines(file, given[:1])
    assert invoke("sample", path)[0] == 0
    assert [row["prompt"] for row in rows(samples)] == ["p1"]
    write_lines(file, given[2:3])
    code, _, error = invoke("sample", path)
    assert code == 2 and "The data have no answer of a" in error and "1 answers to other prompts" in error
    assert [row["prompt"] for row in rows(samples)] == ["p1"]  # nothing was touched


PREFERENCES = [
    {"prompt": [{"role": "user", "content": question}], "chosen": [{"role": "assistant", "content": "yes"}],
     "rejected": [{"role": "assistant", "content": "no"}]}
    for question in QUESTIONS
]  # fmt: skip


def given_rows(folder: Path, preference: list[Any] = PREFERENCES) -> Path:
    write_lines(folder / "preference.jsonl", preference)
    import pyarrow as pa
    from pyarrow import parquet

    table = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "yes"}]} for q in QUESTIONS]
    parquet.write_table(pa.Table.from_pylist(table), folder / "sft.parquet")
    return write_recipe(
        folder,
        *("prompts", "sources", "scorers", "pairs"),
        rows={"sft": [{"path": "sft.parquet"}], "preference": [{"path": "preference.jsonl"}]},
        train={"sft": TRAIN, "preference": {**TRAIN, "objective": "dpo"}},
    )


def test_rows_skip_three_stages(tmp_path: Path) -> None:
    same = {**PREFERENCES[0], "rejected": PREFERENCES[0]["chosen"]}
    path = given_rows(tmp_path, [*PREFERENCES, same, {"chosen": "yes"}])
    code, told, _ = invoke("run", path, "--dry-run", "--json")
    assert code == 0
    assert json.loads(told)["training"] == [
        {"stage": "sft", "rows": 6, "steps": 3},
        {"stage": "preference", "rows": 7, "steps": 3},
    ]
    assert json.loads(told)["left_out"][0].startswith(f"{tmp_path / 'preference.jsonl'}:8: the columns 'chosen'")
    for stage in ("sample", "score"):
        assert invoke(stage, path)[1].startswith("The rows are given")
    code, told, error = invoke("pair", path)
    assert code == 0 and "preference: 1 left out: chosen and rejected are the same text" in told
    assert f"{tmp_path / 'preference.jsonl'}:8: the columns 'chosen'" in error
    assert ["chosen,", "source", "6", "0", "0", "3"] in [line.split() for line in told.splitlines()]
    table = json.loads((tmp_path / "out" / "pairs" / "table.json").read_text())
    assert table["domains"] == {} and table["roles"]["chosen, source"]["answers"] == 6
    for name in ("sft", "preference"):
        assert [
            row["messages"][0]["content"] for row in rows(tmp_path / "out" / "pairs" / f"{name}.jsonl")
        ] == QUESTIONS
    assert len(rows(tmp_path / "out" / "prompts.jsonl")) == 6  # held-out prompts are looked for among them


def test_columns_may_be_kept_once_there_are_answers(tmp_path: Path) -> None:
    """No source sees them, so nothing is asked again; nor for prompts that an earlier version wrote."""
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "one", "topic": "numbers"}])
    write_lines(tmp_path / "given.jsonl", [{"prompt": "one", "completion": "1"}])
    sources, stored = [{"name": "a", "answers": [{"path": "given.jsonl"}]}], tmp_path / "out" / "prompts.jsonl"
    assert invoke("sample", write_recipe(tmp_path, sources=sources))[0] == 0
    (row,) = rows(stored)
    write_lines(stored, [{key: value for key, value in row.items() if key not in ("plain", "columns")}])
    path = write_recipe(tmp_path, sources=sources, prompts=[{"path": "prompts.jsonl", "keep": ["topic"]}])
    assert invoke("sample", path)[0] == 0
    assert rows(stored) == [{**row, "columns": {"topic": "numbers"}}]
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "another", "topic": "numbers"}])
    assert "no longer those" in invoke("sample", path)[2]


def test_given_answers_do_not_replace_those_of_a_model_nor_pass_for_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    write_lines(tmp_path / "given.jsonl", [{"prompt": "one", "completion": "<think>hm"}])
    given = {"name": "a", "answers": [{"path": "given.jsonl"}]}
    path = write_recipe(tmp_path, sources=[given])
    plan = json.loads(invoke("run", path, "--dry-run", "--json")[1])
    assert [(each["done"], each["cut"]) for each in plan["sources"]] == [(1, 1)]  # it ends in its thoughts
    folder = tmp_path / "out" / "samples"
    folder.mkdir(parents=True)
    for settings in (None, '{"model": "m"}'):
        asked = write_lines(folder / "a.jsonl", [{"prompt": "p", "source": "a", "index": 0, "text": "costly"}])
        (folder / "a.json").unlink(missing_ok=True)
        if settings:
            (folder / "a.json").write_text(settings)
        before = asked.read_bytes()
        code, _, error = invoke("sample", path)
        assert code == 2 and "don't come from the recipe's data" in error, error
        assert asked.read_bytes() == before
    for file in folder.iterdir():
        file.unlink()
    assert invoke("sample", path)[0] == 0 and invoke("sample", path)[0] == 0
    code, _, error = invoke("sample", write_recipe(tmp_path))
    assert code == 2 and "model: was None, is 'm'" in error


def test_wrpos_rows_have_the_targets_answers(tmp_path: Path) -> None:
    said = {text: {"role": "assistant", "content": text} for text in ("source's", "own best", "own worst")}
    ws, wt, worst = said.values()
    wrpo = {"prompt_id": "0", "prompt": {"role": "user", "content": "?"}, "chosen": [ws, wt], "rejected": [worst]}
    assert invoke("pair", given_rows(tmp_path, [wrpo]))[0] == 0
    (row,) = rows(tmp_path / "out" / "pairs" / "preference.jsonl")
    assert [(r["text"], r["role"]) for r in row["chosen"]] == [("source's", "source"), ("own best", "target")]
    assert [(r["text"], r["role"]) for r in row["rejected"]] == [("own worst", "target")]


def test_contradictions_are_told_with_their_places(tmp_path: Path) -> None:
    rows_of = {"sft": [{"path": "x.jsonl", "dataset": "x"}]}
    path = write_recipe(tmp_path, "scorers", rows=rows_of, train={"preference": {**TRAIN, "objective": "dpo"}})
    error = invoke("pair", path)[2]
    for what in ("'prompts' has no effect", "'sources' has no effect", "'pairs' has no effect", "exactly one of 'path'",
                 "'rows' has 'sft', 'train' has no", "'train' has 'preference', 'rows' has no"):  # fmt: skip
        assert what in error
    given = {"sft": [{"path": "x.jsonl"}]}
    scorers: list[dict[str, Any]] = [{"name": name, "kind": "exact"} for name in ("right", "Right")]
    rest = {"scorers": scorers, "target_source": {"name": "a"}, "report": {"scores": ["wrong"]}}
    error = invoke("pair", write_recipe(tmp_path, "prompts", "sources", "pairs", rows=given, **rest))[2]
    for what in ("'Right' is taken by another", "always called 'target'", "no scorer is named 'wrong'"):
        assert what in error, error
    sources = [{"name": "a", "answers": [{"path": "x", "scorer": "gpt5"}], "samples": 3}, {"name": "b"}]
    scorers = [{"name": "gpt4", "kind": "given"}, {"name": "right", "kind": "exact"}]
    report = {"scores": ["gpt4"]}
    error = invoke("pair", write_recipe(tmp_path, "prompts", "pairs", sources=sources, scorers=scorers, report=report))[
        2
    ]
    for what in ("no scorer of the kind 'given' is named 'gpt5'", "no 'answers' of a source give scores to 'gpt4'",
                 "'samples' has no effect here: the answers are given",
                 "sources[2] has no 'model', no 'aggregate' and no 'answers'",
                 "the recipe has no 'pairs'", "can't judge what the trained models answer"):  # fmt: skip
        assert what in error, error


@pytest.mark.parametrize("text", ["[{}", '[{"a": 1} nonsense]', '"text"', "[" * 5000])
def test_json_that_is_no_list_of_objects(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(f"\n{text}")
    path = write_recipe(tmp_path, "prompts", sources=[{"name": "a", "answers": [{"path": "x.json"}]}])
    code, _, error = invoke("sample", path)
    assert code == 2 and str(tmp_path / "x.json") in error


def test_lines_of_a_json_file(tmp_path: Path) -> None:
    """Of a list each object by its line; a file of JSON Lines may be named so, too."""
    objects = [{"prompt": "?", "completion": "a\n\nb"}, 7, {"prompt": "?"}]
    (tmp_path / "list.json").write_text("[\n" + ",\n\n".join(json.dumps(each, indent=1) for each in objects) + "\n]\n")
    write_lines(tmp_path / "lines.json", objects)
    for name, lines in (("list", (2, 7, 9)), ("lines", (1, 2, 3))):
        problems: list[str] = []
        path = tmp_path / f"{name}.json"
        (found,) = examples(Data(path=path), problems)
        assert (found[0].answers[0].text, found[1]) == ("a\n\nb", f"{path}:{lines[0]}")
        assert [problem.split(": ")[0] for problem in problems] == [f"{path}:{line}" for line in lines[1:]]


def exported(folder: Path, form: str) -> Path:
    """Rows of ours: with a system prompt, earlier turns, thoughts, two chosen answers, and one that was cut."""
    earlier = [("system", "Be helpful."), ("user", "What?"), ("assistant", "That."), ("user", "And?")]
    messages = [{"role": role, "content": content} for role, content in earlier]
    answers = [{"text": text, "role": "source"} for text in ("<think>\nwhy\n</think>\n\nyes", "well", "no")]
    pairs = folder / "out" / "pairs"
    pairs.mkdir(parents=True)
    write_lines(
        pairs / "sft.jsonl",
        [{"messages": messages, "response": "yes"}, {"messages": messages[1:], "response": "n", "cut": True}],
    )
    preferences = [
        {"messages": messages, "chosen": answers[:2], "rejected": answers[2:]},
        {"messages": messages[3:], "chosen": answers[:1], "rejected": [{**answers[2], "cut": True}]},
    ]
    write_lines(pairs / "preference.jsonl", preferences)
    path = write_recipe(folder)
    code, told, error = invoke("export", path, "--format", form, "-o", folder / form)
    assert code == 0, error
    assert "sft: 1 row left out: with an answer that was cut" in told
    assert "preference: 1 row with several chosen or rejected answers became one of each" in told
    code, _, error = invoke("export", path, "--format", form, "-o", folder / form)
    assert code == 2 and "not an empty folder" in error
    return folder / form


@pytest.mark.parametrize("form", ["trl", "llama-factory", "sharegpt"])
def test_exported_rows_are_read_back(tmp_path: Path, form: str) -> None:
    folder = exported(tmp_path, form)
    problems: list[str] = []
    (sft,) = (example for example, _ in examples(Data(path=folder / "sft.jsonl"), problems))
    preferences = [example for example, _ in examples(Data(path=folder / "preference.jsonl"), problems)]
    assert not problems
    assert [turn["role"] for turn in sft.prompt.messages] == ["system", "user", "assistant", "user"]
    assert sft.answers[0].text == "yes"
    assert [example.prompt.messages for example in preferences] == [sft.prompt.messages] * 2
    texts = [(example.chosen[0].text, example.rejected[0].text) for example in preferences]
    assert texts == [("<think>\nwhy\n</think>\n\nyes", "no"), ("well", "no")]
    if form == "llama-factory":
        info = json.loads((folder / "dataset_info.json").read_text())
        assert info["preference"]["ranking"] and info["preference"]["columns"]["chosen"] == "chosen"
        assert all((folder / each["file_name"]).exists() for each in info.values())
        assert {*info["sft"]["columns"].values()} == rows(folder / "sft.jsonl")[0].keys()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
def test_trl_and_datasets_read_exported_rows(tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    from tests.tokenizers import tokenizer

    folder = exported(tmp_path, "trl")
    for name, keys in (("sft", {"prompt", "completion"}), ("preference", {"prompt", "chosen", "rejected"})):
        data = load_dataset(
            "json", data_files=str(folder / f"{name}.jsonl"), split="train", cache_dir=tmp_path / "cache"
        )
        assert {*data.column_names} == keys
        for row in data:
            assert is_conversational(row)
            text = maybe_apply_chat_template(row, tokenizer("chatml"))
            assert text["prompt"].endswith("<|im_start|>assistant\n")
            assert all(text[key].endswith("<|im_end|>\n") for key in keys - {"prompt"})


@pytest.mark.slow
def test_given_rows_are_trained_on(tmp_path: Path) -> None:
    """From rows to a trained model, with nothing else in the recipe."""
    from tests.distill.training import target

    path = given_rows(tmp_path)
    target(tmp_path / "target")
    data = yaml.safe_load(path.read_text())
    for stage in data["train"].values():
        stage |= {"dtype": "float32", "per_device_batch_size": 2}
    path.write_text(yaml.safe_dump(data))
    code, told, error = invoke("run", path)
    assert code == 0, error
    assert "sft: 3 steps done" in told and "preference: 3 steps done" in told
    assert (tmp_path / "out" / "train" / "preference" / "config.json").exists()
