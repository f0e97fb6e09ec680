"""Comparisons against closed forms, against a naive second implementation, and against what runs report."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_lite
from mergekit_lite.comparison import deltas, survey
from mergekit_lite.comparison.comparison import Comparison, compare, looks_like
from mergekit_lite.comparison.deltas import CompareSettings
from mergekit_lite.comparison.export import as_data
from mergekit_lite.errors import PlanError
from tests.adapters import lora, write_adapter
from tests.comparison import naive
from tests.models import State, state, tuned, write_folder

SETTINGS = CompareSettings(top_k=0.3, alphas=(0.1, 0.5), dtypes=("bfloat16", "float16"))
NAIVE = {"top_k": 0.3, "alphas": [0.1, 0.5], "dtypes": ["bfloat16", "float16"]}


def models(dtype: torch.dtype = torch.bfloat16, hidden: int = 24, count: int = 3) -> list[State]:
    """A base and models tuned from it, the second one by a step too small for many of bfloat16's weights."""
    base = state(0, dtype, hidden=hidden)
    return [base, *(tuned(base, seed, rms=1e-3 if seed % 2 else 3e-5) for seed in range(1, count + 1))]


def written(folder: Path, states: list[State]) -> list[Path]:
    return [write_folder(folder / f"m{number}", one) for number, one in enumerate(states)]


def compared(folder: Path, states: list[State], settings: CompareSettings = SETTINGS, **how: Any) -> Comparison:
    base, *others = written(folder, states)
    return compare(base, others, **vars(settings), **{"threads": 2} | how)


def close(got: Any, wanted: Any, where: str = "") -> None:
    """Equal up to the last bits, None only where None is wanted."""
    if isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            close(one, other, f"{where}[{number}]")
    elif wanted is None:
        assert got is None, where
    else:
        assert got == pytest.approx(wanted, rel=2e-6, abs=1e-9), where


def test_closed_forms(tmp_path: Path) -> None:
    base = {"w": torch.zeros(2, 4)}
    a = {"w": torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0]])}
    b = {"w": torch.tensor([[-3.0, 0, 0, 0], [0, 4, 0, 0]])}
    [found] = (comparison := compared(tmp_path, [base, a, b], CompareSettings(top_k=0.125, alphas=(0.5,)))).tensors
    figures = comparison.figures(found)
    assert figures.norm == (5, 5) and figures.rms == pytest.approx((math.sqrt(25 / 8),) * 2)
    assert figures.changed == (0.25, 0.25) and figures.varm == figures.sce == (0.5, 0.5)
    assert figures.cosine[0][1] == pytest.approx(7 / 25)
    assert figures.both[0][1] == 0.25 and figures.agree[0][1] == figures.conflict[0][1] == figures.split == 0.5
    assert figures.overlap[0][1] == 1.0  # the 4 in both
    assert figures.stable_rank == pytest.approx((25 / 16, 25 / 16))
    close(figures.effective, [[[0.5, 0.5]], [[0.5, 0.5]]])
    assert figures.sizes[0][0] == 0.75 and figures.sizes[0][45 + 1] == figures.sizes[0][45 + 2] == 0.125


def test_equal_models_have_no_directions(tmp_path: Path) -> None:
    base = state(0)
    figures = compared(tmp_path, [base, base, base]).overall
    assert figures.rms == (0, 0) and figures.varm == (0.5, 0.5)
    assert figures.cosine[0][1] is figures.agree[0][1] is figures.split is figures.overlap[0][1] is None
    assert figures.effective[0][0][0] is None and figures.stable_rank == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tensors_against_the_naive_implementation(dtype: torch.dtype, count: int, tmp_path: Path) -> None:
    states = models(dtype, count=count)
    comparison = compared(tmp_path, states)
    assert comparison.whole and len(comparison.tensors) == len(states[0])
    for entry in comparison.tensors:
        tensors = [one[entry.tensor.name] for one in states]
        wanted = naive.figures(tensors[0], tensors[1:], **NAIVE)
        got = asdict(comparison.figures(entry))
        for name in wanted:
            close(got[name], wanted[name], f"{entry.tensor.name}: {name}")
        if tensors[0].ndim == 2:
            ranks = [naive.stable_rank(one.double() - tensors[0].double()) for one in tensors[1:]]
            close(got["stable_rank"], ranks)
        else:
            assert got["stable_rank"] == (None,) * count


