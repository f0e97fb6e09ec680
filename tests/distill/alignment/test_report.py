"""How two tokenizers meet, in numbers counted by hand and by a second implementation; and the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.report import Share, compared, count
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.alignment.texts import SAMPLES, Response, responses_of
from mergekit_lite.errors import UsageError
from tests.distill.alignment.ten_tokenizers import tokenizer
from tests.tokenizers import TEMPLATES


def test_shares_counted_by_hand() -> None:
    shares = {kind: Share() for kind in ("1:1", "1:n", "n:1", "n:m", "alone")}
    count(groups([0, 1, 6, 9, 12, 15, 16], [1, 5, 6, 7, 9, 11, 13, 15, 17]), shares)
    # 1 | 6 = 5 6 | 9 = 7 9 | 12 15 = 11 13 15 | beyond; one before the text
    assert shares["1:1"] == Share(1, 1, 1)
    assert shares["1:n"] == Share(2, 2, 4)
    assert shares["n:1"] == Share()
    assert shares["n:m"] == Share(1, 2, 3)
    assert shares["alone"] == Share(0, 2, 1)


def test_shares_are_those_of_each_text_by_itself() -> None:
    own, other = tokenizer("llama-3", TEMPLATES["chatml"]), tokenizer("gemma")
    report = compared(
        ("a", own), ("b", other), [Response(({"role": "user", "content": "?"},), text) for text in SAMPLES]
    )
    expected: Counter[str] = Counter()
    for text in SAMPLES:
        ends = [
            [
                *(response_ends(each, each(text, add_special_tokens=False)["input_ids"], text) or ()),
                len(text.encode()) + 1,
            ]
            for each in (own, other)
        ]
        for cut in sorted(set(ends[0]) & set(ends[1]) - {0}):
            before = max((end for end in set(ends[0]) & set(ends[1]) if end < cut), default=0)
            student, teacher = (sum(before < end <= cut for end in side) for side in ends)
            expected[("1" if student == 1 else "n") + (":1" if teacher == 1 else ":n" if student == 1 else ":m")] += 1
            assert student and teacher
    expected["n:1"] = expected.pop("n:1", 0)
    assert {kind: report.shares[kind].groups for kind in ("1:1", "1:n", "n:1", "n:m")} == dict(expected)
    assert report.aligned == report.texts == len(SAMPLES)
    assert report.bytes == sum(len(text.encode()) for text in SAMPLES)
    assert (report.student.digits, report.teacher.digits) == (3, 4)


def saved(folder: Path) -> list[str]:
    for name in ("llama-3", "bert-uncased"):
        tokenizer(name, TEMPLATES["chatml"]).save_pretrained(folder / name)
    return [str(folder / "llama-3"), str(folder / "bert-uncased")]


def test_the_command_tells_shares_and_what_is_left_out(tmp_path: Path) -> None:
    models = saved(tmp_path)
    texts = tmp_path / "texts.jsonl"
    rows = [
        {"text": "the cat sat"},
        {"messages": [{"role": "user", "content": "?"}], "response": "The cat"},
        {"prompt": "What?", "completion": "it is"},
    ]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = CliRunner().invoke(main, ["tokenizer", "align", *models, str(texts), "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert report["texts"] == 3 and report["aligned"] == 2
    assert report["student"]["refused"] == {}
    assert sum(report["teacher"]["refused"].values()) == 1  # upper case
    assert report["bytes"] == len("the cat sat") + len("it is")
    run = CliRunner().invoke(main, ["tokenizer", "align", *models, str(texts)])
    assert run.exit_code == 0
    assert "2 texts of 3 aligned" in run.output and "OTHER: 1 text left out: the tokens spell another" in run.output


def test_texts_come_in_paragraphs_or_rows_and_errors_are_told(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("One.\nStill one.\n\n\nTwo.\n\nThree")
    assert [response.text for response in responses_of(book)] == ["One.\nStill one.\n\n\n", "Two.\n\n", "Three"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"nothing": 1}\n[]\n')
    with pytest.raises(UsageError) as error:
        list(responses_of(bad))
    assert "bad.jsonl:2" in str(error.value) and "bad.jsonl:3" in str(error.value)
    missing = CliRunner().invoke(main, ["tokenizer", "align", *saved(tmp_path), str(tmp_path / "none.txt")])
    assert missing.exit_code == 2 and "none.txt" in missing.output
    (tmp_path / "empty.jsonl").write_text("\n")
    empty = CliRunner().invoke(main, ["tokenizer", "align", *saved(tmp_path), str(tmp_path / "empty.jsonl")])
    assert empty.exit_code == 2 and "empty.jsonl has no texts" in empty.output
    assert CliRunner().invoke(main, ["tokenizer", "align", str(tmp_path), str(tmp_path)]).exit_code == 1
