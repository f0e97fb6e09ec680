"""Statistics for RegMean++: against a naive second way, layer by layer in float64, and what is refused."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_lite
from mergekit_lite import PlanError, UsageError, gather_statistics, gather_statistics_plus
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.checkpoint.statistics_file import open_statistics
from mergekit_lite.gathering import working_file
from mergekit_lite.gathering.examples import prompts_in
from mergekit_lite.recipe import parse
from tests.gathering.models import prompts, written
from tests.models import read_folder
from tests.processes import preload, run

preload("mergekit_lite.gathering.prefixed", "mergekit_lite.gathering.passes", "transformers")
RIDGE = 1e-2  # large enough for matrices in float32 to give what those in float64 do
WEIGHTS = (1.0, 2.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefixed")
    for architecture in ("llama", "gpt2", "gemma2"):
        for seed in (0, 1):
            written(folder / f"{architecture}-{seed}", architecture, seed=1 + seed, rms=0.05)
    for seed, word in enumerate(("plus", "and")):
        prompts(folder / f"{seed}.jsonl", word)
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def recipe(
    folder: Path, models: tuple[str, ...], weights: tuple[float, ...] = WEIGHTS, name: str = "r.yml", **more: Any
) -> Path:
    """A recipe whose statistics are beside it."""
    listed = [
        {"model": model, "statistics": str(folder / f"{model}-{number}.safetensors"), "parameters": {"weight": weight}}
        for number, (model, weight) in enumerate(zip(models, weights, strict=True))
    ]
    file = folder / name
    file.write_text(yaml.safe_dump({"merge_method": "regmean_plus", "models": listed, **more}))
    return file


def files(models: tuple[str, ...]) -> dict[str, list[str]]:
    return {model: [f"{model[-1]}.jsonl"] for model in models}


def merged(file: Path, out: Path) -> dict[str, torch.Tensor]:
    mergekit_lite.merge(file, out)
    return read_folder(out)


def both(architecture: str) -> tuple[str, str]:
    return f"{architecture}-0", f"{architecture}-1"


@contextmanager
def noted(modules: dict[str, Any], into: dict[str, list[np.ndarray]]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(
            lambda _, given, __, name=name: into.setdefault(name, []).append(given[0][0].detach().numpy())
        )
        for name, module in modules.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def slowly(architecture: str) -> dict[str, np.ndarray]:
    """RegMean++ in float64: every layer reads inputs that are kept, of each example by itself."""
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval() for name in both(architecture)]
    result = AutoModelForCausalLM.from_pretrained(both(architecture)[0], dtype=torch.float64).eval()
    rows = []
    for number, name in enumerate(both(architecture)):
        template = ChatTemplate(AutoTokenizer.from_pretrained(name))
        own = [template.tokens(p.messages, p.reference or "") for p in prompts_in([Path(f"{number}.jsonl")]).prompts]
        rows.append([torch.tensor([[*row.prompt, *row.response]]) for row in own])
    share = np.array(WEIGHTS) / sum(WEIGHTS)
    states = [model.state_dict() for model in models]
    state = {name: sum(s * x[name] for s, x in zip(share, states, strict=True)) for name in states[0]}
    result.load_state_dict(state)  # averaged; what is linear is merged below
    stack = "transformer.h" if architecture == "gpt2" else "model.layers"
    tied = result.get_input_embeddings().weight is result.get_output_embeddings().weight
    for part in [*(f"{stack}.{layer}" for layer in range(2)), *([] if tied else ["lm_head"])]:
        seen: list[dict[str, list[np.ndarray]]] = []
        for model, texts in zip(models, rows, strict=True):
            # The merged model, with this model's own layer in the place of its.
            mixed = AutoModelForCausalLM.from_pretrained(both(architecture)[0], dtype=torch.float64).eval()
            own = model.state_dict()
            mixed.load_state_dict(
                {name: own[name] if name.startswith(f"{part}.") else x for name, x in result.state_dict().items()}
            )
            linear = {
                name: module
                for name, module in mixed.named_modules()
                if type(module).__name__ in ("Linear", "Conv1D") and f"{name}.".startswith(f"{part}.")
            }
            seen.append({})
            with torch.no_grad(), noted(linear, seen[-1]):
                for text in texts:
                    mixed(text)
        new = result.state_dict()
        for name in seen[0]:
            turned = architecture == "gpt2" and name != "lm_head"
            grams = []
            for w, each in zip(WEIGHTS, seen, strict=True):
                x = np.concatenate(each[name])
                grams.append(w * x.T @ x / len(x))
            least = RIDGE * np.trace(sum(grams)) / (len(grams[0]) * sum(WEIGHTS)) * np.eye(len(grams[0]))
            grams = [g + w * least for g, w in zip(grams, WEIGHTS, strict=True)]
            matrices = [m.state_dict()[f"{name}.weight"].numpy() for m in models]
            matrices = matrices if turned else [x.T for x in matrices]
            solved = np.linalg.solve(sum(grams), sum(g @ x for g, x in zip(grams, matrices, strict=True)))
            new[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(solved if turned else solved.T))
        result.load_state_dict(new)
    return {name: values.numpy() for name, values in result.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_merge_is_that_of_a_slow_second_way(architecture: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, both(architecture), parameters={"ridge": RIDGE})
    told = gather_statistics_plus(file, files(both(architecture)), batch_size=4)
    wanted = slowly(architecture)
    out = merged(file, tmp_path / "out")
    for name, values in out.items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-4, atol=1e-5)
    assert mergekit_lite.verify(tmp_path / "out", samples="all").sound
    parts = 2 + ("lm_head.weight" in open_statistics(str(told[0].path)).grams)  # a pass for each
    assert [each.passes for each in told] == [parts, parts]
    plain = recipe(tmp_path, both(architecture), name="plain.yml", parameters={"ridge": RIDGE})
    content = yaml.safe_load(plain.read_text())
    for number, model in enumerate(content["models"]):
        model["statistics"] = str(tmp_path / f"plain-{number}.safetensors")
        gather_statistics(model["model"], [f"{number}.jsonl"], model["statistics"])
    plain.write_text(yaml.safe_dump(content | {"merge_method": "regmean"}))
    other = merged(plain, tmp_path / "regmean")
    assert max(float((x - other[name]).abs().max()) for name, x in out.items()) > 0.1  # it is no RegMean


def test_the_first_layer_is_that_of_regmean_where_embeddings_are_equal(tmp_path: Path) -> None:
    """Behind equal embeddings nothing is merged yet."""
    from safetensors.torch import save_file

    models = ("same-0", "same-1")
    for seed, name in enumerate(models):
        written(tmp_path / name, seed=3 + seed, rms=0.05)
    own, first = (load_file(tmp_path / name / "model.safetensors") for name in reversed(models))
    own["model.embed_tokens.weight"] = first["model.embed_tokens.weight"]
    save_file(own, tmp_path / models[1] / "model.safetensors", {"format": "pt"})
    names = tuple(str(tmp_path / name) for name in models)
    listed = [{"model": name, "statistics": f"{name}.safetensors"} for name in names]
    file = tmp_path / "r.yml"
    file.write_text(yaml.safe_dump({"merge_method": "regmean_plus", "models": listed}))
    gather_statistics_plus(file, {name: [f"{number}.jsonl"] for number, name in enumerate(names)})
    for number, name in enumerate(names):
        gather_statistics(name, [f"{number}.jsonl"], f"{name}-alone.safetensors")
        plus, alone = load_file(f"{name}.safetensors"), load_file(f"{name}-alone.safetensors")
        assert plus.keys() == alone.keys()
        for gram, values in plus.items():
            assert torch.equal(values, alone[gram]) == (".layers.0." in gram), gram


def test_equal_models_give_the_model_and_their_own_statistics(tmp_path: Path) -> None:
    model = written(tmp_path / "a", seed=7)
    twin = written(tmp_path / "b", seed=7)
    listed = [{"model": str(each), "statistics": f"{each}.safetensors"} for each in (model, twin)]
    file = tmp_path / "r.yml"
    file.write_text(yaml.safe_dump({"merge_method": "regmean_plus", "models": listed}))
    gather_statistics_plus(file, {str(model): ["0.jsonl"], str(twin): ["1.jsonl"]})
    gather_statistics(model, ["0.jsonl"], tmp_path / "alone.safetensors")
    alone = load_file(tmp_path / "alone.safetensors")
    assert all(torch.equal(values, alone[name]) for name, values in load_file(f"{model}.safetensors").items())
    own = load_file(model / "model.safetensors")
    assert all(torch.equal(values, own[name]) for name, values in merged(file, tmp_path / "out").items())


def test_the_order_of_models_and_passes_change_nothing(tmp_path: Path) -> None:
    models = both("llama")
    (tmp_path / "turned").mkdir()
    file = recipe(tmp_path, models)
    turned = recipe(tmp_path / "turned", models[::-1], WEIGHTS[::-1])
    gather_statistics_plus(file, files(models))
    told = gather_statistics_plus(turned, files(models), memory=1)
    assert [each.passes for each in told] == [9, 9]
    one, other = merged(file, tmp_path / "one"), merged(turned, tmp_path / "other")
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-4, atol=1e-5)
    swapped = yaml.safe_load(file.read_text())
    swapped["models"].reverse()
    mergekit_lite.plan_merge(swapped, "out")  # it is the same merge


def kill_after_ten() -> None:
    """Let this process be killed when it has written ten matrices: of both models' first layer, and two behind."""
    write, left = working_file.WorkingFile.write, [10]

    def written_or_killed(self: working_file.WorkingFile, name: str, values: torch.Tensor) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(self, name, values)

    working_file.WorkingFile.write = written_or_killed  # type: ignore[method-assign]


