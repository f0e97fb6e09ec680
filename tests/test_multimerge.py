"""Recipes of several documents: the same bytes as merges run by hand, planned whole, made again only where needed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergekit_lite
from mergekit_lite import multimerge
from mergekit_lite.engine import ray_cluster
from mergekit_lite.errors import CheckpointError, MergekitLiteError, PlanError, UsageError
from mergekit_lite.multimerge import plan_documents
from mergekit_lite.recipe.documents import parse_documents
from mergekit_lite.yaml_document import RecipeError
from tests.models import state, tree_bytes, tuned, write_folder
from tests.processes import run, started

CHAIN = """
merge_method: task_arithmetic
base_model: {place}/base
models:
- model: linear
  parameters: {{weight: 0.7}}
- model: stem
  parameters: {{weight: 0.4}}
---
name: linear
merge_method: linear
models:
- {{model: "{place}/m1", parameters: {{weight: 0.5}}}}
- {{model: stem, parameters: {{weight: 0.5}}}}
---
name: stem
merge_method: linear
models:
- {{model: "{place}/m2", parameters: {{weight: {weight}}}}}
- {{model: "{place}/m3", parameters: {{weight: 0.5}}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    base = state(0)
    write_folder(folder / "base", base)
    for number in (1, 2, 3):
        write_folder(folder / f"m{number}", tuned(base, number), shards=number)
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return path


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(folder).items() if name.endswith(".safetensors")}


def test_bytes_are_those_of_merges_run_by_hand(place: Path, tmp_path: Path) -> None:
    """Random graphs of documents, in any order of the text."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for trial in range(4):
        made = [str(place / "m1"), str(place / "m2"), str(place / "m3")]
        by_hand = dict(zip(made, made, strict=True))
        documents = []
        for number in range(draw.randint(2, 4)):
            method = draw.choice(["linear", "slerp", "ties", "breadcrumbs"])
            used = draw.sample(made, 2 if method == "slerp" else draw.randint(1, 3)) if documents else made[:2]
            used = used if not documents or f"doc {number - 1}" in used else [f"doc {number - 1}", *used[1:]]
            recipe: dict[str, object] = {
                "merge_method": method,
                "models": [{"model": model} for model in used],
                "parameters": {"t": 0.3} if method == "slerp" else {"weight": draw.choice([0.5, 1.0])},
                "dtype": draw.choice(["bfloat16", "float32"]),
            }
            if method in ("ties", "breadcrumbs", "slerp"):
                recipe["base_model"] = used[0] if method == "slerp" else str(place / "base")
            hand = json.loads(json.dumps(recipe), object_hook=lambda each: each)
            hand["models"] = [{"model": by_hand[model]} for model in used]
            if method == "slerp":
                hand["base_model"] = by_hand[used[0]]
            output = tmp_path / f"hand-{trial}-{number}"
            mergekit_lite.merge(hand, output)
            name = f"doc {number}"
            made.append(name)
            by_hand[name] = str(output)
            documents.append({"name": name, **recipe})
        last = by_hand[documents[-1]["name"]]
        draw.shuffle(documents)
        recipe_file = written(tmp_path, yaml.safe_dump_all(documents))
        finished = mergekit_lite.merge(recipe_file, tmp_path / f"whole-{trial}")
        assert weights(finished.outputs[0]) == weights(Path(last))
        assert not list(tmp_path.glob(".whole-*"))


def test_a_name_counts_only_where_a_model_may_stand(place: Path) -> None:
    documents = parse_documents(CHAIN.format(place=place, weight=0.5))
    assert [document.name for document in documents] == ["stem", "linear", ""]
    assert [document.recipe.merge_method for document in documents] == ["linear", "linear", "task_arithmetic"]
    assert [document.uses for document in documents] == [(), ("stem",), ("linear", "stem")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\n{}---\n{}---\n{}", "two documents have no 'name', the other one in line"),
        ("name: x\n{}---\nname: X\n{}---\n{}", "two documents are called 'X', the other one in line 1"),
        ("name: ../x\n{}---\n{}", "'name' expects text of letters"),
        ("name: a+b\n{}---\n{}", "'name' expects text of letters"),
        ("name: 7\n{}---\n{}", "'name' expects text of letters"),
        (
            "merge_method: liner\nmodels: [{{model: a}}]\n---\nname: y\nmerge_method: tie\nmodels: [{{model: a}}]",
            "2 pro",
        ),
    ],
)
def test_wrong_documents_are_told_together(text: str, said: str) -> None:
    one = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    with pytest.raises(RecipeError, match=said):
        parse_documents(text.format(*[one] * 3))


def test_a_circle_is_shown() -> None:
    one = "name: {}\nmerge_method: linear\nmodels: [{{model: {}, parameters: {{weight: 1}}}}]\n"
    with pytest.raises(RecipeError, match=r"made of one another: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c)"):
        parse_documents("---\n".join(one.format(*pair) for pair in ("ab", "bc", "ca")))


def test_all_is_planned_before_anything_is_made(place: Path, tmp_path: Path) -> None:
    """The last document's fault shows before the first is merged: a base of another shape."""
    wide = write_folder(tmp_path / "wide", state(5, hidden=16))
    recipe = written(tmp_path, CHAIN.format(place=place, weight=0.5).replace(f"{place}/base", str(wide)))
    with pytest.raises(PlanError, match="The document of line 2: ") as raised:
        mergekit_lite.merge(recipe, tmp_path / "out")
    assert "linear" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yml", "wide"]


def test_a_change_makes_again_what_depends_on_it_and_nothing_else(place: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, CHAIN.format(place=place, weight=0.5))
    mergekit_lite.merge(recipe, tmp_path / "out", keep=True)
    between = tmp_path / ".out.documents"
    first = {name: (between / name).stat().st_ino for name in ("stem", "linear")}
    assert between.stat().st_mode & 0o077 == 0

    changed = recipe.read_text().replace('m1", parameters: {weight: 0.5}', 'm1", parameters: {weight: 0.25}')
    mergekit_lite.merge(written(tmp_path, changed), tmp_path / "out", keep=True, force=True)
    second = {name: (between / name).stat().st_ino for name in ("stem", "linear")}
    assert second["stem"] == first["stem"] and second["linear"] != first["linear"]

    once_more = written(tmp_path, CHAIN.format(place=place, weight=0.9))
    mergekit_lite.merge(once_more, tmp_path / "out", force=True)
    assert not between.exists()
    mergekit_lite.merge(once_more, tmp_path / "fresh")
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")


def test_a_killed_run_goes_on(place: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, CHAIN.format(place=place, weight=0.5))
    mergekit_lite.merge(recipe, tmp_path / "whole")
    for trial in range(3):
        output = tmp_path / f"out{trial}"
        between = tmp_path / f".out{trial}.documents"
        reached = (between / "stem", tmp_path / f".out{trial}.partial", between / ".stem.partial")[trial]
        with started(tmp_path, "merge", recipe, "-o", output, "-q") as process:
            while process.running and not reached.exists():
                time.sleep(0.001)
            process.send(signal.SIGKILL)
        assert run(tmp_path, "merge", recipe, "-o", output, "--resume").returncode == 0
        assert weights(output) == weights(tmp_path / "whole")
        assert not between.exists()


@pytest.mark.parametrize("kept_first", [True, False])
def test_resume_goes_on_with_or_without_keep(place: Path, tmp_path: Path, kept_first: bool) -> None:
    """With it a result lies on the disk that is made while it is read without: the last one's bytes are the same."""
    chain = CHAIN.format(place=place, weight=0.5)
    recipe, output = written(tmp_path, chain), tmp_path / "out"
    assert {step.is_fused for step in plan_documents(parse_documents(chain), output)} == {True, False}
    mergekit_lite.merge(recipe, tmp_path / "whole")
    first, then = (["--keep"], []) if kept_first else ([], ["--keep"])
    with started(tmp_path, "merge", recipe, "-o", output, "-q", *first) as process:
        while process.running and not (tmp_path / ".out.partial" / "journal.jsonl").exists():
            time.sleep(0.001)
        process.send(signal.SIGKILL)
    ended = run(tmp_path, "merge", recipe, "-o", output, "--resume", *then)
    assert ended.returncode == 0, ended.stderr
    assert weights(output) == weights(tmp_path / "whole")
    again = run(tmp_path, "merge", recipe, "-o", output, "--resume", *then)
    assert again.returncode == 0, again.stderr


def test_models_that_no_document_uses_are_all_outputs(place: Path, tmp_path: Path) -> None:
    one = "name: {}\nmerge_method: linear\nmodels: [{{model: '{}', parameters: {{weight: 1}}}}]\n"
    recipe = written(tmp_path, "---\n".join(one.format(name, place / "m1") for name in ("left", "right")))
    with pytest.raises(UsageError, match=r"2 models that no other document uses: left, right\. Put \{name\}"):
        mergekit_lite.merge(recipe, tmp_path / "out")
    finished = mergekit_lite.merge(recipe, tmp_path / "out-{name}")
    assert [path.name for path in finished.outputs] == ["out-left", "out-right"]
    assert not list(tmp_path.glob(".out*"))


def test_resume_leaves_what_is_there(place: Path, tmp_path: Path) -> None:
    """Once all is made, nothing is made again; after a kill between two models, only the second one."""
    one = "name: {}\nmerge_method: linear\nmodels: [{{model: '{}', parameters: {{weight: 1}}}}]\n"
    leaf = write_folder(tmp_path / "leaf", state(7))
    text = "---\n".join(one.format(*pair) for pair in (("stem", leaf), ("left", "stem"), ("right", "stem")))
    recipe, outputs = written(tmp_path, text), [tmp_path / "out-left", tmp_path / "out-right"]
    mergekit_lite.merge(recipe, tmp_path / "out-{name}")
    before = [weights(output) for output in outputs]
    first = outputs[0].stat().st_ino
    for lost in (None, outputs[1]):
        if lost is not None:
            shutil.rmtree(lost)
        finished = mergekit_lite.merge(recipe, tmp_path / "out-{name}", resume=True)
        assert list(finished.outputs) == outputs and len(finished.reports) == 2
        assert [weights(output) for output in outputs] == before and outputs[0].stat().st_ino == first
        assert not list(tmp_path.glob(".out*"))
    newer = (leaf / "model.safetensors").stat().st_mtime_ns + 10**12
    os.utime(leaf / "model.safetensors", ns=(newer, newer))
    with pytest.raises(UsageError, match="exists, and is not the result of this run"):
        mergekit_lite.merge(recipe, tmp_path / "out-{name}", resume=True)
    assert not list(tmp_path.glob(".out*"))


def test_what_travels_follows_the_documents(place: Path, tmp_path: Path) -> None:
    """Tokenizer, template and config pass through; the recipe's text tells of all documents, and verify reads it."""
    source = write_folder(tmp_path / "chat", state(0))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }} of the chat model"}))
    text = f"""
name: talks
merge_method: linear
chat_template: auto
models: [{{model: '{source}', parameters: {{weight: 1}}}}]
---
merge_method: linear
tokenizer_source: talks
models: [{{model: '{place / "m1"}', parameters: {{weight: 1}}}}, {{model: talks, parameters: {{weight: 1}}}}]
"""
    mergekit_lite.merge(written(tmp_path, text), tmp_path / "out", keep=True)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }} of the chat model"
    assert (tmp_path / "out" / "mergekit_config.yml").read_text().startswith("name: talks\n")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert mergekit_lite.verify(tmp_path / "out").sound


