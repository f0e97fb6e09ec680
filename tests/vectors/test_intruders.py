"""Intruder dimensions of adapters: against whole matrices, beside peft's own function, killed, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mergekit_lite.commands import main
from mergekit_lite.commands.vector import command
from mergekit_lite.vectors.intruders import likeness, reduce_intruders, without_intruders
from mergekit_lite.vectors.spaces import Product
from tests.adapters import PREFIX, lora, write_adapter
from tests.models import State, write_folder

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 24), "model.layers.0.mlp.down_proj": (16, 40),
          "model.layers.0.mlp.up_proj": (40, 16)}  # fmt: skip
SEED = int(torch.randint(1000, ()))


def weights() -> State:
    generator = torch.Generator().manual_seed(SEED)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def written(folder: Path, scale: float = 8.0) -> tuple[Path, Path]:
    """A base and an adapter strong enough to have intruders."""
    print("seed", SEED)
    write_folder(folder / "base", weights())
    tensors: State = {}
    for number, (module, shape) in enumerate(SHAPES.items()):
        tensors |= lora(module, *shape, rank=4, seed=SEED + number)
    write_adapter(folder / "adapter", {name: scale * tensor for name, tensor in tensors.items()}, r=4, lora_alpha=6)
    return folder / "base", folder / "adapter"


def product(folder: Path, module: str, scale: float = 1.0) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
    return scale * (b @ a)


def naive(
    weight: torch.Tensor, delta: torch.Tensor, rank: int, top_k: int, epsilon: float, scale: float
) -> tuple[torch.Tensor, int]:
    """The product that is left, of whole matrices by whole decompositions."""
    before = torch.linalg.svd(weight.double(), full_matrices=False).U
    left, values, right = torch.linalg.svd(weight.double() + delta, full_matrices=False)
    found = 0
    for i in range(min(top_k, len(values))):
        if max(abs(float(left[:, i] @ other)) for other in before.T) < epsilon:
            delta = delta + (scale - 1) * values[i] * torch.outer(left[:, i], right[i])
            found += 1
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank], found


@pytest.mark.parametrize(("top_k", "epsilon", "scale"), [(10, 0.5, 0.75), (3, 0.8, 0.0), (100, 1.0, 1.5)])
def test_the_result_is_that_of_whole_matrices(top_k: int, epsilon: float, scale: float, tmp_path: Path) -> None:
    base, adapter = written(tmp_path)
    made = reduce_intruders(base, adapter, tmp_path / "out", top_k=top_k, epsilon=epsilon, scale=scale)
    told = {tensor.name.removesuffix(".weight"): tensor for tensor in made.tensors}
    for module in SHAPES:
        delta = product(adapter, module, 6 / 4)
        expected, found = naive(weights()[f"{module}.weight"], delta, 4, top_k, epsilon, scale)
        assert found and told[module].intruders == found
        assert (product(tmp_path / "out", module) - expected).norm() < 1e-5 * delta.norm()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4


def test_beside_pefts_own(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    base, adapter = written(tmp_path)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tree = self.model = torch.nn.Module()
            tree.layers = torch.nn.ModuleList([torch.nn.Module()])
            for module, (rows, columns) in SHAPES.items():
                *_, part, name = module.split(".")
                if not hasattr(tree.layers[0], part):
                    setattr(tree.layers[0], part, torch.nn.Module())
                setattr(getattr(tree.layers[0], part), name, torch.nn.Linear(columns, rows, bias=False))

    model = Model()
    model.load_state_dict(weights())
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [module.rpartition(".")[2] for module in SHAPES]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(model, adapter)
    reduce_intruder_dimension(theirs, logging_sink=None)
    theirs.load_adapter(str(reduce_intruders(base, adapter, tmp_path / "out").output), adapter_name="ours")
    for module in SHAPES:
        layer = theirs.base_model.model.get_submodule(module)
        expected, ours = (layer.get_delta_weight(name).detach() for name in ("intruder_reduced", "ours"))
        assert (ours - expected).norm() < 1e-4 * expected.norm(), module


def test_a_direction_that_the_base_lacks_resembles_nothing() -> None:
    weight = torch.zeros(6, 9, dtype=torch.float64)
    weight[0, 0], weight[1, 1] = 3, 1
    ways = torch.eye(6, dtype=torch.float64)[:, [0, 1, 2]]
    assert likeness(weight, ways).tolist() == pytest.approx([1, 1, 0])
    assert likeness(weight.new_zeros(9, 6), torch.eye(9, 2, dtype=torch.float64)).tolist() == [0, 0]
    added = Product(torch.eye(6, dtype=torch.float64)[:, [2]] * 2, torch.eye(9, dtype=torch.float64)[[2]])
    changed, found = without_intruders(weight, added, 3, 0.5, 0.25)
    assert found == 1 and (changed.b @ changed.a)[2, 2] == pytest.approx(0.5)


def test_layers_stored_transposed_have_outputs_on_the_left(tmp_path: Path) -> None:
    base, adapter = written(tmp_path)
    straight = reduce_intruders(base, adapter, tmp_path / "straight")
    write_folder(tmp_path / "turned", {name: tensor.T.contiguous() for name, tensor in weights().items()})
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"fan_in_fan_out": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    turned = reduce_intruders(tmp_path / "turned", adapter, tmp_path / "out")
    assert [one.intruders for one in turned.tensors] == [one.intruders for one in straight.tensors]
    for module in SHAPES:
        torch.testing.assert_close(product(tmp_path / "out", module), product(tmp_path / "straight", module))


def test_without_intruders_nothing_changes(tmp_path: Path) -> None:
    base, adapter = written(tmp_path, scale=1e-3)
    made = reduce_intruders(base, adapter, tmp_path / "out")
    assert {tensor.intruders for tensor in made.tensors} == {0} and made.error < 1e-7
    for module in SHAPES:
        torch.testing.assert_close(product(tmp_path / "out", module), product(adapter, module, 6 / 4))


def test_the_command_tells_and_resumes(tmp_path: Path) -> None:
    base, adapter = written(tmp_path)
    arguments = ["intruders", str(base), str(adapter), "-o", str(tmp_path / "out")]
    planned = CliRunner().invoke(command, [*arguments, "--dry-run"], catch_exceptions=False)
    assert "3 modules of rank 4, their intruders × 0.75" in planned.stdout and not (tmp_path / "out").exists()
    told = CliRunner().invoke(command, [*arguments, "-v"], catch_exceptions=False)
    assert told.exit_code == 0 and "intruders in 3 of them scaled; cut off: 0." in told.stdout
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    again = CliRunner().invoke(command, [*arguments, "--resume", "--json"], catch_exceptions=False)
    assert all(of["intruders"] for of in json.loads(again.stdout)["tensors"].values())
    forced = CliRunner().invoke(command, [*arguments, "--force", "--threads", "1", "-q"], catch_exceptions=False)
    assert forced.exit_code == 0 and not forced.stdout
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == before


def test_verify_says_what_holds_an_adapter_to_its_manifest(tmp_path: Path) -> None:
    base, adapter = written(tmp_path)
    arguments = ["vector", "intruders", str(base), str(adapter), "-o", str(tmp_path / "out"), "-q"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    told = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert told.exit_code == 1 and "is of an adapter" in told.stderr and "damaged" not in told.stderr
    assert CliRunner().invoke(main, [*arguments, "--resume"]).exit_code == 0
    with (tmp_path / "out/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    damaged = CliRunner().invoke(main, [*arguments, "--resume"])
    assert damaged.exit_code == 2 and "is not the result of this run" in damaged.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-k", "0"], "top-k: expected a whole number"),
        (["--epsilon", "1.5"], "epsilon: expected a cosine above 0 and up to 1, got 1.5"),
        (["--lambda", "-1"], "lambda: expected a number from 0 on"),
        (["--lambda", "nan"], "lambda expects finite numbers"),
        (["--dtype", "float23"], "float23"),
        (["--device", "cuda"], "--device: not with an adapter's intruders"),
        (["-o", "x.safetensors"], "an adapter is a folder"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(options: list[str], said: str, tmp_path: Path) -> None:
    base, adapter = written(tmp_path)
    before = set(tmp_path.iterdir())
    ran = CliRunner().invoke(
        main, ["vector", "intruders", str(base), str(adapter), "-o", str(tmp_path / "o"), *options]
    )
    assert ran.exit_code == 2 and said in ran.stderr, ran.stderr
    assert set(tmp_path.iterdir()) == before


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    base, adapter = written(tmp_path)

    def said(*arguments: Path) -> str:
        ran = CliRunner().invoke(main, ["vector", "intruders", *map(str, arguments), "-o", str(tmp_path / "o")])
        assert ran.exit_code == 1 and not (tmp_path / "o").exists()
        return ran.stderr

    write_folder(tmp_path / "other", {name: tensor[:, :7].contiguous() for name, tensor in weights().items()})
    assert "of the base is" in said(tmp_path / "other", adapter)
    full = load_file(adapter / "adapter_model.safetensors") | {f"{PREFIX}model.norm.weight": torch.ones(4)}
    write_adapter(tmp_path / "full", full, modules_to_save=["norm"])
    assert "tensors in full" in said(base, tmp_path / "full")
    bad = load_file(base / "model.safetensors")
    bad["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(bad, base / "model.safetensors")
    assert "NaN or infinity in model.layers.0.mlp.up_proj.weight" in said(base, adapter)