def test_a_killed_command_goes_on(place: Path, tmp_path: Path) -> None:
    trees = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        file = recipe(tmp_path / name, both("llama"))
        words = ("statistics", file, "--plus", "--prompts", "llama-0=0.jsonl", "--prompts", "llama-1=1.jsonl")
        if name == "killed":
            assert run(place, *words, before=kill_after_ten).returncode == -signal.SIGKILL
            assert not list((tmp_path / name).glob("*.safetensors"))
        done = run(place, *words)
        assert done.returncode == 0, done.stderr
        trees.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".yml"})
    assert trees[0] == trees[1]
    assert len(trees[0]) == 2
    passes = re.findall(r"in (\d) passes", done.stderr + done.stdout)
    assert passes == ["2", "2"]  # of three: the first layer's are there


def kill_at_the_second_name() -> None:
    """Let this process be killed when one file has its name."""
    replace_file = Path.replace

    def replaced_or_killed(self: Path, target: Path) -> Path:
        if Path(target).name == "llama-1-1.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace_file(self, target)

    Path.replace = replaced_or_killed  # type: ignore[method-assign]


def test_a_command_killed_between_two_names_goes_on(place: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, both("llama"))
    words = ("statistics", file, "--plus", "--prompts", "llama-0=0.jsonl", "--prompts", "llama-1=1.jsonl")
    assert run(place, *words, before=kill_at_the_second_name).returncode == -signal.SIGKILL
    first = (tmp_path / "llama-0-0.safetensors").read_bytes()
    assert not (tmp_path / "llama-1-1.safetensors").exists()
    other = run(place, *words, "--limit", "2")
    assert other.returncode == 2
    assert "llama-0-0.safetensors exists" in other.stderr
    done = run(place, *words)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"in (\d) passes", done.stderr + done.stdout) == ["0", "0"]
    assert (tmp_path / "llama-0-0.safetensors").read_bytes() == first
    names = ["llama-0-0.safetensors", "llama-1-1.safetensors", "r.yml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    mergekit_lite.plan_merge(yaml.safe_load(file.read_text()), "out")


def test_files_are_held_together_and_to_their_recipe(tmp_path: Path) -> None:
    models = both("llama")
    file = recipe(tmp_path, models)
    gather_statistics_plus(file, files(models))
    given = yaml.safe_load(file.read_text())

    def problem(change: Any) -> str:
        other = yaml.safe_load(file.read_text())
        change(other)
        with pytest.raises(PlanError) as raised:
            mergekit_lite.plan_merge(other, "out")
        return str(raised.value)

    gather_statistics("llama-1", ["1.jsonl"], tmp_path / "alone.safetensors")
    alone = str(tmp_path / "alone.safetensors")
    by_itself = f"{alone}: was gathered of one model by itself, for regmean"
    assert by_itself in problem(lambda r: r["models"][1].update(statistics=alone))
    told = problem(lambda r: r.update(merge_method="regmean"))
    assert told.count("was gathered behind merged layers, for regmean_plus; regmean reads") == 2
    assert "mergekit-lite statistics MODEL --prompts FILE -o OUT" in told
    nowhere = problem(lambda r: r["models"][0].update(statistics="nowhere.safetensors"))
    assert "`mergekit-lite statistics RECIPE --plus --prompts MODEL=FILE` writes it" in nowhere
    mixed = [{"filter": "mlp", "merge_method": "regmean"}]
    assert "regmean_plus and regmean read statistics" in problem(lambda r: r.update(overrides=mixed))
    assert "of another recipe" in problem(lambda r: r["models"][1]["parameters"].update(weight=3))
    assert "of another recipe" in problem(lambda r: r.update(parameters={"ridge": 1e-3}))
    assert "of another recipe" in problem(lambda r: r["models"].pop())
    mergekit_lite.plan_merge(given | {"out_dtype": "bfloat16"}, "out")
    several = replace(parse(file.read_text(), "r.yml"), outputs=({}, {}))
    with pytest.raises(PlanError, match="of another recipe"):
        mergekit_lite.make_plan(several, [tmp_path / "one", tmp_path / "two"])
    facts = open_statistics(given["models"][0]["statistics"]).facts()
    assert facts["for"] == "merge_method: regmean_plus"
    (tmp_path / "again").mkdir()
    again = recipe(tmp_path / "again", models)
    gather_statistics_plus(again, files(models), limit=3)
    fewer = yaml.safe_load(again.read_text())["models"][1]["statistics"]
    assert "not gathered in one go" in problem(lambda r: r["models"][1].update(statistics=fewer))
    gather_statistics_plus(again, dict(zip(models, (["1.jsonl"], ["0.jsonl"]), strict=True)), force=True)
    assert "not gathered in one go" in problem(lambda r: r["models"][1].update(statistics=fewer))


def test_what_is_wrong_is_said_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    models = both("llama")
    file = recipe(tmp_path, models)
    linear = tmp_path / "linear.yml"
    linear.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"merge_method": "linear"}))
    with pytest.raises(UsageError, match="and this is of linear"):
        gather_statistics_plus(linear, files(models))
    mixed = tmp_path / "mixed.yml"
    overrides = [{"filter": "mlp", "merge_method": "fisher"}]
    mixed.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"overrides": overrides}))
    with pytest.raises(UsageError, match="and this is of fisher"):
        gather_statistics_plus(mixed, files(models))
    with pytest.raises(UsageError, match="llama-1: has no prompts: --prompts 'llama-1=FILE'"):
        gather_statistics_plus(file, files(models[:1]))
    with pytest.raises(UsageError, match="gpt2-0: the recipe merges no such model"):
        gather_statistics_plus(file, files((*models, "gpt2-0")))
    one = tmp_path / "one.yml"
    one.write_text(file.read_text().replace("llama-1-1.safetensors", f"../{tmp_path.name}/llama-0-0.safetensors"))
    with pytest.raises(UsageError, match="two models name the same file of statistics"):
        gather_statistics_plus(one, files(models))
    words = ("statistics", file, "--plus", "--prompts")
    for more, text in (
        (("0.jsonl",), "it is MODEL=FILE"),
        (("llama-0=0.jsonl", "--fisher"), "no --fisher, no -o"),
        (("llama-0=nowhere.jsonl", "--prompts", "llama-1=1.jsonl"), "nowhere.jsonl"),
    ):
        done = run(place, *words, *more)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear.yml", "mixed.yml", "one.yml", "r.yml"]
