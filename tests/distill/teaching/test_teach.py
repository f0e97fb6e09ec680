"""The stage `teach`: rows to distributions, in process and behind servers, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_lite.answers import server
from mergekit_lite.answers.loading import tokenizer_of
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.answers.template import ChatTemplate, Tokens
from mergekit_lite.distillation.teach import teach
from mergekit_lite.distillation.teaching import shard
from mergekit_lite.distillation.teaching.asked import Asked
from mergekit_lite.distillation.teaching.encoding import decode, encode
from mergekit_lite.distillation.teaching.files import TaughtFile
from mergekit_lite.distillation.teaching.rows import TaughtRow, row_key
from mergekit_lite.distillation.teaching.scoring import Said
from mergekit_lite.errors import RunError, UsageError
from tests.causal import causal_model
from tests.distill.recipes import recipe, write_recipe
from tests.distill.teaching.made import same
from tests.distill.teaching.scoring_server import Scoring, scoring_server
from tests.distill.teaching.test_scoring import MODEL, TOKENIZER, TOP, plainly
from tests.processes import preload, run, started

preload("httpx2", "mergekit_lite.distillation.teach", "transformers.models.llama.modeling_llama")

FUSE = {"fuse": {"learning_rate": 1e-5, "objective": "alm"}}


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    warn = line

    def table(self, headings: Any, rows: Any) -> None:
        self.lines += [" | ".join(row) for row in rows]

    def progress(self, what: str, total: int, done: int = 0) -> Any:
        from contextlib import nullcontext

        self.lines.append(f"{what}: {done} of {total}")
        return nullcontext(lambda more, note="": None)


def sft_rows(number: int, domain: str = "") -> list[dict[str, Any]]:
    draw = random.Random(number)
    words = ["one", "two", "three", "four", "helpful", "What is", "naïve 🙂"]
    return [
        {
            "prompt": f"p{n}",
            "domain": domain or ("maths" if n % 2 else "chat"),
            "messages": [{"role": "user", "content": f"question {n}"}],
            "response": " ".join(draw.choices(words, k=draw.randrange(1, 9))),
            "cut": n % 5 == 4,
        }
        for n in range(number)
    ]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    MODEL.save_pretrained(tmp_path / "strong")
    TOKENIZER.save_pretrained(tmp_path / "strong")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    write_rows(tmp_path / "out" / "pairs" / "sft.jsonl", sft_rows(12))
    return tmp_path


def strong(**changes: Any) -> dict[str, Any]:
    return {"name": "strong", "model": "./strong", "top": TOP, **changes}


def taught(place: Path, *teachers: dict[str, Any], **how: Any) -> Heard:
    heard = Heard()
    teach(recipe(place, teachers=list(teachers) or [strong()], train=FUSE), heard, **how)  # type: ignore[arg-type]
    return heard


def expected(row: dict[str, Any], top: int = TOP) -> TaughtRow:
    tokens = ChatTemplate(TOKENIZER).tokens(row["messages"], row["response"], cut=row["cut"])
    key = row_key(row["messages"], row["response"], cut=row["cut"])
    return TaughtRow(key, np.array(tokens.response, np.int32), np.zeros(0, np.int32), *plainly(tokens, top))


def test_what_a_model_says_of_every_row(place: Path) -> None:
    heard = taught(place, strong(batch_size=3))
    file = TaughtFile(place / "out" / "teach" / "strong")
    assert len(file) == 12
    for row in sft_rows(12):
        right = expected(row)
        found = file.get(right.key)
        assert found is not None
        assert (found.tokens == right.tokens).all()
        assert found.log_probs == pytest.approx(right.log_probs, abs=1e-4)
        assert np.allclose(found.top_log_probs, right.top_log_probs, atol=5e-3)
        size = len(row["response"].encode())
        assert found.ends[-1] == (size if row["cut"] else size + 1)
    assert any(line.startswith("strong | 12 | ") for line in heard.lines)


def test_only_what_is_missing_is_asked(place: Path) -> None:
    taught(place)
    before = {path.name: path.read_bytes() for path in (place / "out" / "teach" / "strong").glob("*.taught")}
    write_rows(place / "out" / "pairs" / "sft.jsonl", [*sft_rows(12)[::-1], sft_rows(14, "more")[13]])
    heard = taught(place)
    assert "strong: 12 of 13" in heard.lines
    file = TaughtFile(place / "out" / "teach" / "strong")
    assert len(file) == 13
    for name, content in before.items():
        assert (file.folder / name).read_bytes().startswith(content)


def test_a_teacher_of_one_domain(place: Path) -> None:
    taught(place, strong(domains=["maths"]), strong(name="chat-only", domains=["chat"], top=0))
    keys = {row["domain"]: set() for row in sft_rows(2)}  # type: ignore[var-annotated]
    for row in sft_rows(12):
        keys[row["domain"]].add(row_key(row["messages"], row["response"], cut=row["cut"]))
    assert set(TaughtFile(place / "out" / "teach" / "strong").keys()) == keys["maths"]
    chat = TaughtFile(place / "out" / "teach" / "chat-only")
    assert set(chat.keys()) == keys["chat"]
    assert next(iter(chat)).top_ids.shape[1] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"top": 5}, "top: was 12, is 5"), ({"system": "Be kind."}, "system: was None, is 'Be kind.'")],
)
def test_another_way_is_refused(place: Path, changes: dict[str, Any], said: str) -> None:
    taught(place)
    with pytest.raises(UsageError, match=said):
        taught(place, strong(**changes))


def test_a_model_or_tokenizer_that_changed_is_refused(place: Path) -> None:
    taught(place)
    causal_model(layers=1).save_pretrained(place / "strong")
    with pytest.raises(UsageError, match="model: was"):
        taught(place)
    other = tokenizer_of(str(place / "strong"))
    other.add_tokens(["twentytwo"])
    other.save_pretrained(place / "strong")
    with pytest.raises(UsageError, match="tokenizer: was"):
        taught(place)


def test_weights_that_changed_alone_are_refused(place: Path) -> None:
    """A model trained on has files of the same sizes."""
    taught(place)
    causal_model(seed=1).save_pretrained(place / "strong")
    with pytest.raises(UsageError, match="model: was"):
        taught(place)


def test_all_problems_at_once(place: Path) -> None:
    (place / "empty").mkdir()
    TOKENIZER.save_pretrained(place / "bare")
    MODEL.config.save_pretrained(place / "bare")
    with pytest.raises(UsageError) as refused:
        taught(place, strong(model="./nowhere"), strong(name="b", model="./empty"), strong(name="c", model="./bare"))
    assert "c: " in str(refused.value) and "bare has no weights" in str(refused.value)
    assert "nowhere is no folder" in str(refused.value) and "b: Can't load the model" in str(refused.value)
    assert not (place / "out" / "teach").exists()


def test_what_damage_has_lost_is_told_and_asked_again(place: Path) -> None:
    taught(place)
    path = place / "out" / "teach" / "strong" / "00000.taught"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 255]) + content[101:])
    lines = taught(place).lines
    assert any("bytes are no whole row" in line for line in lines) and "strong: 0 of 12" in lines
    assert path.read_bytes() == content


def test_rows_that_can_not_be_taught_are_told(place: Path) -> None:
    rows = sft_rows(12)
    rows[3]["response"] = "an <|im_end|> inside"
    rows[4]["messages"] = [{"role": "user", "content": "one " * 4000}]
    rows[5] = {"messages": "none", "response": 3}
    write_rows(place / "out" / "pairs" / "sft.jsonl", rows)
    heard = "\n".join(taught(place).lines)
    assert "2 rows left out" in heard and "holds the token that ends turns" in heard
    assert "longer than the 2,048 tokens" in heard
    assert "sft.jsonl:6" in heard
    assert len(TaughtFile(place / "out" / "teach" / "strong")) == 9


def test_an_empty_response_is_told(place: Path) -> None:
    """A text without a template is nothing where it was cut before its first token."""
    plain = tokenizer_of(str(place / "strong"))
    plain.chat_template = None
    plain.save_pretrained(place / "strong")
    (place / "strong" / "chat_template.jinja").unlink(missing_ok=True)
    rows = sft_rows(3)
    rows[1] |= {"response": "", "cut": True}
    write_rows(place / "out" / "pairs" / "sft.jsonl", rows)
    assert "1 row left out: the response is empty" in "\n".join(taught(place).lines)


def test_likely_tokens_beyond_the_vocabulary_are_left_to_the_tail() -> None:
    """A server's head may be wider than its tokenizer, and that is all there is here."""
    asked = Asked("0" * 32, Tokens((1,), (2, 3)), np.array([1, 2], np.int32))
    values = np.log(np.array([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]], np.float32))
    ids = np.array([[2, 900, 1], [4, 3, 0]], np.int32)
    row = asked.taught(Said(np.array([-0.7, -1.4], np.float32), ids, values), 5)
    assert isinstance(row, TaughtRow)
    assert row.top_ids.tolist() == [[2, 1, 0], [4, 3, 0]]
    assert np.exp(row.top_log_probs).tolist() == [[0.5, 0.125, 0], [0.5, 0.25, 0.125]]
    assert np.exp(decode(encode(row, 5), row.key).top_log_probs).sum(1) == pytest.approx([0.625, 0.875], abs=1e-3)
    for value, why in ((np.nan, "is NaN"), (-np.inf, "is impossible")):
        assert why in str(asked.taught(Said(np.array([-0.7, value], np.float32), ids, values), 5))
    narrow = asked.taught(Said(np.array([-0.7, -1.4], np.float32), ids % 4, values), 2)
    assert isinstance(narrow, TaughtRow) and narrow.top_ids.shape == (2, 2)


