"""Prompts of files and data sets: what is wrong is named with its place, and the other rows go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from mergekit_lite.answers.prompts import Prompts, as_row, digest_of, from_row, load
from mergekit_lite.answers.rows import Message, Prompt, own_systems, with_system
from mergekit_lite.errors import UsageError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "1+1?", "domain": "maths", "reference": 2, "tests": None},
    {"prompt": "Write f.", "tests": ["assert f()", "assert f(1)"]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ]
    },
]


def user(text: str) -> tuple[Any, ...]:
    return ({"role": "user", "content": text},)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_become_prompts(tmp_path: Path) -> None:
    loaded = load([Prompts(path=jsonl(tmp_path / "p.jsonl", ROWS), domain="other")])
    assert not loaded.problems and not loaded.repeated
    conversation = tuple(ROWS[2]["messages"])
    assert loaded.prompts == [
        Prompt("a", user("1+1?"), "maths", "2", plain=True),
        Prompt(digest_of(user("Write f.")), user("Write f."), "other", None, ("assert f()", "assert f(1)"), plain=True),
        Prompt(digest_of(conversation), conversation, "other"),
    ]
    assert [from_row(json.loads(json.dumps(as_row(prompt)))) for prompt in loaded.prompts] == loaded.prompts


@pytest.mark.parametrize("form", ["p.jsonl", "p.parquet", "data set"])
def test_further_columns_are_kept_where_that_is_asked(tmp_path: Path, form: str) -> None:
    """None is kept unasked, as a data set's other columns may be many times as large as its prompts."""
    rows = [{"q": "x", "topic": "bread", "given": [1, 2]}, {"q": "y", "topic": "tea", "given": None}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    if form == "p.parquet":
        path.unlink()
        path = tmp_path / form
        parquet.write_table(pa.Table.from_pylist(rows), path)
    source = {"dataset": str(tmp_path)} if form == "data set" else {"path": path}

    def kept(**how: Any) -> list[Any]:
        loaded = load([Prompts(**source, columns={"prompt": "q"}, **how)])
        assert [from_row(json.loads(json.dumps(as_row(prompt)))) for prompt in loaded.prompts] == loaded.prompts
        return [prompt.columns for prompt in loaded.prompts]

    assert kept() == [{}, {}]
    assert kept(keep=("topic",)) == [{"topic": "bread"}, {"topic": "tea"}]
    assert kept(keep="all") == [{"topic": "bread", "given": [1, 2]}, {"topic": "tea", "given": None}]
    with pytest.raises(UsageError, match=r"no column 'topics' to keep; it has .*Did you mean 'topic'"):
        kept(keep=("topics",))


def test_a_column_that_json_can_not_hold_is_not_kept(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([{"prompt": "x", "blob": b"\x00"}]), tmp_path / "p.parquet")
    loaded = load([Prompts(path=tmp_path / "p.parquet", keep="all")])
    assert not loaded.prompts and "the column 'blob'" in loaded.problems[0]


def test_parquet_has_the_same_prompts(tmp_path: Path) -> None:
    jsonl(tmp_path / "p.jsonl", ROWS)
    table = pa.Table.from_pylist([{key: row.get(key) for key in ("prompt", "messages", "tests")} for row in ROWS])
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    same = [
        [(p.messages, p.tests) for p in load([Prompts(path=tmp_path / name)]).prompts]
        for name in ("p.jsonl", "p.parquet")
    ]
    assert same[0] == same[1]


def test_a_data_set_is_loaded_through_datasets(tmp_path: Path) -> None:
    jsonl(tmp_path / "data.jsonl", [{"q": f"question {n}", "other": 1} for n in range(5)])
    loaded = load([Prompts(dataset=str(tmp_path), columns={"prompt": "q"}, limit=3)])
    assert [prompt.messages for prompt in loaded.prompts] == [user(f"question {n}") for n in range(3)]
    with pytest.raises(UsageError, match="validation"):
        load([Prompts(dataset=str(tmp_path), split="validation")])


def test_columns_are_mapped_and_a_list_may_stand_in_the_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"question": [{"role": "user", "content": "x"}], "gold": "y", "k": 7}])
    columns = {"prompt": "question", "reference": "gold", "id": "k"}
    assert load([Prompts(path=path, columns=columns)]).prompts == [Prompt("7", user("x"), "", "y")]  # type: ignore[arg-type]


