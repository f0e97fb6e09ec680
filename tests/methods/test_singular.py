"""Merges by singular vectors: the numbers of the released code, and what holds for any matrices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.methods import merge_states, merge_tensors
from mergekit_lite.methods.contract import TensorInfo
from mergekit_lite.methods.matrices import directions, is_taken
from tests.models import read_folder, write_folder

FIRST = [[0.2, 0, 0, 0.1], [0, 0.1, 0, 0], [0.1, 0, 0.3, 0]]
SECOND = [[0, 0.1, 0.1, 0], [0.2, 0, 0, 0.1], [0, 0.1, 0, 0.2]]
THIRD = [[0.1, 0, 0, 0], [0, 0, 0.1, 0], [0, 0.2, 0, 0]]
# what the released code makes of these deltas in float64
RELEASED = {
    "wudi": [
        [0.0987733, 0.0857267, 0.0441334, 0.0100592],
        [0.1115745, 0.0676144, -0.041117, 0.0650888],
        [-0.0500072, -0.1289075, 0.3343773, 0.3100592],
    ],
    "cart": [
        [0.0271813, 0.0731411, 0.0951944, -0.0484131],
        [0.1275694, -0.0044253, -0.0578124, 0.1483475],
        [0.1696242, 0.0556326, 0.1253724, 0.0278146],
    ],
    "tsv": [
        [0.048643, -0.0080069, 0.1069261, -0.007107],
        [0.0542128, 0.0910984, -0.1452154, 0.2061284],
        [0.163783, 0.0193727, 0.2375564, 0.0752221],
    ],
    "tsv lossless": [
        [0.0982597, 0.0492288, 0.051287, 0.0534806],
        [0.1048788, 0.060261, -0.0110322, 0.0402423],
        [0.0156995, 0.0125279, 0.1957829, 0.1686011],
    ],
    "iso_cts": [
        [-0.0149987, 0.2398645, -0.0870469, 0.1589519],
        [0.2720115, -0.0636166, -0.0211552, 0.1100816],
        [0.0210955, 0.074828, 0.287082, 0.046287],
    ],
    "iso_c": [
        [0.2013146, 0.0356489, 0.0924952, -0.0943678],
        [0.1127909, 0.0886372, -0.1234293, 0.1531207],
        [-0.0249503, 0.040583, 0.1883319, 0.1466992],
    ],
}
PARAMETERS: dict[str, dict[str, object]] = {
    "tsv lossless": {"lossless": True},
    "iso_cts": {"common_space_fraction": 0.5},
}
METHODS = sorted({case.partition(" ")[0] for case in RELEASED})


def merged(case: str, deltas: list[torch.Tensor], **more: object) -> torch.Tensor:
    parameters = {**PARAMETERS.get(case, {}), **more}
    return merge_tensors(case.partition(" ")[0], torch.zeros_like(deltas[0]), deltas, **parameters)


def drawn(seed: int, count: int, shape: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("case", RELEASED)
def test_numbers_of_the_released_code(case: str) -> None:
    matrices = [FIRST, SECOND, THIRD] if case.startswith("cart") else [FIRST, SECOND]
    got = merged(case, [torch.tensor(matrix, dtype=torch.float64) for matrix in matrices])
    torch.testing.assert_close(got, torch.tensor(RELEASED[case], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", RELEASED)
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (1, 9), (7, 7)])
def test_rotations_pass_through(case: str, shape: tuple[int, int]) -> None:
    """Singular vectors of rotated deltas are rotated ones, whichever sign a library gives them."""
    deltas = drawn(3, 3, shape)
    left = torch.linalg.qr(drawn(4, 1, (shape[0], shape[0]))[0])[0]
    right = torch.linalg.qr(drawn(5, 1, (shape[1], shape[1]))[0])[0]
    got = merged(case, [left @ delta @ right for delta in deltas])
    torch.testing.assert_close(got, left @ merged(case, deltas) @ right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", RELEASED)
def test_deltas_of_low_rank_stay_in_their_space(case: str) -> None:
    """Directions that no model changed are not changed, and what a model doesn't change is no trouble."""
    left, right = drawn(6, 2, (9, 2))
    deltas = [left @ torch.diag(scale[0]) @ right.mT for scale in drawn(7, 3, (1, 2))]
    zero = torch.zeros(9, 9, dtype=torch.float64)
    for some in (deltas, [*deltas, zero], [zero, zero]):
        got = merged(case, some)
        space = torch.linalg.qr(left)[0]
        assert got.isfinite().all()
        torch.testing.assert_close(space @ (space.mT @ got), got, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", RELEASED)
def test_what_is_not_finite_is_not_hidden(case: str) -> None:
    for wrong in (float("nan"), float("inf")):
        deltas = drawn(8, 3, (5, 7))
        deltas[1][2, 3] = wrong
        assert not merged(case, deltas).isfinite().any()


@pytest.mark.parametrize("method", METHODS)
def test_only_matrices_of_linear_layers_are_taken(method: str) -> None:
    names = {
        "model.layers.0.mlp.up_proj.weight": (6, 8),
        "model.layers.0.mlp.experts.up_proj": (3, 6, 8),
        "model.norm.weight": (8,),
        "model.embed_tokens.weight": (9, 8),
        "transformer.wte.weight": (9, 8),
        "lm_head.weight": (9, 8),
        "output.weight": (9, 8),
        "model.layers.0.flat.weight": (2, 8),  # fewer rows than models
    }
    states = [{name: torch.randn(shape, generator=torch.Generator().manual_seed(n)) for name, shape in names.items()}
              for n in range(4)]  # fmt: skip
    base, *models = states

    def left_to_the_mean(**parameters: object) -> list[str]:
        merged = merge_states(method, base, models, **parameters)
        mean = merge_states("task_arithmetic", base, models, weight=1 / 3)
        return [name for name in names if torch.allclose(merged[name], mean[name])]

    first, *others = names
    assert left_to_the_mean() == others
    assert left_to_the_mean(matrices="all") == [names for names in others if len(dict(base)[names].shape) != 2
                                                or "flat" in names]  # fmt: skip
    assert left_to_the_mean(matrices="none") == [first, *others]


@pytest.mark.parametrize("case", RELEASED)
def test_streamed_equals_in_memory(case: str, tmp_path: Path) -> None:
    """To the bit, of a matrix that takes several chunks and spans, and with any number of workers."""
    method = case.partition(" ")[0]
    names = {"model.layers.0.mlp.up_proj.weight": (11_003, 97), "model.layers.0.mlp.down_proj.weight": (300, 70)}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in names.items()}
    models = [
        {name: (x + 0.1 * torch.randn(x.shape, generator=generator)).bfloat16() for name, x in base.items()}
        for _ in range(3)
    ]
    for number, state in enumerate([base, *models]):
        write_folder(tmp_path / str(number), state)
    recipe = {
        "merge_method": method,
        "base_model": str(tmp_path / "0"),
        "models": [{"model": str(tmp_path / str(number))} for number in (1, 2, 3)],
        "parameters": PARAMETERS.get(case, {}),
    }
    expected = merge_states(method, base, models, **PARAMETERS.get(case, {}))
    for threads in (1, 2):
        mergekit_lite.merge(recipe, tmp_path / f"out-{threads}", threads=threads)
        got = read_folder(tmp_path / f"out-{threads}")
        assert all(torch.equal(got[name], expected[name]) for name in names)


