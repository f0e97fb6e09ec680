"""Prompts that a model draws: behind a server and in this process, killed and resumed, and in a dry run."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import seed_of
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.commands.distill import command
from mergekit_lite.distillation.prompts import read, settled
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.errors import CheckpointError, RunError, UsageError
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import write_model
from tests.distill.recipes import recipe, write_recipe
from tests.distill.test_pair import Heard
from tests.models import tree_bytes
from tests.processes import preload, run, started
from tests.tokenizers import tokenizer

preload("httpx2", "mergekit_lite.answers.local", "transformers.models.llama.modeling_llama")

SAID = (" What is one? ", "", "Solve these:", "What is one?", "What is two?", " \u200b ", "three")


def said(body: dict[str, Any]) -> str:
    return SAID[body["seed"] % len(SAID)]


def written(folder: Path, style: str = "llama-3") -> str:
    tokenizer(style).save_pretrained(folder / style)
    return f"./{style}"


def drawing(folder: Path, url: str, domain: str = "", **keys: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    magpie = {"model": "org/m", "server": url, "number": 40, "tokenizer": written(folder), **keys}
    return recipe(folder, prompts=[{"magpie": magpie, "domain": domain}])


def words(found: list[Any]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in found]


def test_a_server(tmp_path: Path) -> None:
    """Each draw has its own seed; what is kept is counted by hand."""
    with fake_server(Fake(reply=said)) as fake:
        heard = Heard()
        made = drawing(tmp_path, fake.url, "chat", system="Ask me.")
        found = settled(made, heard)
        bodies = list(fake.bodies)
        assert settled(made, Heard()) == found and read(made, Heard(), plan=True) == found
        assert len(fake.bodies) == len(bodies) == 40  # drawn once
    seeds = [seed_of(0, "magpie", "magpie", index) for index in range(40)]
    assert sorted(body["seed"] for body in bodies) == sorted(seeds)
    tokens = tokenizer("llama-3")
    turns = (
        "<|start_header_id|>system<|end_header_id|>\n\nAsk me.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    )
    ends = sorted(
        map(tokens.convert_tokens_to_ids, ("<bos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    )
    for body in bodies:
        del body["seed"]
        assert body == {
            "model": "org/m",
            "prompt": f"<bos>{turns}",
            "temperature": 1.0,
            "top_p": 1.0,
            "stop": ["<|eot_id|>", "\n"],
            "stop_token_ids": ends,
            "max_tokens": 2048,
        }
    drawn = [SAID[seed % len(SAID)].strip() for seed in seeds]
    kept = list(dict.fromkeys(text for text in drawn if text not in ("", "\u200b", "Solve these:")))
    assert words(found) == kept and len(kept) == 3
    assert {(prompt.domain, prompt.plain, len(prompt.messages)) for prompt in found} == {("chat", True, 1)}
    empty, colon = drawn.count("") + drawn.count("\u200b"), drawn.count("Solve these:")
    assert heard.lines == [
        f"magpie: 3 of 40 drawn prompts kept; left out: {empty} empty, {colon} with a colon at the end, "
        f"{40 - empty - colon - 3} drawn before"
    ]
    rows = [json.loads(line) for line in (tmp_path / "out/magpie/magpie.jsonl").read_text().splitlines()]
    assert [row["text"].strip() for row in rows] == drawn


def test_beside_data_and_under_system_messages(tmp_path: Path) -> None:
    """A drawn prompt that the data have comes once; ``systems`` asks each several times."""
    (tmp_path / "p.jsonl").write_text('{"id": "mine", "prompt": "What is two?"}\n')
    with fake_server(Fake(reply=said)) as fake:
        magpie = {"model": "org/m", "server": fake.url, "number": 40, "tokenizer": written(tmp_path)}
        found = read(recipe(tmp_path, prompts=[{"path": "p.jsonl"}, {"magpie": magpie}]), Heard())
        assert found[0].id == "mine" and sorted(words(found)) == ["What is one?", "What is two?", "three"]
        entry = {"magpie": magpie, "systems": {"texts": ["A.", "B."], "each": 2}}
        asked = read(recipe(tmp_path, prompts=[entry]), Heard())
        assert len(asked) == 6 and len({prompt.question for prompt in asked}) == 3 and len(fake.bodies) == 40


def test_servers_that_refuse(tmp_path: Path) -> None:
    with fake_server(Fake(reply=said)) as fake:
        fake.refuses = lambda body: "stop_token_ids is not supported" if "stop_token_ids" in body else None
        heard = Heard()
        assert len(settled(drawing(tmp_path, fake.url), heard)) == 3
        assert heard.warnings == [
            "magpie: the server refuses 'stop_token_ids', which the recipe doesn't set: it is left out"
        ]
        fake.refuses = lambda body: "no such thing" if body["seed"] % 3 == 0 else None
        made = drawing(tmp_path, fake.url, name="b")
        with pytest.raises(RunError, match=r"b: \d+ of 40 prompts can't be drawn; all others are kept. HTTP 400"):
            settled(made, Heard())
        before = len(fake.bodies)
        fake.refuses = lambda body: None
        settled(made, Heard())
        assert 0 < len(fake.bodies) - before < 40


def test_a_first_token_that_servers_put(tmp_path: Path) -> None:
    """Left out of the text, unless the server is told to put none; one that the template lacks is told."""
    tokens = tokenizer("llama-3")
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.bos_token_id)]
    )
    tokens.save_pretrained(tmp_path / "with")
    tokens.chat_template = tokenizer("chatml").chat_template
    tokens.save_pretrained(tmp_path / "without")
    with fake_server(Fake(reply=said)) as fake:
        turn = "<|start_header_id|>user<|end_header_id|>\n\n"
        bare = {"extra_body": {"add_special_tokens": False}}
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("with", {}, turn),
            ("with", bare, f"<bos>{turn}"),
            ("without", {}, "<|im_start|>user\n"),
        ]
        for number, (name, sampling, text) in enumerate(cases):
            heard = Heard()
            settled(drawing(tmp_path / f"{number}", fake.url, tokenizer=str(tmp_path / name), sampling=sampling), heard)
            assert fake.bodies[-1]["prompt"] == text
            assert ["puts <bos> before texts" in told for told in heard.warnings] == [True] * (name == "without")


def test_a_server_that_reads_another_text(tmp_path: Path) -> None:
    """Some put their own chat template around the text, or a first token: their count of tokens tells."""
    with fake_server(Fake(reply=said)) as fake:
        length = len(ChatTemplate(tokenizer("llama-3")).pre_query(None).tokens)
        for more in (0, 1, 7):
            fake.reads = lambda body, more=more: length + more  # type: ignore[misc]
            heard = Heard()
            settled(drawing(tmp_path / f"{more}", fake.url), heard)
            told = [warning for warning in heard.warnings if "a chat template of its own around" in warning]
            assert len(told) == bool(more)
            assert not more or f"read {length + more} tokens, where {length} stand" in told[0]


def test_draws_that_are_all_alike(tmp_path: Path) -> None:
    with fake_server(Fake(reply=lambda body: "What is it？：" if body["seed"] % 2 else "What is it?")) as fake:
        heard = Heard()
        assert words(settled(drawing(tmp_path / "a", fake.url), heard)) == ["What is it?"]
        assert "with a colon at the end" in heard.lines[0] and not heard.warnings
        fake.reply = lambda body: "What is it?"
        assert len(settled(drawing(tmp_path / "b", fake.url), heard)) == 1
        assert len(heard.warnings) == 1 and "nearly all draws are alike: the server may ignore" in heard.warnings[0]


def test_an_end_of_text_that_servers_put(tmp_path: Path) -> None:
    """It is told, unless the server is told to put nothing: then the whole text is sent."""
    tokens = tokenizer("llama-3")
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[(name, tokens.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")],
    )
    tokens.save_pretrained(tmp_path / "ends")
    with fake_server(Fake(reply=said)) as fake:
        for number, sampling in enumerate(({}, {"extra_body": {"add_special_tokens": False}})):
            heard = Heard()
            keys: dict[str, Any] = {"tokenizer": str(tmp_path / "ends"), "sampling": sampling}
            settled(drawing(tmp_path / f"{number}", fake.url, **keys), heard)
            assert ["puts <eos> behind texts" in told for told in heard.warnings] == [True] * (not number)
            assert fake.bodies[-1]["prompt"].startswith("<bos>") == bool(number)


def test_draws_that_can_not_be_used(tmp_path: Path) -> None:
    with fake_server(Fake(reply=said)) as fake:
        with pytest.raises(RunError, match="magpie: no drawn prompt is left"):  # the server cuts what has such a word
            settled(drawing(tmp_path, fake.url, system="long"), Heard())
        with pytest.raises(UsageError, match="drawn in another way:\n  - system: was 'long', is None"):
            settled(drawing(tmp_path, fake.url), Heard())
        with pytest.raises(CheckpointError, match="as `tokenizer`"):
            settled(drawing(tmp_path, fake.url, name="b", model=str(tmp_path / "nowhere"), tokenizer=None), Heard())


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with fake_server(Fake(reply=said)) as fake:
        magpie = {"model": "org/m", "server": fake.url, "number": 40, "tokenizer": written(tmp_path)}
        path = write_recipe(tmp_path, prompts=[{"magpie": magpie}])
        ran = CliRunner().invoke(command, ["run", str(path), "--dry-run"])
        assert ran.exit_code == 0, ran.output
        told = " ".join(ran.output.split())
        assert "magpie: 40 prompts of 40 will be drawn from org/m" in told and "at most 40 are asked" in told
        assert not fake.bodies and not (tmp_path / "out" / "magpie").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def local(folder: Path, model: Path) -> Recipe:
    folder.mkdir(exist_ok=True)
    magpie = {"model": str(model), "number": 22, "batch_size": 4, "sampling": {"max_tokens": 6}, "name": "own"}
    return recipe(folder, prompts=[{"magpie": magpie}])


def test_in_this_process_interrupted_and_resumed(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws, whatever was there; those that the limit cuts are left out."""
    whole, heard = local(tmp_path / "whole", model), Heard()
    found = settled(whole, heard)
    rows = [json.loads(line) for line in (tmp_path / "whole/out/magpie/own.jsonl").read_text().splitlines()]
    ended = [row["text"].strip() for row in rows if row["finish"] == "stop"]
    assert len(rows) == 22 and 0 < len(ended) < 22 and "cut at `max_tokens`" in heard.lines[0]
    assert words(found) == list(dict.fromkeys(text for text in ended if text and not text.endswith(":")))
    assert len({row["text"] for row in rows}) > 5 and not any("\n" in row["text"] for row in rows)
    append, left = Ledger.append, [10]

    def interrupted(self: Ledger[Any], rows: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, rows)

    broken = local(tmp_path / "broken", model)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            settled(broken, Heard())
    partial = tmp_path / "broken/out/magpie/own.partial.jsonl"
    assert partial.read_bytes().count(b"\n") == 10
    assert len(read(broken, Heard(), plan=True)) == 22  # at most
    assert settled(broken, Heard()) == found
    drawn = [tree_bytes(tmp_path / name / "out" / "magpie") for name in ("whole", "broken")]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path) -> None:
    """By the command line: what was written is never asked again."""
    with fake_server(Fake(reply=said)) as fake:
        fake.on_request = lambda text: time.sleep(0.02)

        def place(name: str) -> Path:
            folder = tmp_path / name
            (folder / "target").mkdir(parents=True)
            source = {"name": "a", "model": "m", "server": fake.url, "samples": 1}
            magpie = {
                "model": "org/m",
                "server": fake.url,
                "number": 60,
                "concurrency": 2,
                "tokenizer": written(folder),
            }
            return write_recipe(folder, prompts=[{"magpie": magpie}], sources=[source])

        def drawn(path: Path) -> int:
            partial = path.parent / "out/magpie/magpie.partial.jsonl"
            return partial.read_bytes().count(b"\n") if partial.exists() else 0

        path, until = place("killed"), time.monotonic() + 600
        with started(path.parent, "distill", "sample", path) as process:
            while drawn(path) < 5:
                assert process.running and time.monotonic() < until, "too late"
                time.sleep(0.002)
            process.send(signal.SIGKILL)
            process.end()
        there, before = drawn(path), sum("prompt" in body for body in fake.bodies)
        assert 5 <= there < 60
        ended = run(path.parent, "distill", "sample", path)
        assert ended.returncode == 0, ended.stderr
        assert sum("prompt" in body for body in fake.bodies) - before == 60 - there
    drawn_prompts = [said({"seed": seed_of(0, "magpie", "magpie", index)}) for index in range(60)]
    rows = [json.loads(line) for line in (path.parent / "out/magpie/magpie.jsonl").read_text().splitlines()]
    assert [(row["index"], row["text"].strip()) for row in rows] == [
        (index, text.strip()) for index, text in enumerate(drawn_prompts)
    ]
    assert not drawn(path)
