"""Documents that are made while the next one reads them: the bytes of merges with files between, and verified again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.errors import UsageError
from mergekit_lite.multimerge import plan_documents
from mergekit_lite.recipe.documents import parse_documents
from tests.adapters import lora, write_adapter
from tests.models import state, tree_bytes, tuned, write_folder

ELEMENTWISE = ("linear", "task_arithmetic", "dare_linear", "expo")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    base = state(0)
    write_folder(folder / "base", base)
    for number in (1, 2, 3):
        write_folder(folder / f"m{number}", tuned(base, number), shards=number)
    return folder


def written(folder: Path, documents: list[dict[str, Any]]) -> Path:
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return path


def document(method: str, models: list[str], base: str, draw: random.Random) -> dict[str, Any]:
    parameters: dict[str, Any] = {"weight": draw.choice([0.3, 1.0])}
    if method == "expo":
        parameters, models = {"alpha": 0.5}, models[:1]
    elif method in ("dare_linear", "ties"):
        parameters |= {"density": 0.5, "rescale": False}
    recipe = {
        "merge_method": method,
        "models": [{"model": model} for model in models],
        "parameters": parameters,
        "dtype": draw.choice(["bfloat16", "float16", "float32"]),
        "rounding": draw.choice(["nearest", "stochastic"]),
    }
    return recipe if method == "linear" else {"base_model": base, **recipe}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(folder).items() if name.endswith(".safetensors")}


def test_bytes_are_those_with_files_between(place: Path, tmp_path: Path) -> None:
    """Random chains, every link another method, dtype and rounding, on few and odd blocks."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for trial in range(5):
        chain: list[dict[str, Any]] = []
        for number in range(draw.randint(2, 4)):
            others = [str(place / f"m{each}") for each in draw.sample((1, 2, 3), 2)]
            models = [f"link {number - 1}", *others][: draw.randint(2, 3)] if number else others
            link = document(draw.choice(ELEMENTWISE), models, str(place / "base"), draw)
            chain.append({"name": f"link {number}", **link})
        recipe = written(tmp_path, chain)
        steps = plan_documents(parse_documents(recipe.read_text()), tmp_path / "x")
        assert [step.is_fused for step in steps] == [True] * (len(chain) - 1) + [False]
        fused, kept = tmp_path / f"fused-{trial}", tmp_path / f"kept-{trial}"
        mergekit_lite.merge(recipe, fused, threads=draw.choice([1, 3]), block=1 << 15)
        assert not (tmp_path / f".fused-{trial}.documents").exists()
        mergekit_lite.merge(recipe, kept, keep=True)
        assert weights(fused) == weights(kept)
        for output in (fused, kept):
            verified = mergekit_lite.verify(output, samples="all")
            assert verified.sound and len(verified.recomputed) == verified.tensors, verified.findings


def test_what_is_made_in_one_read_alone_is_fused(place: Path, tmp_path: Path) -> None:
    """Neither what several documents read, nor what a method reads twice, nor what takes statistics."""
    draw = random.Random(0)
    base, one, two, three = (str(place / name) for name in ("base", "m1", "m2", "m3"))
    chain = [
        {"name": "shared", **document("linear", [one, two], base, draw)},
        {"name": "twice", **document("linear", ["shared", three], base, draw)},
        {"name": "sums", **document("ties", ["twice", "shared"], base, draw)},
        {"name": "plain", **document("linear", [one, three], base, draw)},
        document("linear", ["sums", "plain"], base, draw),
    ]
    steps = plan_documents(parse_documents(written(tmp_path, chain).read_text()), tmp_path / "x")
    assert [step.name for step in steps if step.is_fused] == ["plain"]


def test_outputs_are_verified_without_what_lay_between(place: Path, tmp_path: Path) -> None:
    """Statistics too are gathered again, from the models; a model that changed is named."""
    draw = random.Random(1)
    base = str(write_folder(tmp_path / "base", state(0)))
    models = [str(write_folder(tmp_path / f"m{number}", tuned(state(0), number))) for number in (1, 2, 3)]
    chain = [
        {"name": "stem", **document("ties", models[:2], base, draw)},
        {"name": "mean", **document("linear", ["stem", models[2]], base, draw)},
        document("task_arithmetic", ["mean"], base, draw),
    ]
    output = tmp_path / "out"
    mergekit_lite.merge(written(tmp_path, chain), output)
    manifest = json.loads((output / "mergekit_lite_manifest.json").read_text())
    assert [source["reference"] for source in manifest["inputs"]] == ["mean", base]
    assert [model["reference"] for model in manifest["inputs"][0]["made_of"]] == [*models[:2], base, models[2]]
    verified = mergekit_lite.verify(output, samples="all")
    assert verified.sound and len(verified.recomputed) == verified.tensors

    other = tuned(state(0), 9)
    write_folder(tmp_path / "m2", other)
    found = mergekit_lite.verify(output, samples="all").findings
    assert found and all("what it is made of gives other values" in finding.what for finding in found)
    moved = write_folder(tmp_path / "moved", tuned(state(0), 2))
    assert mergekit_lite.verify(output, samples="all", inputs={models[1]: str(moved)}).sound

    chain[0]["parameters"] |= {"trim": "global", "density": 0.5}
    mergekit_lite.merge(written(tmp_path, chain), output, force=True)
    verified = mergekit_lite.verify(output)
    assert verified.sound and not verified.recomputed
    assert any("'stem' has thresholds or coefficients that span several tensors" in text for text in verified.unchecked)
    assert not mergekit_lite.verify(output, samples=3).sound