def test_nothing_to_teach(place: Path) -> None:
    with pytest.raises(RunError, match="no row is of its domains"):
        taught(place, strong(domains=["none"]))
    (place / "out" / "pairs" / "sft.jsonl").unlink()
    with pytest.raises(UsageError, match="run the stage `pair` first"):
        taught(place)


def test_a_server_says_what_the_model_here_says(place: Path) -> None:
    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm")) as fake:
        taught(place, strong(), strong(name="served", server=fake.url, served_model="big"))
    here, there = (TaughtFile(place / "out" / "teach" / name) for name in ("strong", "served"))
    assert there.settings["served"] == "big"
    for row in here:
        other = there.get(row.key)
        assert other is not None
        assert (other.tokens == row.tokens).all() and (other.ends == row.ends).all()
        assert other.log_probs == pytest.approx(row.log_probs, abs=1e-4)
        assert np.allclose(np.sort(other.top_log_probs), np.sort(row.top_log_probs), atol=5e-3)


def test_rows_that_a_server_loses_are_asked_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)
    broken = {3, 4, 5, 6}
    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm", lambda n: 503 if n in broken else None)) as fake:
        served = strong(server=fake.url, retries=0, concurrency=1)
        with pytest.raises(RunError, match=r"strong: 4 of 12\. HTTP 503 \(4×\)[\s\S]*The same command goes on"):
            taught(place, served)
        assert len(TaughtFile(place / "out" / "teach" / "strong")) == 8
        broken.clear()
        taught(place, served)
    assert len(TaughtFile(place / "out" / "teach" / "strong")) == 12
    assert sum(1 for ids, times in fake.scored.items() if times > 1) <= 1  # probes


