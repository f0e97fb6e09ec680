"""The path of a training run: against a naive second implementation, by every way to name one, and as it is shown."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mergekit_lite import extrapolate_run
from mergekit_lite.commands import main
from mergekit_lite.comparison.comparison import compare
from mergekit_lite.comparison.html_report import page
from mergekit_lite.comparison.run_path import by_module, path_along, path_of
from tests.models import State, state, write_folder

STEPS = (20, 25, 75, 100)
RELEX = [[1.0, 2, 0], [2.1, 3.9, 0.1], [2.9, 6.1, -0.1]]  # of the released code, hundredths, at steps 1, 2, 3


def checkpoint(step: int, seed: int) -> State:
    base, draws = state(0, torch.float32), torch.Generator().manual_seed(1000 * seed + step)
    ways = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        + torch.randn(tensor.shape, generator=ways) * step * 1e-4
        + torch.randn(tensor.shape, generator=draws) * 1e-3
        for name, tensor in base.items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("path")
    seed = np.random.default_rng().integers(1000).item()
    print("seed", seed)
    write_folder(root / "base", state(0, torch.float32))
    for step in STEPS:
        write_folder(root / f"run/step-{step}", checkpoint(step, seed))
    (root / "seed").write_text(str(seed))
    return root


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def flat(tensors: State) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([tensor.double().numpy().ravel() for _, tensor in sorted(tensors.items())])


def naive(points: list[np.ndarray[Any, np.dtype[np.float64]]]) -> dict[str, list[Any]]:
    """The figures from the weights themselves: the base, then the checkpoints."""
    deltas = [point - points[0] for point in points[1:]]
    updates = [after - before for before, after in pairwise(points)]

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    def explained(number: int) -> float:
        squares = np.linalg.svd(np.stack(deltas[:number]), compute_uv=False) ** 2
        return float(squares[0] / squares.sum())

    return {
        "norm": [float(np.linalg.norm(delta)) for delta in deltas],
        "moved": [float(np.linalg.norm(update)) for update in updates],
        "turn": [None, *(cosine(a, b) for a, b in pairwise(updates))],
        "toward": [cosine(delta, deltas[-1]) for delta in deltas],
        "updates": [[cosine(a, b) for b in updates] for a in updates],
        "explained": [None, *(explained(number) for number in range(2, len(deltas) + 1))],
    }


def close(got: Any, wanted: Any) -> None:
    for one, other in zip(got, wanted, strict=True):
        if isinstance(other, list):
            close(one, other)
        else:
            assert one is None if other is None else one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_figures_are_those_of_the_weights(place: Path) -> None:
    seed = int((place / "seed").read_text())
    comparison = compare(place / "base", place / "run", run=True)
    assert comparison.steps == STEPS
    states = [state(0, torch.float32), *(checkpoint(step, seed) for step in STEPS)]
    for name, wanted in naive([flat(one) for one in states]).items():
        close(getattr(path_of(comparison), name), wanted)
    paths = by_module(comparison)
    alike = [name for name in states[0] if name.endswith("mlp.up_proj.weight")]
    assert len(alike) > 1
    for name, wanted in naive([flat({key: one[key] for key in alike}) for one in states]).items():
        close(getattr(paths["mlp.up_proj"], name), wanted)


def test_what_relex_explains_is_what_the_path_says(place: Path, tmp_path: Path) -> None:
    comparison = compare(place / "base", place / "run", run=True)
    [report] = extrapolate_run(place / "base", place / "run", tmp_path / "out", 200).reports
    assert report.explained is not None
    shares = dict(report.explained.least)
    for compared in comparison.tensors:
        if (name := compared.tensor.name) in shares:
            assert path_of(comparison, [compared]).explained[-1] == pytest.approx(shares[name], rel=1e-9)
    path = path_of(comparison)
    assert path.bound[-1] == pytest.approx(report.explained.bound)
    deltas = np.array(RELEX) / 100
    of_paper = path_along((1, 2, 3), deltas @ deltas.T)
    assert of_paper.explained[-1] == pytest.approx(0.9992337, abs=5e-8) and of_paper.is_line


def test_every_way_to_name_a_run_is_the_same(place: Path) -> None:
    paths = [place / f"run/step-{step}" for step in STEPS]
    wanted = path_of(compare(place / "base", place / "run", run=True))
    given = [
        compare(place / "base", str(place / "run/step-*"), run=True),
        compare(place / "base", paths[::-1], run=True),
        compare(place / "base", paths[::-1], run=True, steps=STEPS[::-1]),
    ]
    assert all(path_of(one) == wanted for one in given)


def test_no_movement_is_no_figure_and_no_licence() -> None:
    still = path_along((1, 2), np.zeros((2, 2)))
    assert still.norm == (0, 0) and still.explained == still.turn == (None, None) and still.is_line is None
    walk = np.minimum.outer(np.arange(1.0, 9), np.arange(1.0, 9))  # steps without any direction
    assert path_along(tuple(range(1, 9)), walk).is_line is False


def test_the_screen_json_picture_and_page_tell_the_path(place: Path, tmp_path: Path) -> None:
    """Of many checkpoints, too: tables are no wider, and pictures no more."""
    shown = command(place / "base", place / "run", "--run", "--plot", tmp_path / "run.png")
    assert shown.exit_code == 0, shown.stderr
    for part in ("step", "moved", "cosine with update before", "to follow it", "explained by one line", "RMS D"):
        assert part in shown.stdout
    assert "RMS A" not in shown.stdout and "both changed" not in shown.stdout
    assert (tmp_path / "run.png").stat().st_size > 10_000
    told = json.loads(command(place / "base", place / "run", "--run", "--json").stdout)
    assert told["run"]["steps"] == list(STEPS) and told["run"]["explained"][0] is None
    assert told["run"]["modules"]["mlp.up_proj"]["explained"][-1] <= 1
    assert "run" not in json.loads(command(place / "base", place / "run/step-20", "--json").stdout)
    html = page(compare(place / "base", place / "run", run=True))
    for label in ("training step", "norm of the weights", "cosine", "share of variance (%)", "The path of the run"):
        assert label in html
    assert "RMS A" not in html


def test_a_run_that_did_not_move_has_a_page_too(place: Path) -> None:
    html = page(compare(place / "base", [place / "base", place / "base"], run=True, steps=(1, 2)))
    assert "The path of the run" in html and "the very weights of the base" in html


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "run", "--run", "--steps", "1,2"], "a step for each of the 4 checkpoints"),
        (["base", "run/step-20", "run/step-25", "--run", "--steps", "5,5"], "Two checkpoints have step 5"),
        (["base", "run/step-20", "run/step-25", "--run", "--steps=-5,6"], "Steps are counted from 0"),
        (["base", "run/step-20", "run/step-25", "--steps", "5,6"], "compare with --run"),
        (["base", "base", "--run"], "holds no checkpoints"),
        (["base", "none/*", "--run"], "none/*: matches no file or folder"),
        (["base", "base", "run/step-20", "--run"], "don't tell a step"),
    ],
)
def test_what_is_no_run_is_refused(
    arguments: list[str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    ran = command(*arguments)
    assert ran.exit_code == 2 and said in ran.stderr, ran.stderr


def test_many_checkpoints_have_the_figures_of_the_weights(tmp_path: Path) -> None:
    """Of more than sixteen models pieces are shorter, and of more than eight products are of matrices."""
    torch.manual_seed(20)
    base = {"model.layers.0.mlp.up_proj.weight": torch.randn(700, 300)}
    write_folder(tmp_path / "base", base)
    states = [base]
    for step in range(1, 21):
        states.append({name: tensor + torch.randn(tensor.shape) * 1e-3 for name, tensor in states[-1].items()})
        write_folder(tmp_path / f"run/step-{step}", states[-1])
    comparison = compare(tmp_path / "base", tmp_path / "run", run=True, threads=2)
    for name, wanted in naive([flat(one) for one in states]).items():
        close(getattr(path_of(comparison), name), wanted)
    signs = np.sign(np.stack([flat(one) - flat(base) for one in states[1:]]))
    both = (np.abs(signs) @ np.abs(signs).T + signs @ signs.T) / 2 / (np.abs(signs) @ np.abs(signs).T)
    np.testing.assert_allclose(np.array(comparison.overall.agree), both, rtol=1e-9)


def test_many_models_have_the_sampled_figures_of_each(tmp_path: Path) -> None:
    """They are looked at some at a time; the sample is the whole tensor here."""
    torch.manual_seed(21)
    name = "model.layers.0.mlp.up_proj.weight"
    base = torch.randn(70, 90)
    write_folder(tmp_path / "base", {name: base})
    deltas = [torch.randn(70, 90) * 1e-3 for _ in range(20)]
    paths = [write_folder(tmp_path / f"m{number}", {name: base + delta}) for number, delta in enumerate(deltas)]
    together = compare(tmp_path / "base", paths).overall
    for number in (0, 15, 16, 19):
        alone = compare(tmp_path / "base", paths[number]).overall
        close([together.stable_rank[number]], alone.stable_rank)
        close(together.sizes[number], alone.sizes[0])
        for of_dtype, one in zip(together.effective, alone.effective, strict=True):
            close([of_alpha[number] for of_alpha in of_dtype], [of_alpha[0] for of_alpha in one])
    written = [(base + delta) - base for delta in deltas]
    kept = [set(each.abs().flatten().topk(70 * 90 // 5).indices.tolist()) for each in written]
    close([together.overlap[3][18]], [len(kept[3] & kept[18]) / len(kept[3])])
