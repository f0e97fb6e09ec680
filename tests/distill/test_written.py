"""Prompts that a model writes: of lists and of given prompts, behind a server and in this process, resumed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands.distill import command
from mergekit_lite.distillation.prompts import read, settled
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.written import FORM
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.yaml_document import RecipeError
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import write_model
from tests.distill.recipes import recipe, write_recipe
from tests.distill.test_magpie import words
from tests.distill.test_pair import Heard
from tests.models import tree_bytes

SKILLS = [f"skill {letter}" for letter in "abcdef"]
KINDS = ["help", "facts"]
REQUEST = "Skills: {skills}.\nKind: {kind}. {{braces}}"
LISTS = {"skills": {"path": "skills.txt", "each": 2}, "kind": {"path": "kinds.txt"}}


def data(folder: Path, **keys: Any) -> dict[str, Any]:
    """An entry of prompts, with its files."""
    folder.mkdir(exist_ok=True)
    (folder / "skills.txt").write_text("\n".join([*SKILLS, "", SKILLS[0], " "]))
    (folder / "kinds.txt").write_text("\r\n".join(KINDS))
    given = [{"id": f"g{n}", "prompt": f"Given {n}? {{x}}", "reference": f"answer {n}"} for n in range(5)]
    given[3] = {
        "id": "g3",
        "messages": [{"role": role, "content": f"{role}3"} for role in ("user", "assistant", "user")],
    }
    write_rows(folder / "given.jsonl", given)
    return {"model": "W", "number": 60, "request": REQUEST, "lists": LISTS, **keys}


def made(folder: Path, url: str, **keys: Any) -> Recipe:
    return recipe(folder, prompts=[{"written": data(folder, server=url, **keys), "domain": "chat"}])


def asked(fake: Fake) -> list[str]:
    return [body["messages"][-1]["content"].removesuffix(f"\n\n{FORM}") for body in fake.bodies]


def numbered(body: dict[str, Any]) -> str:
    return f"What of {body['seed'] % 7}?"


def test_requests_of_lists(tmp_path: Path) -> None:
    """Each has two different skills and a kind, whoever else draws; all are had; and the same again."""
    with fake_server(Fake(reply=numbered)) as fake:
        heard = Heard()
        found = settled(made(tmp_path / "a", fake.url), heard)
        texts = asked(fake)
        assert settled(made(tmp_path / "a", fake.url), Heard()) == found and len(fake.bodies) == 60
        more = settled(made(tmp_path / "a", fake.url, number=70), Heard())
        assert len(fake.bodies) == 70 and more[: len(found)] == found
    drawn = [re.fullmatch(r"Skills: (skill \w), (skill \w)\.\nKind: (help|facts)\. \{braces\}", text) for text in texts]
    assert all(drawn)
    groups = [match.groups() for match in drawn if match]
    assert all(one != other for one, other, _ in groups)
    assert {part for group in groups for part in group} == {*SKILLS, *KINDS} and len({*groups}) > 20
    assert words(found) == list(dict.fromkeys(f"What of {body['seed'] % 7}?" for body in _in_order(fake)))
    assert {(prompt.domain, prompt.plain) for prompt in found} == {("chat", True)}
    assert heard.lines == [f"written: {len(found)} of 60 drawn prompts kept; left out: {60 - len(found)} drawn before"]


def _in_order(fake: Fake) -> list[dict[str, Any]]:
    """The first sixty requests in the order of their draws, which the ledger tells."""
    from mergekit_lite.answers.rows import seed_of

    seeds = {seed_of(0, "written", "written", number): number for number in range(60)}
    return sorted((body for body in fake.bodies if body["seed"] in seeds), key=lambda body: seeds[body["seed"]])


def test_requests_of_given_prompts_in_turn(tmp_path: Path) -> None:
    """Each is had as often as any other, with its reference; what lacks one is told; fields aren't filled in again."""
    keys = {
        "lists": {},
        "request": "Like {prompt}, as {reference} answers.",
        "of": [{"path": "given.jsonl"}],
        "number": 11,
    }
    with fake_server(Fake(reply=numbered)) as fake:
        heard = Heard()
        settled(made(tmp_path, fake.url, **keys), heard)
    texts = Counter(asked(fake))
    assert dict.fromkeys(texts, 1) == {f"Like Given {n}? {{x}}, as answer {n} answers.": 1 for n in (0, 1, 2, 4)}
    assert sorted(texts.values()) == [2, 3, 3, 3]
    (warning,) = heard.warnings
    assert "written: 1 row of the given prompts left out" in warning and "given.jsonl:4: no 'reference'" in warning
    with fake_server(Fake(reply=numbered)) as fake:
        settled(made(tmp_path / "b", fake.url, **keys | {"request": "Like {prompt}"}), Heard())
    assert "Like user: user3\n\nassistant: assistant3\n\nuser: user3" in asked(fake)


