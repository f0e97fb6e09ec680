"""Task vectors used: applied, combined, named in recipes; held to the base they were made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError, MergekitLiteError
from mergekit_lite.methods import merge_tensors
from mergekit_lite.vectors.application import apply_vectors
from mergekit_lite.vectors.combination import combine_vectors
from mergekit_lite.vectors.extraction import extract_vector
from tests.adapters import folded, lora, write_adapter
from tests.models import State, bytes_of, read_folder, tree_bytes, write_folder
from tests.vectors.family import BIG, CONFIG, Q, assert_same


def test_scaled_negated_and_analogous(place: Path) -> None:
    base, math, code = (read_folder(place / name) for name in ("base", "math", "code"))
    write_adapter(place / "adapter", lora(Q, 64, 64))
    for name in ("math", "code"):
        extract_vector("base", name, f"{name}.safetensors")
    command = ["vector", "apply", "base", "+math.safetensors", "-code.safetensors:0.5", "adapter:0.7", "-o", "out"]
    result = CliRunner().invoke(main, [*command, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    expected = {name: math[name].double() - 0.5 * (code[name].double() - base[name].double()) for name in base}
    product = folded({f"{Q}.weight": torch.zeros(64, 64)}, read_folder(place / "adapter"))[f"{Q}.weight"]
    expected[f"{Q}.weight"] += 0.7 * product
    for name, tensor in read_folder(place / "out").items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-8)
    text = (place / "out" / "mergekit_config.yml").read_text()
    assert "base+math.safetensors+code.safetensors:-0.5+adapter:0.7" in text
    mergekit_lite.merge("out/mergekit_config.yml", "again")
    assert_same(read_folder(place / "again"), read_folder(place / "out"))


def test_options_are_options_whatever_lies_there(place: Path) -> None:
    extract_vector("base", "math", "v.safetensors")
    (place / "o").mkdir()
    for name in ("q", "h"):
        (place / name).write_text("no vector")
    result = CliRunner().invoke(main, ["vector", "apply", "base", "v.safetensors", "-q", "-o", "out"])
    assert result.exit_code == 0 and (place / "out").is_dir(), result.output
    assert "Usage" in CliRunner().invoke(main, ["vector", "apply", "-h"]).output


def test_adapters_add_up_as_products(place: Path) -> None:
    """Never A with A and B with B; replaced tensors move by their distance from the base."""
    base = read_folder(place / "base")
    for number in (1, 2):
        whole = {"base_model.model.model.norm.weight": torch.full((64,), float(number)).bfloat16()}
        write_adapter(place / f"a{number}", lora(Q, 64, 64, seed=number) | whole)
    apply_vectors("base", ["a1:0.5", "a2:-2"], "out", dtype="float32")
    got = read_folder(place / "out")
    products = [
        folded({f"{Q}.weight": torch.zeros(64, 64)}, read_folder(place / f"a{n}"))[f"{Q}.weight"] for n in (1, 2)
    ]
    expected = base[f"{Q}.weight"].double() + 0.5 * products[0] - 2 * products[1]
    torch.testing.assert_close(got[f"{Q}.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    norm = base["model.norm.weight"].double()
    moved = norm + 0.5 * (1 - norm) - 2 * (2 - norm)
    torch.testing.assert_close(got["model.norm.weight"].double(), moved, rtol=1e-6, atol=1e-7)


def test_the_base_is_known_again(place: Path) -> None:
    extract_vector("base", "math", "v.safetensors")
    base = read_folder(place / "base")
    write_folder(place / "renamed", base, config=CONFIG)  # one shard instead of two
    apply_vectors("renamed", ["v.safetensors"], "out")
    assert_same(read_folder(place / "out"), read_folder(place / "math"))
    for wrong, what in (("other", "weights"), ("code", "weights")):
        with pytest.raises(CheckpointError, match=f"made from base, whose {what} are not those of {wrong}.*--rebase"):
            apply_vectors(wrong, ["v.safetensors"], "no")
    apply_vectors("code", ["v.safetensors"], "rebased", rebase=True, dtype="float32")
    math, code = read_folder(place / "math"), read_folder(place / "code")
    for name, tensor in read_folder(place / "rebased").items():
        expected = code[name].double() + math[name].double() - base[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-9)


def test_recipes_name_vectors(place: Path) -> None:
    """As with the models they stand for, which are read as float32."""
    for name in ("math", "code"):
        extract_vector("base", name, f"{name}.safetensors")
        wide = {key: tensor.float() for key, tensor in read_folder(place / name).items()}
        write_folder(place / f"wide-{name}", wide, config=CONFIG)

    def merged(named: str, output: str) -> State:
        models = [{"model": named.format(name), "parameters": {"weight": 0.5}} for name in ("math", "code")]
        recipe = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"density": 0.3}}
        Path(f"{output}.yml").write_text(yaml.safe_dump(recipe | {"dtype": "bfloat16"}))
        mergekit_lite.merge(f"{output}.yml", output)
        return read_folder(place / output)

    assert_same(merged("vector:{}.safetensors", "vectors"), merged("wide-{}", "models"))


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"models": [{"model": "vector:v.safetensors"}]}, "needs a base_model"),
        ({"models": [{"model": "a"}], "base_model": "vector:v.safetensors"}, "is a task vector, not a model"),
    ],
)
def test_recipes_where_a_vector_can_not_stand(recipe: dict[str, object], told: str, place: Path) -> None:
    Path("r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "parameters": {"weight": 1}} | recipe))
    result = CliRunner().invoke(main, ["plan", "r.yml"])
    assert result.exit_code == 2 and told in result.output


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 0.5}),
        ("ties", {"density": 0.3}),
        ("dare_linear", {"density": 0.5}),
        ("slerp", {"t": 0.4}),
    ],
)
def test_combining_is_merging_over_zero(method: str, parameters: dict[str, float], place: Path) -> None:
    for name in ("math", "code"):
        extract_vector("base", name, f"{name}.safetensors")
    base, *models = (read_folder(place / name) for name in ("base", "math", "code"))
    over = [{name: m[name].double() - base[name].double() for name in base} for m in models]
    zero = {name: torch.zeros_like(tensor) for name, tensor in over[0].items()}
    if method == "slerp":
        with pytest.raises(MergekitLiteError):  # it goes from a base to one model
            combine_vectors(["math.safetensors", "code.safetensors"], "v.safetensors", method, parameters)
        return
    combine_vectors(["math.safetensors", "code.safetensors"], "v.safetensors", method, parameters, threads=2)
    got = load_file("v.safetensors")
    for name in base:
        own = None if method == "linear" else zero[name].float()
        deltas = [o[name].float() for o in over]
        whole = merge_tensors(method, own, deltas, tensor_name=name, **{"weight": 1.0} | parameters)
        torch.testing.assert_close(got[name], whole, rtol=1e-5, atol=1e-9)
    apply_vectors("base", ["v.safetensors"], "out")
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_folder(place / "out").values())


def test_combining_vectors_of_different_tensors_and_bases(place: Path) -> None:
    base = read_folder(place / "base")
    write_folder(place / "partly", base | {BIG: read_folder(place / "math")[BIG]}, config=CONFIG)
    extract_vector("base", "math", "a.safetensors")
    extract_vector("base", "partly", "b.safetensors")
    combine_vectors(["a.safetensors", "b.safetensors:-1"], "v.safetensors", "linear", {"weight": 1, "normalize": False})
    got = load_file("v.safetensors")
    assert not got[BIG].any()
    expected = read_folder(place / "math")["model.norm.weight"].double() - base["model.norm.weight"].double()
    torch.testing.assert_close(got["model.norm.weight"].double(), expected, rtol=1e-6, atol=1e-9)
    extract_vector("code", "math", "c.safetensors")
    with pytest.raises(CheckpointError, match=r"c.safetensors: was made from code.*--rebase"):
        combine_vectors(["a.safetensors", "c.safetensors"], "w.safetensors", "linear", {"weight": 1})
    combine_vectors(["a.safetensors", "c.safetensors"], "w.safetensors", "linear", {"weight": 1}, rebase=True)


def test_a_vector_is_no_model(place: Path) -> None:
    extract_vector("base", "math", "v.safetensors")
    for reference in ("v.safetensors", "vector:v.safetensors"):
        with pytest.raises(CheckpointError, match="is a task vector, not a model"):
            open_checkpoint(reference)
    with pytest.raises(CheckpointError, match="is not a task vector"):
        open_checkpoint("base+math/model.safetensors")


def test_the_commands(place: Path) -> None:
    made = CliRunner().invoke(
        main, ["vector", "extract", "base", "math", "-o", "v.safetensors", "--format", "sign", "-v"]
    )
    assert made.exit_code == 0 and "thrown away: 0." in made.output and "signs" in made.output
    told = CliRunner().invoke(main, ["vector", "apply", "base", "v.safetensors:0.5", "-o", "out", "--dry-run"])
    assert told.exit_code == 0 and "base+v.safetensors:0.5" in told.output and not Path("out").exists()
    as_json = CliRunner().invoke(main, ["vector", "extract", "base", "code", "-o", "w.safetensors", "--json"])
    assert json.loads(as_json.stdout)["error"] == 0
    both = ["vector", "combine", "--method", "ties", "-p", "density=0.2", "v.safetensors", "w.safetensors:0.5"]
    assert CliRunner().invoke(main, [*both, "-o", "x.safetensors"]).exit_code == 0
    assert CliRunner().invoke(main, ["vector", "apply", "base", "x.safetensors", "-o", "out"]).exit_code == 0


def test_applying_goes_on_after_a_stop(place: Path) -> None:
    extract_vector("base", "math", "v.safetensors", format="sparse", density=0.3)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        apply_vectors("base", ["v.safetensors:0.5"], "out", threads=1, progress=fail)
    apply_vectors("base", ["v.safetensors:0.5"], "out", resume=True)
    apply_vectors("base", ["v.safetensors:0.5"], "whole")
    trees = [tree_bytes(place / name) for name in ("out", "whole")]
    for tree in trees:
        tree.pop("README.md")
    assert trees[0] == trees[1]
    assert bytes_of(read_folder(place / "out")[BIG]) != bytes_of(read_folder(place / "base")[BIG])


def test_what_is_made_verifies(place: Path) -> None:
    for name in ("math", "code"):
        extract_vector("base", name, f"{name}.safetensors")
    write_adapter(place / "adapter", lora(Q, 64, 64))
    apply_vectors("base", ["math.safetensors:0.5", "adapter:-2"], "out")
    sound = CliRunner().invoke(main, ["verify", "out", "--all"])
    assert sound.exit_code == 0, sound.output
    extract_vector("base", "code", "math.safetensors", force=True)
    assert CliRunner().invoke(main, ["verify", "out", "--all"]).exit_code == 1
    combine_vectors(["math.safetensors", "code.safetensors"], "v.safetensors", "ties", {"density": 0.5})
    told = CliRunner().invoke(main, ["verify", "v.safetensors"])
    assert "not made again" in told.output