WRONG: list[tuple[Any, str]] = [
    ("{not json", "not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ("[" * 100_000, "nested deeper than 100 levels"),
    ({}, "no 'prompt' and no 'messages'"),
    ({"prompt": "  "}, "message 1: the content is '  ', expected a text"),
    ({"prompt": 3}, "expected a text or a list of messages, got '3'"),
    ({"messages": []}, "expected a text or a list of messages, got '[]'"),
    ({"messages": ["hi"]}, "message 1: expected {role, content}, got 'hi'"),
    ({"messages": [{"role": "human", "content": "hi"}]}, "message 1: the role is 'human', expected one of system"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1: the content is 'None'"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "the last message is of the role 'assistant', expected 'user'",
    ),
    ({"prompt": "a", "reference": ["x"]}, "'reference' is \"['x']\", expected a text"),
    ({"prompt": "b", "tests": {"a": 1}}, "'tests' is"),
    ({"prompt": "c", "tests": [1]}, "'tests' is '[1]', expected a list of texts"),
    ({"prompt": "d \ud83d"}, "half a surrogate pair"),
]


def test_malformed_rows_are_named_by_file_and_line_and_the_others_go_on(tmp_path: Path) -> None:
    good = [{"prompt": f"good {number}"} for number in range(len(WRONG))]
    rows = [row for pair in zip((row for row, _ in WRONG), good, strict=True) for row in pair]
    path = jsonl(tmp_path / "p.jsonl", rows)
    loaded = load([Prompts(path=path)])
    assert [prompt.messages for prompt in loaded.prompts] == [user(row["prompt"]) for row in good]
    assert len(loaded.problems) == len(WRONG)
    for number, ((_, told), problem) in enumerate(zip(WRONG, loaded.problems, strict=True)):
        assert problem.startswith(f"{path}:{2 * number + 1}: ") and told in problem


def test_bytes_that_are_no_text_are_named_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n{"prompt": "a"}\n')
    loaded = load([Prompts(path=path)])
    assert len(loaded.prompts) == 1 and f"{path}:1" in loaded.problems[0]


def test_a_prompt_is_asked_once_and_an_id_is_of_one_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "id": "1"}, {"prompt": "a", "id": "2"}, {"prompt": "b", "id": "1"}, {"prompt": "c"}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    loaded = load([Prompts(path=path), Prompts(path=path, domain="again")])
    assert [prompt.messages for prompt in loaded.prompts] == [user("a"), user("c")]
    assert loaded.repeated == 4
    assert [f"{path}:3: the id '1' is that of another prompt at {path}:1"] * 2 == loaded.problems


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.txt").touch()
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    table = pa.table({"promt": ["a"]})
    parquet.write_table(table, tmp_path / "named.parquet")
    for name, told in (
        ("p.txt", r"\.jsonl"),
        ("none.jsonl", "No such file"),
        ("none.parquet", "No such file"),
        ("p.parquet", "Can't read"),
        ("named.parquet", "no column 'prompt' or 'messages'; it has promt. Did you mean 'promt'"),
    ):
        with pytest.raises(UsageError, match=told):
            load([Prompts(path=tmp_path / name)])


def test_a_system_message_comes_first_and_an_empty_one_not_at_all() -> None:
    asked = (Message(role="user", content="one?"),)
    assert with_system(asked, "Be brief.") == (Message(role="system", content="Be brief."), *asked)
    assert with_system(asked, "") == with_system(asked, None) == asked


def test_a_prompt_s_own_system_message_takes_the_place_of_another_and_that_is_told() -> None:
    asked = (Message(role="user", content="one?"),)
    own = (Message(role="system", content="In French."), *asked)
    assert with_system(own, "Be brief.") == with_system(own, None) == own
    prompts = [Prompt("a", own), Prompt("b", asked), Prompt("c", own)]
    said = "2 of 3 prompts have system messages of their own, in place of `system`"
    assert own_systems(prompts, "Be brief.") == said
    assert (
        own_systems(prompts[:2], "Be brief.") == "1 of 2 prompts has a system message of its own, in place of `system`"
    )
    assert own_systems(prompts[1:2], "Be brief.") is own_systems(prompts, None) is None
