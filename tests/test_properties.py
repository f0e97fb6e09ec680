"""What holds for any pair of models, any dtype, any number of threads."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import mergekit_lite
from tests.models import State, bytes_of, read_folder, same_bytes, state, tree_bytes, tuned, write_folder

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def patterns(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Random finite bit patterns of a dtype: subnormals, both zeros and huge values among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count, dtype.itemsize), dtype=torch.uint8, generator=generator)
    values = raw.view(dtype).squeeze(1)
    return torch.where(torch.isfinite(values), values, torch.zeros((), dtype=dtype))


def pair(folder: Path, sft: State, aligned: State) -> tuple[Path, Path]:
    save_file(sft, folder / "sft.safetensors")
    save_file(aligned, folder / "aligned.safetensors")
    return folder / "sft.safetensors", folder / "aligned.safetensors"


@settings(max_examples=20)
@given(dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**31), count=st.integers(1, 3000))
def test_alpha_0_and_minus_1_give_the_inputs_bytes(dtype: torch.dtype, seed: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sft, aligned = patterns(dtype, count, seed), patterns(dtype, count, seed + 1)
        paths = pair(folder, {"w": sft}, {"w": aligned})
        mergekit_lite.extrapolate(*paths, folder / "out{alpha}", [0.0, -1.0])
        assert same_bytes(read_folder(folder / "out0")["w"], aligned)
        assert same_bytes(read_folder(folder / "out-1")["w"], sft)


@settings(max_examples=40)
@given(
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    alpha=st.floats(-2, 30).filter(lambda alpha: abs(alpha) > 1e-3),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 0.02, 1.0]),
)
def test_equals_a_float64_reference_rounded_once(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], alpha: float, seed: int, scale: float
) -> None:
    """For every pair of input dtypes and every output dtype.

    16-bit outputs are computed in float32, the others in float64. Where the reference lies within a hair (4 units of
    that dtype's last place, of the terms' size) of the border between two neighbours, either is right; every other
    element has exactly the reference's bits.
    """
    of_sft, of_aligned, of_output = dtypes
    generator = torch.Generator().manual_seed(seed)
    sft = (torch.randn(2000, generator=generator, dtype=torch.float64) * scale).to(of_sft)
    aligned = (sft.double() + torch.randn(2000, generator=generator, dtype=torch.float64) * scale / 20).to(of_aligned)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = pair(folder, {"w": sft}, {"w": aligned})
        mergekit_lite.extrapolate(*paths, folder / "out", alpha, out_dtype=str(of_output).removeprefix("torch."))
        got = read_folder(folder / "out")["w"]
    delta = aligned.double() - sft.double()
    reference = aligned.double() + alpha * delta
    unit = 2.0**-24 if of_output.itemsize == 2 else 2.0**-53
    hair = 4 * unit * (aligned.double().abs() + abs(alpha) * delta.abs())
    low, high = (reference - hair).to(of_output), (reference + hair).to(of_output)
    assert got.dtype == of_output
    assert torch.all((got >= low) & (got <= high))
    clear = low == high
    assert torch.equal(got[clear], reference.to(of_output)[clear])
    assert of_output == torch.float64 or clear.double().mean() > 0.5


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_threads_and_blocks_change_no_byte(tmp_path: Path, rounding: str) -> None:
    sft = state(0, layers=3, hidden=256, vocabulary=2000) | {"odd": torch.linspace(-1, 1, 3_333_331).bfloat16()}
    write_folder(tmp_path / "sft", sft, shards=2)
    write_folder(tmp_path / "dpo", tuned(sft, 1), shards=3)
    trees = []
    for threads, block in itertools.product((1, 2, 5), (1, 1 << 16, 1 << 21)):
        out = tmp_path / f"out-{threads}-{block}" / "model"
        mergekit_lite.extrapolate(
            tmp_path / "sft", tmp_path / "dpo", out, 0.3, threads=threads, block=block, rounding=rounding, seed=5
        )
        trees.append(tree_bytes(out))
    assert all(tree == trees[0] for tree in trees)


def test_several_alphas_give_what_each_gives_alone(tmp_path: Path) -> None:
    sft = state(0)
    write_folder(tmp_path / "sft", sft)
    write_folder(tmp_path / "dpo", tuned(sft, 1))
    alphas = [0.1, 0.5, 8.0]
    mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", tmp_path / "all-{alpha}", alphas)
    for alpha in alphas:
        mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", tmp_path / f"alone-{alpha:g}", alpha)
        together, alone = (read_folder(tmp_path / f"{kind}-{alpha:g}") for kind in ("all", "alone"))
        assert all(same_bytes(together[name], alone[name]) for name in sft)


def test_the_seed_decides_stochastic_rounding(tmp_path: Path) -> None:
    sft = {"w": torch.randn(50_000).bfloat16()}
    paths = pair(tmp_path, sft, tuned(sft, 1))
    outputs = []
    for run, seed in enumerate((1, 1, 2)):
        mergekit_lite.extrapolate(*paths, tmp_path / f"out{run}", 0.3, rounding="stochastic", seed=seed)
        outputs.append(bytes_of(read_folder(tmp_path / f"out{run}")["w"]))
    assert outputs[0] == outputs[1] != outputs[2]


def test_stochastic_rounding_restores_the_effective_alpha(tmp_path: Path) -> None:
    """The simulation of fine-tuning by about one bfloat16 step: alpha 0.3 acts like a third of it, or as asked."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400_000, generator=generator, dtype=torch.float64) * 0.02
    moved = base.bfloat16().double() + torch.randn(400_000, generator=generator, dtype=torch.float64) * 6e-6
    paths = pair(tmp_path, {"w": base.bfloat16()}, {"w": moved.bfloat16()})
    effective = {}
    for rounding in ("nearest", "stochastic"):
        finished = mergekit_lite.extrapolate(*paths, tmp_path / rounding, 0.3, rounding=rounding)
        effective[rounding] = finished.reports[0].effective
    assert effective["nearest"] < 0.1
    assert effective["stochastic"] == pytest.approx(0.3, abs=0.05)
    wide = mergekit_lite.extrapolate(*paths, tmp_path / "wide", 0.3, out_dtype="float32")
    assert wide.reports[0].effective == pytest.approx(0.3, abs=1e-4)