def test_layers_and_totals_are_those_of_the_joined_tensors(tmp_path: Path) -> None:
    states = models()
    comparison = compared(tmp_path, states)
    members = {
        "model.layers.0": [name for name in states[0] if ".0." in name],
        "model.layers.1": [name for name in states[0] if ".1." in name],
        "outside the layers": [name for name in states[0] if ".layers." not in name],
        "all": list(states[0]),
    }
    units = {**comparison.layers, "all": comparison.overall}
    assert units.keys() == members.keys()
    for unit, names in members.items():
        joined = [torch.cat([one[name].flatten() for name in names]) for one in states]
        wanted = naive.figures(joined[0], joined[1:], **NAIVE)
        for name in wanted.keys() - {"overlap", "varm"}:  # masks are a tensor's
            close(asdict(units[unit])[name], wanted[name], f"{unit}: {name}")


def test_sampled_figures_are_those_of_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = models(hidden=48)
    whole = compared(tmp_path, states)
    monkeypatch.setattr(survey, "SAMPLE_ROWS", 8)
    monkeypatch.setattr(survey, "SAMPLE_COLUMNS", 8)
    for module, name, value in ((survey, "CHUNK", 256), (survey, "STATISTICS_BLOCK", 64), (survey, "SECTION", 512)):
        monkeypatch.setattr(module, name, value)
    sampled = compared(tmp_path, states)
    assert not sampled.whole and whole.whole
    for before, after in zip(whole.tensors, sampled.tensors, strict=True):
        tensors = [one[after.tensor.name] for one in states]
        got, exact = asdict(sampled.figures(after)), asdict(whole.figures(before))
        for name in ("norm", "rms", "changed", "cosine", "both", "agree", "conflict", "split", "varm", "sce"):
            close(got[name], exact[name], name)
        if tensors[0].ndim == 2:
            rows, columns = survey.grid(after.tensor, small=True)
            tensors = [one[rows.start :: rows.step, columns.start :: columns.step] for one in tensors]
            close(got["stable_rank"], [naive.stable_rank(one.double() - tensors[0].double()) for one in tensors[1:]])
        else:
            tensors = [one[:: survey.grid(after.tensor, small=True)[1].step] for one in tensors]
        wanted = naive.figures(tensors[0], tensors[1:], **NAIVE)
        for name in ("overlap", "effective", "sizes"):
            close(got[name], wanted[name], f"{after.tensor.name}: {name}")


