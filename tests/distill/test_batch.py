"""Batches: requests written, results read in any order, and whatever else a file may hold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mergekit_lite.answers.rows import write_rows
from tests.answers.fake_server import answer_to
from tests.distill.recipes import write_recipe
from tests.distill.test_sample import invoke

PROMPTS = [{"id": f"maths/{n}", "prompt": f"question {n}"} for n in range(6)]


def place(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "target").mkdir(exist_ok=True)
    write_rows(folder / "prompts.jsonl", PROMPTS)
    source = {"name": "a", "model": "m", "server": "http://127.0.0.1:9/v1", "samples": 2, "system": "Be brief."}
    return write_recipe(folder, **{"sources": [source | {"sampling": {"top_k": 3}}], **changes})


def result(request: dict[str, Any]) -> dict[str, Any]:
    body = request["body"]
    said = answer_to(body["messages"][-1]["content"], body["seed"])
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    reply = {"choices": [choice], "usage": {"completion_tokens": 3}}
    return {
        "id": "b",
        "custom_id": request["custom_id"],
        "response": {"status_code": 200, "body": reply},
        "error": None,
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_requests_go_out_and_results_come_back_in_any_order(tmp_path: Path) -> None:
    recipe, out, back = place(tmp_path), tmp_path / "out.jsonl", tmp_path / "back.jsonl"
    code, told, _ = invoke("sample", recipe, "--write-batch", out)
    assert code == 0 and "12 requests" in told
    requests = rows(out)
    assert requests[3]["custom_id"] == "maths/1/1" and requests[3]["url"] == "/v1/chat/completions"
    assert requests[3]["body"]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert requests[3]["body"]["top_k"] == 3 and "min_p" not in requests[3]["body"]
    assert len({request["body"]["seed"] for request in requests}) == 12
    results = [result(request) for request in requests]
    random.shuffle(results)
    bad: list[Any] = [
        results[0] | {"response": None, "error": {"code": "batch_expired", "message": "too\x1b[2J late"}},
        results[1] | {"response": {"status_code": 500, "body": {"error": {"message": "oh"}}}},
        results[2] | {"response": {"status_code": 200, "body": {"choices": [7]}}},
        results[3] | {"response": [1]},
        results[4] | {"custom_id": "../../other/0"},
        results[5] | {"custom_id": ["maths/1/1"]},
        [1, 2],
    ]
    write_rows(back, [*bad, *results[7:]])
    with back.open("a") as file:
        file.write('{"custom_id": \n' + "[" * 50_000 + "\n" + json.dumps(results[8]) + "\n")
    code, told, error = invoke("sample", recipe, "--read-batch", back, "--source", "a")
    assert code == 0 and "5 answers read, 7 still missing" in told
    for why in ("late", "HTTP 500: oh", "can't be read", "no reply", "no request of this source", "there already"):
        assert why in error, error
    assert "back.jsonl:6" in error and "back.jsonl:7" in error and "\x1b" not in error
    assert not (tmp_path / "out" / "samples" / "a.jsonl").exists()
    code, told, _ = invoke("sample", recipe, "--write-batch", tmp_path / "again.jsonl")
    assert code == 0 and "7 requests" in told
    missing = {request["custom_id"]: request for request in rows(tmp_path / "again.jsonl")}
    assert missing.keys() == {each["custom_id"] for each in results[:7]}
    write_rows(back, results[:7])
    code, told, _ = invoke("sample", recipe, "--read-batch", back)
    assert code == 0 and "7 answers read, 0 still missing" in told
    found = rows(tmp_path / "out" / "samples" / "a.jsonl")
    assert [f"{row['prompt']}/{row['index']}" for row in found] == [request["custom_id"] for request in requests]
    said = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in results}
    assert all(row["text"] == said[f"{row['prompt']}/{row['index']}"] and row["tokens"] == 3 for row in found)
    assert invoke("sample", recipe)[0] == 0  # nothing is left to ask for


def test_a_batch_is_one_sources_and_overwrites_nothing(tmp_path: Path) -> None:
    url = {"model": "m", "server": "http://127.0.0.1:9/v1"}
    recipe = place(tmp_path, sources=[{"name": "a", **url}, {"name": "b", **url}, {"name": "c", "model": "./target"}])
    out = tmp_path / "out.jsonl"
    for more, said in (((), "with --source"), (("--source", "c"), "a, b"), (("--source", "B"), "There are: a, b")):
        code, _, error = invoke("sample", recipe, "--write-batch", out, *more)
        assert code == 2 and said in error and not out.exists(), error
    out.write_text("mine")
    code, _, error = invoke("sample", recipe, "--write-batch", out, "--source", "a")
    assert code == 2 and "exists already" in error and out.read_text() == "mine"
    assert invoke("sample", recipe, "--source", "a")[0] == 2
    assert invoke("sample", recipe, "--write-batch", out, "--read-batch", out)[0] == 2