def test_killed_and_resumed_it_asks_only_for_what_is_missing(place: Path) -> None:
    """Real kills of the command, while a server drops a third of the calls."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    rows = sft_rows(30)
    write_rows(place / "out" / "pairs" / "sft.jsonl", rows)

    goal = draw.randrange(2, 20)
    killed = threading.Event()

    def mood(request: int) -> str | None:
        if len(fake.scored) >= goal:
            killed.wait(60)  # so that it is killed amid its work, however slow this process is
        return "drop" if draw.random() < 0.3 else None

    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm", mood)) as fake:
        served = strong(server=fake.url, concurrency=3, api_key_variable="KEY", retries=20)
        path = write_recipe(place, teachers=[served], train=FUSE)
        key = partial(use_key, "s3cret-key")
        with started(place, "distill", "teach", path, before=key) as process:
            until = time.monotonic() + 600
            while process.running and len(fake.scored) < goal and time.monotonic() < until:
                time.sleep(0.01)
            process.send(signal.SIGKILL)
            assert process.end().returncode == -signal.SIGKILL
        killed.set()
        ended = run(place, "distill", "teach", path, before=key)
        assert ended.returncode == 0, ended.stderr
    file = TaughtFile(place / "out" / "teach" / "strong")
    for row in rows:
        right = expected(row)
        found = file.get(right.key)
        assert found is not None and found.log_probs == pytest.approx(right.log_probs, abs=1e-4)
    assert sum(fake.scored.values()) - len(fake.scored) <= 7  # those in flight, and probes
    for each in (place / "out").rglob("*"):
        assert not each.is_file() or b"s3cret-key" not in each.read_bytes()
    assert "s3cret-key" not in ended.stdout + ended.stderr


def use_key(key: str) -> None:
    os.environ["KEY"] = key
    server.FIRST_WAIT = 0.02


def test_inspect_tells_what_is_there(place: Path) -> None:
    taught(place)
    shown = run(place, "inspect", place / "out" / "teach" / "strong", "--json")
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout)
    file = TaughtFile(place / "out" / "teach" / "strong")
    whole = [row.log_probs for row in file]
    assert (facts["rows"], facts["top"], facts["tokens"]) == (12, TOP, sum(map(len, whole)))
    assert facts["cross_entropy"] == pytest.approx(-np.concatenate(whole).mean(), rel=1e-5)
    text = run(place, "inspect", place / "out" / "teach" / "strong").stdout
    assert "cross entropy" in text and "bytes a token" in text


@pytest.mark.parametrize("content", [b"{", b'{"format": 1}', b'{"format": 9, "vocabulary": 3, "top": 1}', b"\xff\xfe"])
def test_inspect_of_a_broken_folder_is_one_line(place: Path, content: bytes) -> None:
    taught(place)
    (place / "out" / "teach" / "strong" / "teacher.json").write_bytes(content)
    shown = run(place, "inspect", place / "out" / "teach" / "strong")
    assert shown.returncode == 1 and "Traceback" not in shown.stderr
    assert len(shown.stderr.strip().splitlines()) <= 3


def test_the_key_of_a_row_is_that_of_its_text(place: Path) -> None:
    """The same row under another shard's number is the same bytes but for its place."""
    taught(place)
    file = TaughtFile(place / "out" / "teach" / "strong")
    row = next(iter(file))
    again = shard.record_of(row, file.settings["vocabulary"])
    assert encode(row, file.settings["vocabulary"]) in again
    assert same(row, file.get(row.key))  # type: ignore[arg-type]