@pytest.mark.parametrize("shared", [1, 8, 1000])
def test_no_figure_depends_on_the_workers(shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNK", 256), ("STATISTICS_BLOCK", 64), ("SECTION", 128), ("SAMPLE_ROWS", 4)):
        monkeypatch.setattr(survey, name, value)
    monkeypatch.setattr(survey, "MAX_UNSHARED_SECTIONS", shared)  # of tensors of 1 to 25 sections
    states = models(hidden=40)
    found = [compared(tmp_path, states, threads=n, processes=forked) for n in (1, 3) for forked in (False, True)]
    assert len({json.dumps(as_data(comparison)) for comparison in found}) == 1


def test_each_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite.checkpoint.reader import Reader

    states, read = models(), []
    fill = Reader.fill

    def counted(self: Reader, path: Path, offset: int, out: memoryview, tensor: str) -> None:
        read.append((path, tensor, offset, len(out)))
        fill(self, path, offset, out, tensor)

    monkeypatch.setattr(Reader, "fill", counted)
    for name in ("CHUNK", "STATISTICS_BLOCK"):
        monkeypatch.setattr(survey, name, 64)
    compared(tmp_path, states)
    assert sum(count for *_, count in read) == sum(t.nbytes for one in states for t in one.values())
    assert len(set(read)) == len(read) > 4 * len(states[0])


def merged(folder: Path, paths: list[Path], method: str, parameters: str) -> dict[str, dict[str, float]]:
    """The coefficients that a merge reports."""
    others = ", ".join(f"{{model: {path}}}" for path in paths[1:])
    (folder / "r.yml").write_text(
        f"merge_method: {method}\nbase_model: {paths[0]}\nmodels: [{others}]\nparameters: {{{parameters}}}\n"
    )
    finished = mergekit_lite.merge(folder / "r.yml", folder / "out", force=True)
    return {name: dict(of) for name, of in finished.reports[0].coefficients.items()}


@pytest.mark.parametrize("topk", [1.0, 0.25])
def test_coefficients_are_those_that_merges_report(topk: float, tmp_path: Path) -> None:
    states = models()
    paths = written(tmp_path, states)
    comparison = compare(paths[0], paths[1:], select_topk=topk)
    by_tensor = merged(tmp_path, paths, "varm", "granularity: tensor")
    by_layer = merged(tmp_path, paths, "varm", "granularity: layer")
    by_model = merged(tmp_path, paths, "varm", "granularity: model")
    by_sce = merged(tmp_path, paths, "sce", f"select_topk: {topk}")
    for entry in comparison.tensors:
        name = entry.tensor.name
        close(comparison.figures(entry).varm, list(by_tensor[name].values()), name)
        close(entry.sce, list(by_sce[name].values()), name)
        close(comparison.overall.varm, list(by_model[name].values()))
        if entry.tensor.layer is not None:
            close(comparison.layers[f"model.layers.{entry.tensor.layer}"].varm, list(by_layer[name].values()))


def test_the_effective_alpha_is_the_one_that_extrapolation_reports(tmp_path: Path) -> None:
    paths = written(tmp_path, models(count=1))
    comparison = compare(paths[0], paths[1:], alphas=(0.1, 0.3), dtypes=("bfloat16",))
    run = mergekit_lite.extrapolate(paths[0], paths[1], str(tmp_path / "x{alpha}"), (0.1, 0.3))
    for report, [effective] in zip(run.reports, comparison.overall.effective[0], strict=True):
        assert effective == pytest.approx(report.effective, rel=1e-4)
        assert comparison.overall.rms[0] == pytest.approx(report.rms_delta)


def test_the_iterated_rank_is_near_the_true_one() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 300, generator=generator)
    low = torch.randn(100, 3, generator=generator) @ torch.randn(3, 300, generator=generator)
    got = deltas.stable_rank(torch.stack([noise, low, low + 0.01 * noise]) * 1e-6)
    for rank, matrix in zip(got, (noise, low, low + 0.01 * noise), strict=True):
        wanted = naive.stable_rank(matrix)
        assert wanted is not None and 0.999 * wanted <= rank <= 1.1 * wanted
    assert got[1] <= 3.001


def test_what_does_not_fit_is_named_and_the_rest_compared(tmp_path: Path) -> None:
    base, other = state(0), tuned(state(0), 1)
    tied = {name: tensor for name, tensor in other.items() if name != "lm_head.weight"}
    tied["model.embed_tokens.weight"] = torch.cat([tied["model.embed_tokens.weight"], torch.ones(3, 8).bfloat16()])
    tied["model.layers.0.mlp.up_proj.weight"] = torch.ones(4, 4).bfloat16()
    del tied["model.layers.1.mlp.up_proj.weight"]
    tied["extra"] = torch.ones(1).bfloat16()
    base["numbers"] = torch.ones(3, dtype=torch.int64)
    comparison = compared(tmp_path, [base, tied])
    names = {entry.tensor.name for entry in comparison.tensors}
    why = {one.name: one.why for one in comparison.unmatched}
    assert names | why.keys() == base.keys() | {"extra"} and not names & why.keys()
    assert "lm_head.weight" in names and len(comparison.notes) == 3  # the tie, and new rows, twice
    assert "[16, 8] here, [4, 4]" in why["model.layers.0.mlp.up_proj.weight"]
    assert "missing" in why["model.layers.1.mlp.up_proj.weight"] and "int64" in why["numbers"]
    head = next(entry for entry in comparison.tensors if entry.tensor.name == "lm_head.weight")
    wanted = tied["model.embed_tokens.weight"][:16].double() - base["lm_head.weight"].double()
    assert comparison.figures(head).norm[0] == pytest.approx(float(wanted.norm()))