def test_several_given_prompts_in_a_request(tmp_path: Path) -> None:
    """Different ones where they are enough, each in turn, with tags around."""
    keys = {"lists": {}, "request": "{prompt}", "of": [{"path": "given.jsonl", "limit": 3}], "shots": 3, "number": 9}
    with fake_server(Fake(reply=numbered)) as fake:
        settled(made(tmp_path, fake.url, **keys), Heard())
        shown = [re.findall(r"<message>\nGiven (\d)\? \{x\}\n</message>", text) for text in asked(fake)]
        assert [sorted(each) for each in shown] == [["0", "1", "2"]] * 9 and len({*map(tuple, shown)}) > 1
        fake.bodies.clear()
        settled(made(tmp_path / "two", fake.url, **keys | {"shots": 2, "number": 30}), Heard())
        pairs = [re.findall(r"Given (\d)\?", text) for text in asked(fake)]
        assert all(len({*pair}) == 2 for pair in pairs) and {number for pair in pairs for number in pair} == {*"012"}
        with pytest.raises(UsageError, match="written: 3 prompts given, where `shots` wants 4"):
            settled(made(tmp_path / "b", fake.url, **keys | {"shots": 4}), Heard())


def test_given_prompts_of_one_text_are_one_shot(tmp_path: Path) -> None:
    """A conversation, and a prompt that reads like it: two prompts, which can't be shown beside each other."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    told = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    write_rows(tmp_path / "alike.jsonl", [{"prompt": turns}, {"prompt": told}])
    keys = {"lists": {}, "request": "{prompt}", "of": [{"path": str(tmp_path / "alike.jsonl")}], "shots": 2}
    wrong = "written: 1 prompt given, where `shots` wants 2"
    with fake_server(Fake(reply=numbered)) as fake, pytest.raises(UsageError, match=wrong):
        settled(made(tmp_path / "a", fake.url, **keys), Heard())


def test_replies(tmp_path: Path) -> None:
    """Without thoughts, and without quotation marks around all of it; what is cut or empty is left out."""
    said = ['<think>Hm: "x"?</think>\n\n"Why not?"', '"Who" said "no"?', "List:", "<think>\nlong", '"']
    with fake_server(Fake(reply=lambda body: said[body["seed"] % len(said)])) as fake:
        heard = Heard()
        found = settled(made(tmp_path, fake.url), heard)
    assert {*words(found)} == {"Why not?", '"Who" said "no"?', '"'}
    assert "empty" in heard.lines[0] and "with a colon at the end" in heard.lines[0]


def test_what_they_depend_on_is_held(tmp_path: Path) -> None:
    with fake_server(Fake(reply=numbered)) as fake:
        settled(made(tmp_path, fake.url), Heard())
        for keys in ({"request": REQUEST + "!"}, {"lists": {**LISTS, "kind": {"path": "skills.txt"}}}):
            with pytest.raises(UsageError, match=r"drawn in another way:\n  - requests: "):
                settled(made(tmp_path, fake.url, **keys), Heard())
        again = made(tmp_path, fake.url)
        (tmp_path / "rules.txt").write_text("# Rules\n")
        with pytest.raises(UsageError, match=r"drawn in another way:\n  - in_context: was None"):
            settled(made(tmp_path, fake.url, number=70, in_context="rules.txt"), Heard())
        (tmp_path / "kinds.txt").write_text("help\n")
        with pytest.raises(UsageError, match="drawn in another way"):
            settled(again, Heard())
        assert len(fake.bodies) == 60
        (tmp_path / "skills.txt").write_text("one\n")
        with pytest.raises(UsageError, match=r"skills.txt: 1 line, of which 2 are drawn at a time"):
            settled(again, Heard())
        (tmp_path / "skills.txt").unlink()
        with pytest.raises(UsageError, match=r"Can't read the list .*skills.txt"):
            settled(again, Heard())
        fake.refuses = lambda body: "no"
        with pytest.raises(RunError, match=r"60 of 60 prompts can't be drawn|requests in a row got no answer"):
            settled(made(tmp_path / "b", fake.url), Heard())


def test_in_this_process_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    keys = {"model": str(model), "number": 12, "batch_size": 4, "name": "own"}
    keys["sampling"] = {"max_tokens": 12, "stop": ["e", "o", "s", "i", "a"]}

    def local(folder: Path) -> Recipe:
        return recipe(folder, prompts=[{"written": data(folder, **keys)}])

    found, append, left = settled(local(tmp_path / "whole"), Heard()), Ledger.append, [5]

    def interrupted(self: Ledger[Any], rows: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, rows)

    broken = local(tmp_path / "broken")
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            settled(broken, Heard())
    assert len(read(broken, Heard(), plan=True)) == 12  # at most
    assert settled(broken, Heard()) == found
    assert tree_bytes(tmp_path / "whole/out/written") == tree_bytes(tmp_path / "broken/out/written")
    rows = [json.loads(line) for line in (tmp_path / "whole/out/written/own.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"own:{number}" for number in range(12)]
    assert len({row["text"] for row in rows}) > 5


def test_a_dry_run_asks_nobody(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with fake_server(Fake(reply=numbered)) as fake:
        path = write_recipe(tmp_path, prompts=[{"written": data(tmp_path, server=fake.url)}])
        ran = CliRunner().invoke(command, ["run", str(path), "--dry-run"])
        assert ran.exit_code == 0, ran.output
        assert "written: 60 prompts of 60 will be drawn from W" in " ".join(ran.output.split()) and not fake.bodies


def test_a_dry_run_counts_with_all_draws_of_one_name(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    entries = [
        {key: data(tmp_path, server=url, name="own") if key == "written" else magpie}
        for key, magpie in (("written", None), ("magpie", {"model": "M", "server": url, "name": "own", "number": 40}))
    ]
    assert len(read(recipe(tmp_path, prompts=entries), Heard(), plan=True)) == 100


def test_any_name_of_a_field(tmp_path: Path) -> None:
    keys = {"request": "{Kind2} {größe}", "lists": {name: {"path": "kinds.txt"} for name in ("Kind2", "größe")}}
    with fake_server(Fake(reply=numbered)) as fake:
        settled(made(tmp_path, fake.url, **keys), Heard())
    assert {*asked(fake)} == {f"{one} {other}" for one in KINDS for other in KINDS}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"request": "{skills} {kind} {skill}"}, "no field 'skill': there are skills, kind"),
        ({"request": "{skills} {kind.x}"}, "no field 'kind.x'"),
        ({"request": "{skills:d} {kind}"}, "the field 'skills' has 'd' behind it: a field is a name in braces"),
        ({"request": "{skills!r} {kind}"}, "the field 'skills' has 'r' behind it"),
        ({"request": "{skills} {kind.x}", "lists": {**LISTS, "kind.x": {"path": "kinds.txt"}}}, "a field's name is of"),
        ({"request": "{skills} {kind} {"}, "braces that are meant as such are written twice"),
        ({"request": "{skills}"}, "the request has no field {kind}, so this list has no effect"),
        ({"request": "{skills} {kind} {prompt}"}, "no field 'prompt'"),
        ({"of": [{"path": "given.jsonl"}]}, "the request has neither {prompt} nor {reference}"),
        ({"shots": 2}, "'shots' has no effect here"),
        ({"of": [{"path": "given.jsonl"}], "shots": 2, "request": REQUEST + "{reference}"}, "is of one given prompt"),
        ({"of": [{}], "request": REQUEST + "{prompt}"}, "exactly one of 'path' and 'dataset'"),
        ({"lists": {**LISTS, "prompt": {"path": "kinds.txt"}}}, "{prompt} is of the prompts that 'of' gives"),
        ({"model": ""}, "'written' has no 'model'"),
        ({"server": None, "model": "./m", "timeout": 3}, "'timeout' has no effect here"),
    ],
)
def test_wrong_recipes(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write_recipe(tmp_path, prompts=[{"written": data(tmp_path, server="http://127.0.0.1:9/v1") | keys}]))
    assert re.search(rf"- \d+:\d+: .*{re.escape(message)}", str(caught.value)), str(caught.value)


def test_one_way_to_draw(tmp_path: Path) -> None:
    entry = {"written": data(tmp_path), "magpie": {"model": "./m", "number": 1}, "path": "given.jsonl"}
    with pytest.raises(RecipeError, match="exactly one of 'magpie' and 'written'") as caught:
        load(write_recipe(tmp_path, prompts=[entry, {"written": data(tmp_path)}]))
    assert "'path' has no effect here" in str(caught.value) and "the name 'written' is taken" in str(caught.value)
