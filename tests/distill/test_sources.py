"""Sources in all their ways: servers that are started, several answers a request, vLLM; and what is told of answers."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.rows import Answer, Prompt, seed_of, write_rows
from mergekit_lite.distillation import remarks as remarks_module
from mergekit_lite.distillation.remarks import remarks
from tests.answers.fake_server import Fake, answer_to, fake_server
from tests.answers.test_local import write_model
from tests.distill.recipes import recipe, write_recipe
from tests.distill.test_sample import impatient, invoke, rows
from tests.processes import preload, started
from tests.waiting import is_gone

preload("httpx2", "mergekit_lite.distillation.sample")

__all__ = ["impatient"]  # a fixture of every test
SERVER = f"{sys.executable} {Path(__file__).with_name('serving.py')} {{model}} {{port}}"


def place(folder: Path, prompts: int = 6, **source: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("target", "model"):
        (folder / name).mkdir(exist_ok=True)
    write_rows(folder / "prompts.jsonl", [{"id": f"p{n}", "prompt": f"question {n}"} for n in range(prompts)])
    return write_recipe(folder, sources=[{"name": "a", "model": "m", "samples": 3} | source])


def samples(folder: Path) -> list[dict[str, Any]]:
    return rows(folder / "out" / "samples" / "a.jsonl")


# A server that is started.


def test_a_server_is_started_asked_and_ended_with_its_children(tmp_path: Path) -> None:
    path = place(tmp_path, model="./model", serve=f"{SERVER} child", concurrency=4)
    code, _, error = invoke("sample", path)
    assert code == 0, error
    assert samples(tmp_path)[4]["text"] == f"served model: question 1 {seed_of(0, 'a', 'p1', 1)}"
    assert (tmp_path / "out" / "samples" / "a.server.log").read_text() == "ready\n"
    assert is_gone(int((tmp_path / "child").read_text()))
    (tmp_path / "child").unlink()
    assert invoke("sample", path)[0] == 0 and not (tmp_path / "child").exists()  # nothing to ask


@pytest.mark.parametrize("how", ["pinned", "cached", "any"])
def test_a_server_that_does_not_list_its_model_is_asked_by_the_name_it_was_given(tmp_path: Path, how: str) -> None:
    """As `transformers serve` does: it lists the cache of the hub. Some servers load whichever they are asked for."""
    code, _, error = invoke("sample", place(tmp_path, model="./model", serve=f"{SERVER} {how}"))
    assert code == 0, error
    assert samples(tmp_path)[4]["text"] == f"{tmp_path / 'model'}: question 1 {seed_of(0, 'a', 'p1', 1)}"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_server_and_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    path = place(tmp_path, prompts=60, model="./model", serve=f"{SERVER} child", concurrency=1)
    partial = tmp_path / "out" / "samples" / "a.partial.jsonl"
    with started(tmp_path, "distill", "sample", path) as process:
        until = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)
        process.send(how)
        process.end()
    assert is_gone(int((tmp_path / "child").read_text())) and partial.stat().st_size
    assert invoke("sample", place(tmp_path, prompts=60, model="./model", serve=SERVER))[0] == 0
    assert len({row["text"] for row in samples(tmp_path)}) == 180


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    code, _, error = invoke("sample", place(tmp_path, model="./model", serve=f"{SERVER} dies"))
    assert code == 1 and "ended with exit code 1 before it was ready. It said:\n  no GPU here" in error
    began = time.monotonic()
    code, _, error = invoke("sample", place(tmp_path, model="./model", serve=f"{SERVER} later", concurrency=2))
    assert code == 1 and "ended with exit code 3. It said:\n  ready\n  out of memory" in error
    assert "The same command goes on" in error and time.monotonic() - began < 30


def test_the_trained_target_is_served_between_the_turns(tmp_path: Path) -> None:
    path = place(tmp_path)
    with fake_server() as fake:
        own = {"samples": 2, "serve": SERVER}
        more: dict[str, Any] = {"pairs": {"rule": "wrpo", "score": "right"}, "target_source": own}
        sources = [{"name": "a", "model": "m", "samples": 3, "server": fake.url}]
        path = write_recipe(tmp_path, sources=sources, **more)
        code, _, error = invoke("sample", path)
        assert code == 0, error
        write_rows(tmp_path / "out" / "pairs" / "target.jsonl", [{"prompt": "p4", "domain": ""}])
        (tmp_path / "out" / "train" / "sft").mkdir(parents=True)
        (tmp_path / "out" / "train" / "sft" / "config.json").write_text("{}")
        code, _, error = invoke("sample", path)
        assert code == 0, error
    texts = [row["text"] for row in rows(tmp_path / "out" / "samples" / "target.jsonl")]
    assert len(texts) == 2 and all(text.startswith("served sft: question 4") for text in texts)


# What a recipe may not say.


WRONG = [
    ({"serve": "vllm serve {model}"}, "'vllm serve {model} --port {port}'"),
    ({"serve": "vllm 'serve {model} {port}"}, "No closing quotation"),
    ({"serve": SERVER, "server": "http://x/v1"}, "give one of them"),
    ({"serve": SERVER, "batch_size": 4}, "'batch_size' has no effect"),
    ({"server": []}, "an empty list"),
    ({"server": ["http://x/v1", "http://x/v1"]}, "listed twice"),
    ({"server": ["http://x/v1", "localhost:8000"]}, "'localhost:8000' is no URL"),
    ({"server": "http://me:secret@x/v1"}, "URLs are shown and logged"),
    ({"one_request": True}, "'one_request' has no effect"),
    ({"sampling": {"extra_body": {"a": 1}}}, "'extra_body' has no effect"),
    ({"sampling": {"presence_penalty": 1}}, "'presence_penalty' has no effect"),
    ({"server": "http://x/v1", "sampling": {"extra_body": {"top_k": 1}}}, "say it there"),
    ({"server": "http://x/v1", "sampling": {"extra_body": {"n": 2}}}, "each request sets by itself"),
    ({"server": "http://x/v1", "sampling": {"top_k": 0}}, "top_k"),
    ({"server": "http://x/v1", "sampling": {"stop": []}}, "stop"),
    ({"engine_options": {"seed": 1}}, "'engine_options' has no effect"),
    ({"engine": "vllm", "engine_options": {"trust_remote_code": True}}, "never run in this process"),
    ({"engine": "vllm", "batch_size": 3}, "vLLM decides that itself"),
]


@pytest.mark.parametrize(("source", "said"), WRONG, ids=[said for _, said in WRONG])
def test_contradictions_are_told_before_anything_is_asked(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    code, _, error = invoke("run", place(tmp_path, **source), "--dry-run")
    assert code == 2 and said in error, error


def test_programs_that_are_not_there_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    for source, said in (
        ({"model": "./model", "serve": "no-such-program {model} {port}"}, "no program 'no-such-program'"),
        ({"model": "./model", "engine": "vllm"}, "vLLM is not installed"),
    ):
        code, _, error = invoke("sample", place(tmp_path, **source))
        assert code == 2 and said in error and not (tmp_path / "out").exists()


# Several answers to one request.


def several_of(number: int) -> str:
    """What the fake says to the second prompt when all three answers are asked for at once."""
    return answer_to("question 1", seed_of(0, "a", "p1", 0) + number)


def test_all_answers_of_a_prompt_come_by_one_request_wherever_a_run_was_stopped(tmp_path: Path) -> None:
    with fake_server() as fake:
        path = place(tmp_path, server=fake.url, one_request=True)
        assert invoke("sample", path)[0] == 0
        assert fake.asked.total() == 6 and {body["n"] for body in fake.bodies} == {3}
        whole = samples(tmp_path)
        assert [row["text"] for row in whole[3:6]] == [several_of(number) for number in range(3)]
        finished = tmp_path / "out" / "samples" / "a.jsonl"
        (finished.with_name("a.partial.jsonl")).write_text("".join(json.dumps(row) + "\n" for row in whole[:4]))
        finished.unlink()
        fake.bodies.clear()
        assert invoke("sample", path)[0] == 0
        assert len(fake.bodies) == 5 and samples(tmp_path) == whole
        code, _, error = invoke("sample", place(tmp_path, server=fake.url))
        assert code == 2 and "one_request: was True" in error


@pytest.mark.parametrize("refused", [False, True])
def test_a_server_that_gives_one_answer_is_asked_for_each(tmp_path: Path, refused: bool) -> None:
    refuses = lambda body: "n > 1 is not supported" if refused and "n" in body else None  # noqa: E731
    with fake_server(Fake(several=False, refuses=refuses)) as fake:
        code, _, error = invoke("sample", place(tmp_path, server=fake.url, one_request=True, concurrency=1))
    assert code == 0 and error.count("each is asked for by itself") == 1
    assert fake.asked.total() == 1 + 18
    expected = [answer_to(f"question {n // 3}", seed_of(0, "a", f"p{n // 3}", n % 3)) for n in range(18)]
    assert [row["text"] for row in samples(tmp_path)] == expected


# What is told of answers.


def test_answers_that_are_all_alike_are_told_while_they_come_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remarks_module, "ENOUGH", 5)
    with fake_server(Fake(say=lambda text, seed: text)) as fake:
        code, _, error = invoke("sample", place(tmp_path, prompts=9, server=fake.url, concurrency=1))
        assert code == 0 and "a: 5 of 5 prompts got identical answers at temperature 0.8: the server may ig" in error
        assert "a: 9 of 9 prompts got identical answers" in error and "do_sample" in error
        assert error.count("identical") == 2
        greedy = place(tmp_path / "greedy", server=fake.url, sampling={"temperature": 0})
        assert "identical" not in invoke("sample", greedy)[2]
    with fake_server() as fake:
        assert "identical" not in invoke("sample", place(tmp_path / "drawn", server=fake.url))[2]


def test_budgets_spent_on_thoughts_are_counted_and_not_asked_again(tmp_path: Path) -> None:
    fake = Fake(lambda text, before: "none", thoughts=lambda text: "hm")
    with fake_server(fake):
        path = place(tmp_path, server=fake.url)
        prompts = [{"id": f"p{n}", "prompt": f"a long question {n}"} for n in range(6)]
        write_rows(tmp_path / "prompts.jsonl", prompts)
        code, _, error = invoke("sample", path)
        assert code == 0 and "a: 18 answers of 18 spent all tokens on thoughts" in error
        assert "raise max_tokens (2,048)" in error and fake.asked.total() == 18
        assert invoke("sample", path)[0] == 0 and fake.asked.total() == 18
    row = samples(tmp_path)[0]
    assert (row["text"], row["finish"], row["thoughts"]) == ("", "length", "hm")


def test_what_is_told_at_the_end(tmp_path: Path) -> None:
    source = recipe(tmp_path).sources[0]
    texts = [("a", "length"), ("b", "stop"), ("<think> x", "length"), ("<think>x</think> y", "length"), ("", "stop")]
    told = list(remarks(source, ({"prompt": "p", "text": text, "finish": finish} for text, finish in texts)))
    assert [line.split(":")[1].strip() for line in told] == [
        "1 answer of 5 spent all tokens on thoughts and said nothing",
        "2 answers of 5 cut at max_tokens (2,048)",
    ]


def test_equal_answers_after_thoughts_that_differ_are_not_alike(tmp_path: Path) -> None:
    source = recipe(tmp_path).sources[0]
    tasks = [Task(Prompt(f"p{n}", ()), index, 0) for n in range(3) for index in range(2)]
    for apart in (True, False):
        answers = [
            Answer(each.prompt.id, "a", each.index, "4", "stop", thoughts=str(each.index))
            if apart
            else Answer(each.prompt.id, "a", each.index, f"<think>{each.index}</think>4", "stop")
            for each in tasks
        ]
        likeness = remarks_module.Likeness(source, tasks, [each.key for each in tasks])
        assert [likeness.remark(answer) for answer in answers] == [None] * 6
        assert (likeness.complete, likeness.alike) == (3, 0)
        assert not list(remarks(source, [answer.as_row() for answer in answers]))


# vLLM's offline engine: its documented interface, by a module of our own.


def fake_vllm(made: list[Any]) -> ModuleType:
    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        def __init__(self, **how: Any) -> None:
            made.append(how)

        def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
            assert len(prompts) == len(sampling_params) and not use_tqdm
            made.extend(sampling_params)
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=f"{settings.seed} {len(prompt['prompt_token_ids'])}",
                                                         finish_reason="length", token_ids=[1, 2])])
                for prompt, settings in zip(prompts, sampling_params, strict=True)
            ]  # fmt: skip

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    return module


def test_vllm_answers_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm(made))
    monkeypatch.setattr("mergekit_lite.answers.asked_model.is_installed", lambda: True)
    write_model(tmp_path / "model")
    sampling = {"top_k": 4, "max_tokens": 9, "stop": ["\n"], "presence_penalty": 0.5}
    how = {"engine": "vllm", "engine_options": {"tensor_parallel_size": 2}, "dtype": "bfloat16", "sampling": sampling}
    code, _, error = invoke("sample", place(tmp_path, model="./model", **how))
    assert code == 0, error
    llm, *settings = made
    assert llm == {
        "model": str(tmp_path / "model"), "trust_remote_code": False, "tensor_parallel_size": 2, "dtype": "bfloat16"
    }  # fmt: skip
    assert len(settings) == 18 and settings[0].top_k == 4 and settings[0].stop == ["\n"]
    assert settings[0].presence_penalty == 0.5 and settings[0].max_tokens == 9 and not hasattr(settings[0], "min_p")
    row = samples(tmp_path)[4]
    assert row["text"].startswith(f"{seed_of(0, 'a', 'p1', 1)} ") and (row["finish"], row["tokens"]) == ("length", 2)
