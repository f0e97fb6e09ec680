"""Adapters combined in a space of their own: exact against whole matrices; beside them, peft's own merging."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_lite.commands.vector import command
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.methods.in_memory import merge_tensors
from mergekit_lite.vectors.adapter_combination import combine_adapters
from mergekit_lite.vectors.spaces import Product, Space, core_space, knots_space
from tests.adapters import PREFIX, lora, write_adapter

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 20), "model.layers.0.mlp.down_proj": (6, 40)}
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "c": {"r": 2, "lora_alpha": 2, "rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 7}},
}
D = torch.float64
FIRST = [[0.2, 0, 0, 0.1], [0, 0.1, 0, 0], [0.1, 0, 0.3, 0]]
SECOND = [[0, 0.1, 0.1, 0], [0.2, 0, 0, 0.1], [0, 0.1, 0, 0.2]]


def product(b: list[list[float]], a: list[list[float]]) -> Product:
    return Product(torch.tensor(b, dtype=D), torch.tensor(a, dtype=D))


def multiplied(space: Space, merged: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    [b, a] = space.outside(merged, rank).product
    return b @ a


def write_three(folder: Path) -> list[str]:
    """Three adapters of different ranks, scales and patterns over the same modules."""
    for number, (name, config) in enumerate(ADAPTERS.items()):
        tensors = {}
        for module, shape in SHAPES.items():
            rank = config.get("rank_pattern", {}).get("down_proj", 0) if "down" in module else 0
            tensors |= lora(module, *shape, rank=rank or config["r"], seed=10 * number + len(module))
        write_adapter(folder / name, tensors, **config)
    return [str(folder / name) for name in ADAPTERS]


def products(folder: str | Path) -> dict[str, torch.Tensor]:
    """scale · B · A of every module, by peft's rules, worked out here."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    found = {}
    for module in SHAPES:
        a, b = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
        alphas = (config.get("alpha_pattern") or {}).items()
        ends = [alpha for end, alpha in alphas if module.endswith(end.replace("\\", ""))]
        alpha = ends[0] if ends else config["lora_alpha"]
        found[module] = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a)) * (b @ a)
    return found


def test_core_reference() -> None:
    space = core_space([product([[1], [0], [2]], [[1, 0, 1, 0]]), product([[0], [1], [1]], [[0, 2, 1, 0]])])
    u, values, v = torch.linalg.svd(sum(space.tasks))
    assert values.tolist() == pytest.approx([4.6353892, 1.5852971], abs=1e-7)
    expected = [
        [1.3164966, -0.8164966, 0.9082483, 0],
        [-1.0206207, 2.6329932, 0.2958759, 0],
        [1.6123724, 1, 2.1123724, 0],
    ]
    assert multiplied(space, values.mean() * u @ v) == pytest.approx(torch.tensor(expected, dtype=D), abs=1e-7)


def test_knots_reference() -> None:
    identity = torch.eye(3).tolist()
    space = knots_space([product(identity, FIRST), product(identity, SECOND)])
    merged = merge_tensors("ties", torch.zeros_like(space.tasks[0]), space.tasks, weight=1, density=1)
    expected = [
        [0.2043462, 0.0994031, 0.0583985, -0.0160229],
        [0.0219206, 0.013033, -0.0946062, 0.0994031],
        [0.031606, 0.0412913, 0.1655879, 0.1116385],
    ]
    assert multiplied(space, merged) == pytest.approx(torch.tensor(expected, dtype=D), abs=1e-7)


