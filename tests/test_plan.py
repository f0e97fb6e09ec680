"""The plan: what is merged, copied, left out, refused; all of it known before a weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.errors import PlanError, UsageError
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder, write_many


def folders(tmp_path: Path, sft: State, aligned: State, **config: object) -> tuple[Path, Path]:
    described = {"model_type": "llama", **config}
    return (
        write_folder(tmp_path / "sft", sft, config=described),
        write_folder(tmp_path / "dpo", aligned, config=described),
    )


def planned(tmp_path: Path, sft: State, aligned: State, **options: object) -> mergekit_lite.Plan:
    return mergekit_lite.plan_extrapolation(*folders(tmp_path, sft, aligned), tmp_path / "out", 0.5, **options)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    sft = state(0)
    plan = planned(tmp_path, sft, tuned(sft, 1))
    assert {job.name for job in plan.jobs} == set(sft)
    assert all(job.merged_elements == sft[job.name].numel() for job in plan.jobs)
    assert plan.left_out == ()
    assert plan.bytes_to_read == 2 * sum(tensor.nbytes for tensor in sft.values())


def test_all_disagreements_are_reported_together(tmp_path: Path) -> None:
    sft, aligned = state(0), state(1)
    aligned["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 16).bfloat16()
    aligned["extra.weight"] = torch.zeros(3).bfloat16()
    aligned["model.norm.weight"] = torch.zeros(8, dtype=torch.int64)
    sft["only.sft.weight"] = torch.zeros(3).bfloat16()
    sft["model.layers.1.input_layernorm.weight"] = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(PlanError) as raised:
        planned(tmp_path, sft, aligned, exclude=["nonsense"])
    told = str(raised.value)
    for part in ("up_proj", "[8, 16]", "[16, 8]", "extra.weight", "only.sft.weight", "input_layernorm", "'nonsense'"):
        assert part in told
    assert len(raised.value.problems) == 5


def test_a_grown_vocabulary_is_refused_or_copied(tmp_path: Path) -> None:
    sft = state(0, vocabulary=16)
    aligned = tuned(sft, 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        aligned[name] = torch.cat((aligned[name], torch.ones(3, 8).bfloat16()))
    with pytest.raises(PlanError, match="3 more rows: the vocabulary grew; --new-rows copy"):
        planned(tmp_path, sft, aligned)
    out = tmp_path / "out"
    mergekit_lite.extrapolate(tmp_path / "sft", tmp_path / "dpo", out, 0.5, new_rows="copy")
    got = read_folder(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert same_bytes(got[name][16:], torch.ones(3, 8).bfloat16())
        expected = torch.lerp(aligned[name][:16].float(), sft[name].float(), -0.5).bfloat16()
        assert same_bytes(got[name][:16], expected)


def test_a_shrunk_vocabulary_and_other_shapes_are_refused(tmp_path: Path) -> None:
    sft = state(0, vocabulary=17)
    aligned = state(1, vocabulary=16)
    with pytest.raises(PlanError, match="shape"):
        planned(tmp_path, sft, aligned, new_rows="copy")


def test_a_head_that_only_the_aligned_model_has_is_resolved_through_the_tie(tmp_path: Path) -> None:
    sft, aligned = state(0), state(1)
    del sft["lm_head.weight"]
    plan = planned(tmp_path, sft, aligned)
    head = next(job for job in plan.jobs if job.name == "lm_head.weight")
    assert [spec.name for spec in head.inputs] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_a_head_that_only_the_sft_model_has_is_left_out_and_said_so(tmp_path: Path) -> None:
    sft, aligned = state(0), state(1)
    del aligned["lm_head.weight"]
    plan = planned(tmp_path, sft, aligned)
    assert "lm_head.weight" not in {job.name for job in plan.jobs}
    assert [name for _, name, _ in plan.left_out] == ["lm_head.weight"]
    assert any("lm_head.weight" in note for note in plan.notes)


def test_a_head_is_never_invented(tmp_path: Path) -> None:
    sft, aligned = state(0), state(1)
    del sft["lm_head.weight"], aligned["lm_head.weight"]
    assert "lm_head.weight" not in {job.name for job in planned(tmp_path, sft, aligned).jobs}


def test_integers_and_bools_are_copied_from_the_aligned_model(tmp_path: Path) -> None:
    sft, aligned = state(0), state(1)
    sft |= {"ids": torch.tensor([1, 2]), "flag": torch.tensor([True])}
    aligned |= {"ids": torch.tensor([3, 4]), "flag": torch.tensor([False])}
    mergekit_lite.extrapolate(*folders(tmp_path, sft, aligned), tmp_path / "out", 0.5, out_dtype="float32")
    got = read_folder(tmp_path / "out")
    assert same_bytes(got["ids"], aligned["ids"])
    assert same_bytes(got["flag"], aligned["flag"])
    assert got["model.norm.weight"].dtype == torch.float32


def test_include_exclude_and_alpha_for(tmp_path: Path) -> None:
    sft, aligned = state(0), state(1)
    plan = planned(
        tmp_path,
        sft,
        aligned,
        include=[r"layers\."],
        exclude=["layernorm"],
        alpha_for={r"layers\.0\.": 0.1, "layers": 0.9},
    )
    alphas = {job.name: job.parameters[0]["alpha"] for job in plan.merged}
    assert set(alphas) == {name for name in sft if "layers." in name and "layernorm" not in name}
    assert all(alpha == (0.1 if "layers.0." in name else 0.9) for name, alpha in alphas.items())
    assert {job.why for job in plan.copied} == {"not included", "excluded"}


@pytest.mark.parametrize("options", [{"include": ["("]}, {"alpha_for": {"[": 1.0}}, {"out_dtype": "int8"}])
def test_wrong_options_are_usage_errors(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        planned(tmp_path, state(0), state(1), **options)


def test_layout_is_aligned_and_shards_keep_the_limit(tmp_path: Path) -> None:
    sft = state(0) | {
        "one.f32": torch.zeros(3),
        "two.f64": torch.zeros(1, dtype=torch.float64),
        "u8": torch.zeros(5).byte(),
    }
    plan = planned(tmp_path, sft, sft, shard_size=600)
    assert len(plan.layout.files) > 1
    for file in plan.layout.files:
        assert len(file.tensors) == 1 or sum(tensor.nbytes for tensor in file.tensors) <= 600
        for tensor in file.tensors:
            _, offset = plan.layout.place(tensor.name)
            assert offset % sft[tensor.name].element_size() == 0


def test_shards_are_those_of_the_aligned_model(tmp_path: Path) -> None:
    sft = state(0)
    write_folder(tmp_path / "sft", sft)
    write_folder(tmp_path / "dpo", tuned(sft, 1), shards=3)
    plan = mergekit_lite.plan_extrapolation(tmp_path / "sft", tmp_path / "dpo", tmp_path / "out", 0.5)
    assert [file.name for file in plan.layout.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_planning_reads_no_weights(tmp_path: Path) -> None:
    """The data of both files is cut off and put back as a hole: a plan doesn't notice."""
    sft, dpo = folders(tmp_path, state(0), state(1))
    for folder in (sft, dpo):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        with path.open("wb") as file:
            file.write(content[:header])
            file.truncate(len(content))
    assert len(mergekit_lite.plan_extrapolation(sft, dpo, tmp_path / "out", 0.5).jobs) == len(state(0))


def test_a_model_of_45_000_tensors_is_planned(tmp_path: Path) -> None:
    sft, dpo = (write_many(tmp_path / name, 45_000, seed) for seed, name in enumerate(("sft", "dpo")))
    plan = mergekit_lite.plan_extrapolation(sft, dpo, tmp_path / "out", 0.5)
    assert len(plan.jobs) == 45_000