def test_the_command_tells_of_each_document(place: Path, tmp_path: Path) -> None:
    recipe = str(written(tmp_path, CHAIN.format(place=place, weight=0.5)))
    planned = json.loads(run(tmp_path, "plan", recipe, "--json").stdout)
    assert [(each["name"], each["fused"]) for each in planned["documents"]] == [
        ("stem", False),
        ("linear", True),
        ("", False),
    ]
    made = json.loads(run(tmp_path, "merge", recipe, "-o", "out", "--json").stdout)
    assert [each["name"] for each in made["documents"]] == ["stem", ""]
    with pytest.raises(MergekitLiteError, match="exists"):
        mergekit_lite.merge(recipe, tmp_path / "out")
    (tmp_path / "one.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: '{place / 'm1'}'}}]\nparameters: {{weight: 1}}"
    )
    refused = run(tmp_path, "merge", "one.yml", "-o", "one", "--keep")
    assert refused.returncode == 2 and "--keep is for recipes of several documents" in refused.stderr


def test_names_that_are_almost_documents_are_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name, and a folder that is called like a document."""
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path, CHAIN.format(place=place, weight=0.5).replace("model: linear", "model: liner"))
    said = r"No document is called 'liner'\. Did you mean 'linear'\?"
    with pytest.raises(UsageError, match=f"2 models that no other document uses: .* {said}"):
        mergekit_lite.merge(recipe, "out")
    text = recipe.read_text().replace("{weight: 0.7}", "{weight: 0.7}\n- {model: linear, parameters: {weight: 1}}")
    with pytest.raises(CheckpointError, match=f"The document of line 2: liner.*{said}"):
        mergekit_lite.merge(written(tmp_path, text), "out")
    (tmp_path / "stem").mkdir()
    steps = plan_documents(parse_documents(CHAIN.format(place=place, weight=0.5)), "out")
    assert [sum("stem is the document of that name" in note for note in step.plan.notes) for step in steps] == [0, 1, 1]


def test_stages_as_mergekit_multi_documents_them(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with a blank behind, a document as the base of the next one, the base of all among the first's models."""
    monkeypatch.chdir(place)
    recipe = written(
        tmp_path,
        """
name: first-merge
merge_method: linear
models: [{model: ./base}, {model: ./m1}]
parameters: {weight: 0.5}
---
name: second-merge\x20
merge_method: slerp
base_model: first-merge  # the one above
models: [{model: ./m2}]
parameters: {t: 0.5}
---
# the last one has no name
merge_method: dare_ties
base_model: ./base
models:
  - {model: second-merge, parameters: {density: 0.6, weight: 0.5}}
  - {model: ./m3, parameters: {density: 0.8, weight: 0.5}}
""",
    )
    mergekit_lite.merge(recipe, tmp_path / "out")
    assert mergekit_lite.verify(tmp_path / "out", samples="all").sound


def test_all_documents_are_made_by_one_cluster(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is connected once, not for each of them: starting Ray takes longer than many a merge."""
    opened: list[object] = []
    used: list[object] = []

    @contextmanager
    def connected(*_: object) -> Iterator[object]:
        opened.append(object())
        yield opened[-1]

    def run_here(plan: mergekit_lite.Plan, **options: Any) -> mergekit_lite.Finished:
        used.append(options.pop("ray"))
        return mergekit_lite.run(plan, **options)

    monkeypatch.setattr(ray_cluster, "connected", connected)
    monkeypatch.setattr(multimerge, "run", run_here)
    recipe = written(tmp_path, CHAIN.format(place=place, weight=0.5))
    mergekit_lite.merge(recipe, tmp_path / "out", keep=True, ray="local:2")
    assert len(opened) == 1 and used == opened * 3