@pytest.mark.filterwarnings("error")
def test_infinity_has_no_share(tmp_path: Path) -> None:
    states = models()
    states[1]["lm_head.weight"][0, 0] = math.inf
    comparison = compared(tmp_path, states)
    assert list(comparison.nonfinite) == ["lm_head.weight"]
    assert all(map(math.isnan, deltas.shares(np.array([math.inf, 1]))))


def test_what_is_wrong_with_many_tensors_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        compared(tmp_path, [state(0, layers=6), state(0, layers=6, hidden=12)])
    _, *problems = raised.value.problems
    assert len(problems) == 4 and "q_proj.weight of" in problems[-1]
    assert "and 5 more tensors: shape [8, 8] here, [12, 12] in" in problems[-1]


@pytest.mark.parametrize("tied", [0, 1])
def test_a_tied_head_is_compared_by_its_embedding(tied: int, tmp_path: Path) -> None:
    states = models(count=1)
    del states[tied]["lm_head.weight"]
    comparison = compared(tmp_path, states)
    [note] = comparison.notes
    assert "lm_head.weight is compared with model.embed_tokens.weight" in note and not comparison.unmatched
    heads = [one.get("lm_head.weight", one["model.embed_tokens.weight"]).double() for one in states]
    found = next(entry for entry in comparison.tensors if entry.tensor.name == "lm_head.weight")
    assert comparison.figures(found).norm[0] == pytest.approx(float((heads[1] - heads[0]).norm()))


def test_an_adapter_is_compared_as_the_model_it_makes(tmp_path: Path) -> None:
    base = state(0, torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    path, tensors = write_folder(tmp_path / "base", base), lora(name, 8, 8)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    comparison = compare(path, [f"{path}+{adapter}"])
    changed = [entry for entry in comparison.tensors if comparison.figures(entry).norm[0]]
    a, b = (tensors[key].double() for key in sorted(tensors))
    [entry] = changed
    assert entry.tensor.name == f"{name}.weight" and entry.stable_rank[0] <= 4.001
    assert comparison.figures(entry).norm[0] == pytest.approx(float((2 * b @ a).norm()), rel=1e-5)


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no tensor of these models can be compared"):
        compared(tmp_path, [{"a": torch.ones(2)}, {"b": torch.ones(2)}])


def test_what_is_not_finite_is_left_out_of_totals(tmp_path: Path) -> None:
    states = models()
    clean = compared(tmp_path, [{n: t for n, t in one.items() if n != "model.norm.weight"} for one in states]).overall
    states[1]["model.norm.weight"][3] = math.nan
    comparison = compared(tmp_path, states, CompareSettings(SETTINGS.top_k, SETTINGS.alphas, SETTINGS.dtypes, 0.5))
    assert comparison.nonfinite == ["model.norm.weight"]
    close(comparison.overall.norm, clean.norm)
    bad = next(entry for entry in comparison.tensors if not entry.sums.finite)
    assert comparison.figures(bad).norm[0] is None and comparison.figures(bad).sce == (None,) * 3
    json.dumps(as_data(comparison), allow_nan=False)


def test_the_bands() -> None:
    told = [looks_like(rms) for rms in (0, 1e-7, 6.3e-6, 2e-4, 1e-2, math.nan)]
    assert len(set(told)) == 6 and "DPO" in told[2] and "SFT" in told[3]