def test_the_recipe_beside_an_output_makes_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output has the documents that it is made of, with their names and no path of what lay between."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(2)
    base, one, two, three = (str(place / name) for name in ("base", "m1", "m2", "m3"))
    chain = [
        {"name": "stem", **document("ties", [one, two], base, draw)},
        {"name": "left", **document("linear", ["stem", three], base, draw)},
        {"name": "right", **document("linear", [one, three], base, draw)},
    ]
    mergekit_lite.merge(written(tmp_path, chain), "out-{name}")
    for name, documents in (("left", 2), ("right", 1)):
        text = Path(f"out-{name}/mergekit_config.yml").read_text()
        assert len(list(yaml.safe_load_all(text))) == documents and "documents/" not in text
        Path("again.yml").write_text(text)
        mergekit_lite.merge("again.yml", f"again-{name}")
        assert weights(Path(f"again-{name}")) == weights(Path(f"out-{name}"))
        assert Path(f"again-{name}/mergekit_config.yml").read_text() == text


def test_models_behind_documents_are_never_touched(place: Path, tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", tuned(state(0), 1))
    draw = random.Random(3)
    for method in ("linear", "ties"):
        chain = [
            {"name": "stem", **document(method, [str(one), str(place / "m2")], str(place / "base"), draw)},
            document("linear", ["stem", str(place / "m3")], str(place / "base"), draw),
        ]
        with pytest.raises(UsageError, match="Inputs are never touched"):
            mergekit_lite.merge(written(tmp_path, chain), one, force=True)


FURTHER = {
    "copies, cast": {"exclude": ["up_proj", "embed"], "dtype": "float16", "models": [{"model": "stem"}]},
    "an adapter": {"models": [{"model": "stem+adapter"}]},
    "a part": {"base_model": "omni", "models": [{"model": "stem", "part": "talker."}]},
    "a module": {"modules": {"model.layers.1": {"models": [{"model": "stem"}]}}},
}


@pytest.mark.parametrize("case", FURTHER)
def test_whatever_reads_a_result(case: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and casts, what is added to a result, a result that stands for a part: read as from files."""
    monkeypatch.chdir(place)
    rows, columns = state(0)["model.layers.0.self_attn.q_proj.weight"].shape
    write_adapter(place / "adapter", lora("model.layers.0.self_attn.q_proj", columns, rows))
    towers = {
        f"{tower}.{name}": tensor for tower in ("thinker", "talker") for name, tensor in tuned(state(0), 5).items()
    }
    omni = {name: tensor.clone() for name, tensor in towers.items()}
    write_folder(place / "omni", omni, config={"model_type": "omni", "thinker_config": {}, "talker_config": {}})
    stem = {
        "name": "stem",
        "merge_method": "linear",
        "exclude": ["q_proj", "norm"],
        "models": [{"model": "m1"}, {"model": "m2"}],
        "parameters": {"weight": 0.5},
        "dtype": "float32" if "cast" in case else "bfloat16",
    }
    last = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.6}, **FURTHER[case]}
    recipe = written(tmp_path, [stem, last])
    fused, kept = tmp_path / "fused", tmp_path / "kept"
    mergekit_lite.merge(recipe, fused)
    mergekit_lite.merge(recipe, kept, keep=True)
    assert weights(fused) == weights(kept) and not (tmp_path / ".fused.documents").exists()
    assert mergekit_lite.verify(fused, samples="all").sound and mergekit_lite.verify(kept, samples="all").sound


@pytest.mark.parametrize("options", [[], ["--keep"], ["--json"], ["--dry-run"]])
def test_what_is_to_be_known_of_a_document_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Whether it is made while it is read or for itself."""
    monkeypatch.chdir(tmp_path)
    between = {"name": "mean", "chat_template": "auto", **document("linear", ["m1"], "", random.Random(0))}
    between["models"] = [{"model": str(place / "m1")}]
    last = {"merge_method": "linear", "models": [{"model": "mean"}], "parameters": {"weight": 1}}
    recipe = written(tmp_path, [between, last])
    done = CliRunner().invoke(main, ["merge", str(recipe), "-o", "out", *options])
    assert done.exit_code == 0, done.output
    assert done.output.count("chat_template: auto finds no template") == 1