@pytest.mark.parametrize("make", [core_space, knots_space])
@pytest.mark.parametrize("shape", [(30, 20), (6, 40), (40, 6), (5, 6), (1, 9)], ids=str)
def test_spaces_are_exact(make: Any, shape: tuple[int, int]) -> None:
    """Of any ranks and sizes, of factors that repeat or are zero; lengths in the space are lengths outside."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = shape
    some = [
        Product(torch.randn(rows, r, generator=generator, dtype=D) * 10.0**r, torch.randn(r, columns, dtype=D))
        for r in (3, 5, 1)
    ]
    some += [some[0], Product(torch.zeros(rows, 2, dtype=D), some[1].a[:2])]
    space = make(some)
    for task, (b, a) in zip(space.tasks, some, strict=True):
        whole = b @ a
        assert torch.linalg.norm(multiplied(space, task) - whole) <= 1e-10 * torch.linalg.norm(whole)
        assert torch.linalg.norm(task).item() == pytest.approx(torch.linalg.norm(whole).item(), rel=1e-9)
    total = sum(space.tasks)
    cut, values = space.outside(total, 2), torch.linalg.svdvals(sum(b @ a for b, a in some))
    assert cut.lost == pytest.approx(values[2:].square().sum().item(), rel=1e-6, abs=1e-9 * cut.square)
    away = cut.product.b @ cut.product.a - sum(b @ a for b, a in some)
    assert away.square().sum().item() == pytest.approx(cut.lost, rel=1e-6, abs=1e-9 * cut.square)


@pytest.mark.parametrize("scale", [1e-200, 1e-145, 1, 1e160])
@pytest.mark.parametrize("spread", [1, 200, 300, 1e6])
def test_a_basis_is_orthonormal_however_uneven_the_factors(spread: float, scale: float) -> None:
    """Whether by a Gram matrix or by QR: its square of 1e-145 has lost digits, that of 1e160 is infinite."""
    generator = torch.Generator().manual_seed(4)
    b, a = (torch.randn(60, 8, generator=generator, dtype=D) for _ in range(2))
    b, a = (torch.linalg.qr(each).Q * torch.logspace(0, -math.log10(spread), 8, dtype=D) for each in (b, a))
    products = [Product(scale * b[:, :4], a[:, :4].T), Product(scale * b[:, 4:], a[:, 4:].T)]
    space = core_space(products)
    u, v = space.stacked.b @ space.left, space.right @ space.stacked.a
    for gram in (u.T @ u, v @ v.T):
        torch.testing.assert_close(gram, torch.eye(8, dtype=D), rtol=0, atol=1e-10)
    for task, one in zip(space.tasks, products, strict=True):
        whole = one.b @ one.a / scale
        assert torch.linalg.norm(u @ (task / scale) @ v - whole) <= 1e-12 * torch.linalg.norm(whole)


def test_nothing_stays_nothing() -> None:
    for make in (core_space, knots_space):
        space = make([Product(torch.zeros(4, 2, dtype=D), torch.ones(2, 5, dtype=D))] * 2)
        for rank in (None, 1):
            assert not multiplied(space, sum(space.tasks), rank).any()


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.6}), ("dare_linear", {"density": 0.5}), ("sce", {}), ("task_arithmetic", {"lambda": 0.7})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_hold_what_whole_matrices_give(
    space: str, method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    """The same merge by a second way: decompositions of whole float64 matrices, in the original papers' steps."""
    adapters = write_three(tmp_path)
    combine_adapters(adapters, tmp_path / "out", method, parameters, space=space, seed=5)
    found, each = products(tmp_path / "out"), [products(one) for one in adapters]
    for module, shape in SHAPES.items():
        wholes = [one[module] for one in each]
        files = [load_file(Path(one) / "adapter_model.safetensors") for one in adapters]
        ranks = sum(len(file[f"{PREFIX}{module}.lora_A.weight"]) for file in files)
        if space == "knots":
            u, v = (
                torch.linalg.svd(torch.cat(wholes, 1), full_matrices=False).U[:, :ranks],
                torch.eye(shape[1]).double(),
            )
        else:
            scaled_b = []  # a scale is inside B
            for whole, file in zip(wholes, files, strict=True):
                a, b = (file[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
                scaled_b.append(b * (whole.norm() / (b @ a).norm()))
            u = torch.linalg.svd(torch.cat(scaled_b, 1), full_matrices=False).U[:, :ranks]
            stacked = torch.cat([file[f"{PREFIX}{module}.lora_A.weight"].double() for file in files])
            v = torch.linalg.svd(stacked, full_matrices=False).Vh[:ranks]
        tasks = [u.T @ whole @ v.T for whole in wholes]
        given = parameters | ({} if method == "sce" else {"weight": 1})
        name = f"{module}.weight"
        merged = merge_tensors(method, torch.zeros_like(tasks[0]), tasks, tensor_name=name, seed=5, **given)
        expected = u @ merged @ v
        assert torch.linalg.norm(found[module] - expected) < 1e-5 * torch.linalg.norm(expected)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (9, 9, False)
    assert config["rank_pattern"] == {r"model\.layers\.0\.mlp\.down_proj": 6}


@pytest.mark.parametrize("space", ["core", "knots"])
def test_linear_is_the_linear_merge_of_products(space: str, tmp_path: Path) -> None:
    adapters = write_three(tmp_path)
    weighted = [f"{adapter}:{weight}" for adapter, weight in zip(adapters, (0.5, -0.25, 2), strict=True)]
    made = combine_adapters(weighted, tmp_path / "out", "linear", {"normalize": False}, space=space)
    assert made.error == 0
    found, (a, b, c) = products(tmp_path / "out"), (products(one) for one in adapters)
    for module in SHAPES:
        torch.testing.assert_close(found[module], 0.5 * a[module] - 0.25 * b[module] + 2 * c[module], rtol=0, atol=1e-6)
    cut = combine_adapters(weighted, tmp_path / "cut", "linear", {"normalize": False}, space=space, rank=2)
    lost = math.fsum((products(tmp_path / "cut")[module] - found[module]).square().sum().item() for module in SHAPES)
    square = math.fsum(found[module].square().sum().item() for module in SHAPES)
    assert cut.error == pytest.approx(math.sqrt(lost / square), rel=1e-4)
    assert cut.error > 0.1


def test_order_of_adapters_does_not_matter(tmp_path: Path) -> None:
    adapters = write_three(tmp_path)
    for number, order in enumerate((adapters, adapters[::-1])):
        combine_adapters(order, tmp_path / f"out{number}", "ties", {"density": 0.4}, space="core")
    one, other = (products(tmp_path / f"out{number}") for number in range(2))
    for module in SHAPES:
        torch.testing.assert_close(one[module], other[module], rtol=0, atol=1e-6)


def test_a_module_of_one_adapter_is_zero_in_the_others(tmp_path: Path) -> None:
    (module, shape), *_ = SHAPES.items()
    write_adapter(tmp_path / "a", lora(module, *shape))
    write_adapter(tmp_path / "b", lora("model.norm_proj", 8, 8))
    made = combine_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", "linear")
    assert sum("zero in it" in note for note in made.notes) == 2
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"]
    mine = lora(module, *shape)
    expected = mine[f"{PREFIX}{module}.lora_B.weight"] @ mine[f"{PREFIX}{module}.lora_A.weight"]  # scale 2, halved
    torch.testing.assert_close(found, expected)


def test_refusals_are_told_together(tmp_path: Path) -> None:
    (module, shape), *_ = SHAPES.items()
    write_adapter(tmp_path / "a", lora(module, *shape))
    other = lora(module, 8, 8) | {f"{PREFIX}model.norm.weight": torch.ones(8)}
    write_adapter(tmp_path / "b", other)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(PlanError, match=r"(?s)modules_to_save.*vector extract.*8 × 8 in .*one base"):
        combine_adapters(both, tmp_path / "out", "linear")
    with pytest.raises(UsageError, match="module by module"):
        combine_adapters(both, tmp_path / "out", "ties", {"trim": "global"})
    for method in ("regmean", "fisher"):  # without statistics they would be averages under another name
        with pytest.raises(UsageError, match=f"{method} reads statistics, which are of whole models"):
            combine_adapters(both, tmp_path / "out", method)
    with pytest.raises(UsageError, match="takes no weights"):
        combine_adapters([both[0] + ":0.5", both[0]], tmp_path / "out", "sce")
    assert not (tmp_path / "out").exists()


def test_layers_of_two_orientations_are_no_one_adapter(tmp_path: Path) -> None:
    """One config says fan_in_fan_out for all layers; of a square one nothing else would tell that it is turned."""
    write_adapter(tmp_path / "a", lora("model.x", 8, 8), fan_in_fan_out=True)
    write_adapter(tmp_path / "b", lora("model.y", 8, 8))
    with pytest.raises(PlanError, match=r"model\.x has fan_in_fan_out, model\.y has not"):
        combine_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", "linear")
    combine_adapters([str(tmp_path / "a")] * 2, tmp_path / "out", "linear")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("rank", [0, 2.5, True, "3"])
def test_a_rank_is_a_whole_number(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whole number of at least 1"):
        combine_adapters(write_three(tmp_path), tmp_path / "out", "linear", rank=rank)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_three(tmp_path)
    arguments = ["combine", "--method", "ties", "a", "b:0.5", "c", "-o", "out", "--space", "core", "--rank", "4"]
    shown = CliRunner().invoke(command, [*arguments, "--dry-run"])
    assert "2 modules of rank 4" in shown.output, shown.output
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "cut off: 0." in done.output
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    again = CliRunner().invoke(command, [*arguments, "--force", "--json"], catch_exceptions=False)
    assert 0 < json.loads(again.stdout)["error"] < 1
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert CliRunner().invoke(command, [*arguments, "--resume"], catch_exceptions=False).exit_code == 0


@pytest.mark.filterwarnings("ignore")
def test_beside_pefts_own_merging(tmp_path: Path) -> None:
    """The table in docs/vectors.md: distance of peft's and our sum from the sum of the products."""
    peft = pytest.importorskip("peft")
    found = {}
    for stabilised in (False, True):
        folder = tmp_path / str(stabilised)
        for name, seed in (("a", 1), ("b", 2)):
            tensors = lora("q_proj", 64, 64, rank=16, seed=seed)
            write_adapter(folder / name, tensors, r=16, lora_alpha=16, use_rslora=stabilised)
        wholes = [
            (4 if stabilised else 1) * (file[f"{PREFIX}q_proj.lora_B.weight"] @ file[f"{PREFIX}q_proj.lora_A.weight"])
            for file in (load_file(folder / name / "adapter_model.safetensors") for name in "ab")
        ]
        expected = wholes[0] + wholes[1]

        class Base(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj = torch.nn.Linear(64, 64, bias=False)

        model = peft.PeftModel.from_pretrained(Base(), folder / "a", adapter_name="a")
        model.load_adapter(folder / "b", adapter_name="b")
        for kind in ("linear", "cat", "svd"):
            rank = {"svd_rank": 32} if kind == "svd" else {}
            model.add_weighted_adapter(["a", "b"], [1.0, 1.0], f"by_{kind}", combination_type=kind, **rank)
            theirs = model.base_model.model.q_proj.get_delta_weight(f"by_{kind}")
            found[kind, stabilised] = ((theirs - expected).norm() / expected.norm()).item()
        both = [str(folder / "a"), str(folder / "b")]
        combine_adapters(both, folder / "out", "task_arithmetic", space="core")
        model.load_adapter(folder / "out", adapter_name="ours")
        ours = model.base_model.model.q_proj.get_delta_weight("ours")
        found["core", stabilised] = ((ours - expected).norm() / expected.norm()).item()
    print(found)
    assert max(found["core", False], found["core", True]) < 1e-5
    assert found["linear", False] > 0.5
    assert min(found["linear", True], found["cat", True], found["svd", True]) > 0.5  # peft 0.21: rsLoRA's scale again