def test_heads_are_told_from_linear_layers_by_name() -> None:
    heads = ("lm_head", "audio_head", "score", "embed_out", "x.output_layer", "proj_out", "x.emb", "model.output")
    layers = ("single_transformer_blocks.0.proj_out", "h.0.attn.c_proj", "h.0.output")
    for name in (*heads, *layers):
        assert is_taken(TensorInfo(f"{name}.weight", (8, 8), 2, has_base=True), "linear") is (name in layers), name


@pytest.mark.parametrize(("share", "rank", "expected"), [(0.14, 50, 7), (0.29, 100, 29), (0.04, 4, 1), (0, 9, 0)])
def test_shares_of_a_rank_are_those_of_the_numbers_as_written(share: float, rank: int, expected: int) -> None:
    """Directions beyond the share's would be in the result of cart: its rank shows how many were taken."""
    assert math.ceil(directions(share, rank)) == expected
    deltas = [delta[:rank] for delta in drawn(10, 4, (rank, rank + 1))]
    centre = sum(deltas) / 4
    deviation = merged("cart", deltas, p=share) - centre
    assert int(torch.linalg.matrix_rank(deviation)) == min(4 * expected, rank)


def test_cart_of_two_models_is_their_mean() -> None:
    first, second = drawn(9, 2, (6, 8))
    torch.testing.assert_close(merged("cart", [first, second], p=0.5), (first + second) / 2)


@pytest.mark.parametrize(("steps", "expected"), [(0, 0.0641667), (300, 0.0607853), ("exact", 0.0210546)])
def test_loss_of_wudi(steps: object, expected: float) -> None:
    deltas = [torch.tensor(matrix, dtype=torch.float64) for matrix in (FIRST, SECOND)]
    got = merged("wudi", deltas, steps=steps)
    loss = sum(((got - delta) @ delta.mT).square().sum() / delta.square().sum() for delta in deltas)
    assert float(loss) == pytest.approx(expected, abs=5e-8)
    if steps == 300:
        assert float((got - sum(deltas)).abs().max()) == pytest.approx(0.00298, abs=5e-6)
