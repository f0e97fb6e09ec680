"""Task vectors extracted: exact where they say so, else off by what they say; the same bytes in any cut."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError, NonFiniteError, PlanError, RunError, UsageError
from mergekit_lite.output.workspace import OutputWorkspace
from mergekit_lite.vectors.application import apply_vectors
from mergekit_lite.vectors.encoders import split
from mergekit_lite.vectors.extraction import ExtractSettings, extract_vector
from tests.adapters import lora, write_adapter
from tests.models import read_folder, same_bytes, state, tree_bytes, tuned, write_folder
from tests.vectors.family import BIG, CONFIG, assert_same, distance

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOSSY = (
    ExtractSettings("sparse", density=0.2),
    ExtractSettings("sparse", threshold=1e-3),
    ExtractSettings("sign"),
    ExtractSettings("lowrank", rank=4),
    ExtractSettings("lowrank", energy=0.5),
)


def any_bits(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Finite numbers of all sizes, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(kind)
    values = torch.randint(info.min, info.max, (count,), generator=generator).to(kind).view(dtype)
    values = torch.where(torch.isfinite(values), values, torch.ones_like(values))
    values[::7], values[3::11] = 0.0, -0.0
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("close", [True, False])
def test_dense_gives_the_tuned_model_back_to_the_bit(dtype: torch.dtype, close: bool, tmp_path: Path) -> None:
    base, model = any_bits(dtype, 70_000, 0), any_bits(dtype, 70_000, 1)
    if close:
        model = (base.double() * (1 + 1e-2 * torch.randn(len(base)).double())).to(dtype)
        model = torch.where(torch.isfinite(model), model, base)
    write_folder(tmp_path / "base", {"a.weight": base, "b.weight": base[:0], "c": base[:1].clone().reshape(())})
    expected = {"a.weight": model, "b.weight": base[:0], "c": model[:1].clone().reshape(())}
    write_folder(tmp_path / "tuned", expected)
    made = extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors")
    assert made.error == 0
    apply_vectors(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out")
    assert_same(read_folder(tmp_path / "out"), expected)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        max_size=50,
    )
)
def test_a_difference_is_the_sum_of_two_floats(pairs: list[tuple[float, float]]) -> None:
    base, model = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    rounded, rest = split(base, model, "float32")
    total = base + rounded.double()
    total = torch.where(total == 0, rest.double(), total + rest.double()).float()
    assert torch.equal(total, model.float())
    near = (base.abs() <= 2 * model.abs()) & (model.abs() <= 2 * base.abs()) & (base * model > 0)
    assert not rest[near].any()  # Sterbenz's lemma


def test_dtypes_that_differ(tmp_path: Path) -> None:
    base = state(0, torch.float32)
    narrow = {name: tensor.bfloat16() for name, tensor in tuned(base, 1).items()}
    write_folder(tmp_path / "wide", base)
    write_folder(tmp_path / "narrow", narrow)
    write_folder(tmp_path / "same", {name: tensor.bfloat16() for name, tensor in base.items()})
    for before, after in (("wide", "narrow"), ("narrow", "wide"), ("wide", "same")):
        extract_vector(tmp_path / before, tmp_path / after, tmp_path / "v.safetensors", force=True)
        apply_vectors(tmp_path / before, [str(tmp_path / "v.safetensors")], tmp_path / "out", force=True)
        assert_same(read_folder(tmp_path / "out"), read_folder(tmp_path / after))


def test_a_model_of_another_width_was_not_tuned_from_the_base(tmp_path: Path) -> None:
    """The file would be a copy of the model, called a difference."""
    write_folder(tmp_path / "base", state(0, hidden=64))
    write_folder(tmp_path / "wide", state(0, hidden=96))
    with pytest.raises(PlanError, match=r"no tensor of .*wide has the shape"):
        extract_vector(tmp_path / "base", tmp_path / "wide", tmp_path / "v.safetensors")
    assert not list(tmp_path.glob("v.*"))


def test_tensors_that_are_no_differences(tmp_path: Path) -> None:
    """Integers, tensors that only the tuned model has, a vocabulary that grew; what is the same takes no room."""
    base = state(0) | {"ids": torch.arange(5), "rotary_emb.inv_freq": torch.ones(4)}
    after = tuned(base, 1) | {"ids": torch.arange(5) * 2, "value_head.weight": torch.ones(1, 8)}
    del after["rotary_emb.inv_freq"]
    after["model.norm.weight"] = base["model.norm.weight"]
    after["lm_head.weight"] = torch.cat([after["lm_head.weight"], torch.ones(2, 8).bfloat16()])
    write_folder(tmp_path / "base", base)
    write_folder(tmp_path / "tuned", after)
    made = extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors")
    told = "\n".join(made.notes)
    assert made.unchanged == 1 and all(name in told for name in ("value_head", "lm_head", "inv_freq"))
    apply_vectors(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out")
    assert_same(read_folder(tmp_path / "out"), after | {"rotary_emb.inv_freq": base["rotary_emb.inv_freq"]})
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*it can't be scaled"):
        apply_vectors(tmp_path / "base", [f"{tmp_path / 'v.safetensors'}:0.5"], tmp_path / "half")
    del base["model.norm.weight"]
    write_folder(tmp_path / "less", base)
    with pytest.raises(PlanError, match=r"value_head.weight and model.norm.weight: is in .*tuned, but not in .*less"):
        extract_vector(tmp_path / "tuned", tmp_path / "less", tmp_path / "w.safetensors")


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_tied_heads(tied: str, tmp_path: Path) -> None:
    base, after = state(0), tuned(state(0), 1)
    del {"base": base, "tuned": after}[tied]["lm_head.weight"]
    write_folder(tmp_path / "base", base, config=CONFIG | {"tie_word_embeddings": tied == "base"})
    write_folder(tmp_path / "tuned", after)
    made = extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors")
    assert "ties it" in "".join(made.notes)
    apply_vectors(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out")
    expected = dict(after)
    expected.setdefault("lm_head.weight", after["model.embed_tokens.weight"])
    assert_same(read_folder(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("how", LOSSY, ids=str)
def test_what_is_thrown_away_is_told(how: ExtractSettings, place: Path) -> None:
    made = extract_vector("base", "math", "v.safetensors", **vars(how))
    apply_vectors("base", ["v.safetensors"], "out", dtype="float32")
    base, after = read_folder(place / "base"), read_folder(place / "math")
    actual = distance(read_folder(place / "out"), after) / distance(base, after)
    assert made.error == pytest.approx(actual, rel=1e-4)
    assert sum(kept.nbytes for kept in made.tensors) < 0.8 * sum(t.numel() * 2 for t in base.values())
    told = json.loads((place / "v.safetensors.manifest.json").read_text())
    assert told["error"] == made.error and told["tensors"].keys() == base.keys()


def test_closed_forms(tmp_path: Path) -> None:
    base = torch.zeros(2, 4)
    delta = torch.tensor([[3.0, -1.0, 0.0, -4.0], [1.0, 1.0, -1.0, 5.0]])
    write_folder(tmp_path / "base", {"x.weight": base})
    write_folder(tmp_path / "tuned", {"x.weight": delta})

    def via(how: ExtractSettings) -> torch.Tensor:
        extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors", **vars(how), force=True)
        apply_vectors(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out", force=True)
        return read_folder(tmp_path / "out")["x.weight"]

    assert via(ExtractSettings("sign")).tolist() == [[2, -2, 2, -2], [2, 2, -2, 2]]
    assert via(ExtractSettings("sparse", density=0.25)).tolist() == [[0, 0, 0, -4], [0, 0, 0, 5]]
    # four of magnitude 1 share a place: the one with the lowest index is kept
    assert via(ExtractSettings("sparse", density=0.5)).tolist() == [[3, -1, 0, -4], [0, 0, 0, 5]]
    assert via(ExtractSettings("sparse", threshold=3)).tolist() == [[3, 0, 0, -4], [0, 0, 0, 5]]
    left, values, right = torch.linalg.svd(delta.double())
    best = values[0] * left[:, :1] @ right[:1]
    torch.testing.assert_close(via(ExtractSettings("lowrank", rank=1)).double(), best, atol=1e-6, rtol=0)


def test_low_rank_is_near_the_best_and_finds_what_is_there(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shape, rank = (300, 200), 12
    factors = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    base = torch.zeros(shape)
    decaying = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    slow = decaying.U * (torch.arange(1, 201) ** -0.5) @ decaying.Vh
    write_folder(tmp_path / "base", {"x.weight": base, "y.weight": base.clone()})
    write_folder(tmp_path / "tuned", {"x.weight": factors, "y.weight": slow})
    made = extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors", format="lowrank", rank=16)
    exact, near = made.tensors
    values = torch.linalg.svdvals(slow.double()).square()
    assert exact.error < 1e-3
    assert near.error == pytest.approx(float((values[16:].sum() / values.sum()) ** 0.5), rel=5e-3)
    by_energy = ExtractSettings("lowrank", energy=0.999)
    extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "w.safetensors", **vars(by_energy))
    assert load_file(tmp_path / "w.safetensors")["x.weight:left"].shape[1] <= rank


@pytest.mark.parametrize("how", (ExtractSettings(), *LOSSY), ids=str)
def test_same_bytes_for_any_threads_and_blocks(how: ExtractSettings, place: Path) -> None:
    for threads in (1, 3):
        extract_vector("base", "math", f"{threads}.safetensors", **vars(how), threads=threads)
    assert Path("1.safetensors").read_bytes() == Path("3.safetensors").read_bytes()
    for output, block, threads in (("one", 1 << 15, 1), ("three", 1 << 20, 3)):
        apply_vectors("base", ["1.safetensors:0.7"], output, block=block, threads=threads)
    assert_same(read_folder(place / "one"), read_folder(place / "three"))


def test_any_run_of_elements_reads_alike(place: Path) -> None:
    from mergekit_lite.checkpoint.reader import Reader
    from tests.checkpoint.reading import read_all

    adapter = write_adapter(place / "adapter", lora(BIG.removesuffix(".weight"), 1501, 1100))
    for number, how in enumerate((ExtractSettings(), *LOSSY)):
        extract_vector("base", "math", f"{number}.safetensors", **vars(how))
    checkpoint = open_checkpoint(f"base+{adapter}:-0.5+" + "+".join(f"{n}.safetensors:0.3" for n in range(6)))
    whole = read_all(checkpoint)[BIG].flatten()
    with Reader() as reader:
        for start, count in ((0, 1), (65_535, 2), (1099, 3000), (131_073, 70_001), (1501 * 1100 - 5, 5)):
            out = torch.empty(count)
            checkpoint.tensors[BIG].read(reader, start, out)
            assert same_bytes(out, whole[start : start + count]), start


def stop(done: int, total: int) -> None:
    """Progress that stops a run when a part of the differences is written."""
    if done > 0.8 * total:
        raise RuntimeError("stopped")


def test_outputs_are_never_replaced_or_half_made(place: Path) -> None:
    extract_vector("base", "math", "v.safetensors")
    before = Path("v.safetensors").read_bytes()
    for how in ({}, {"resume": True}):
        with pytest.raises(UsageError, match=r"--force"):
            extract_vector("base", "code", "v.safetensors", **how)
    with pytest.raises(RuntimeError, match="stopped"):
        extract_vector("base", "code", "v.safetensors", force=True, progress=stop)
    assert Path("v.safetensors").read_bytes() == before
    with pytest.raises(RuntimeError, match="stopped"):
        extract_vector("base", "code", "w.safetensors", format="lowrank", energy=0.1, progress=stop)
    assert not Path("w.safetensors").exists()
    with pytest.raises(UsageError, match=r"not finished .*--resume goes on with it, --force starts over"):
        extract_vector("base", "code", "w.safetensors")
    with pytest.raises(RunError, match=r"another plan .*--force starts over"):
        extract_vector("base", "code", "w.safetensors", resume=True)
    extract_vector("base", "code", "w.safetensors", force=True)
    with pytest.raises(UsageError, match="Inputs are never touched"):
        extract_vector("base", "code", "base/v.safetensors")
    assert not list(place.glob(".w*"))


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("how", (ExtractSettings(), *LOSSY, ExtractSettings("lora", rank=4)), ids=str)
def test_a_stopped_run_goes_on_to_the_same_bytes(how: ExtractSettings, damaged: bool, place: Path) -> None:
    names = ("whole", "stopped") if how.format == "lora" else ("whole.safetensors", "stopped.safetensors")
    extract_vector("base", "math", names[0], **vars(how))
    with pytest.raises(RuntimeError, match="stopped"):
        extract_vector("base", "math", names[1], **vars(how), threads=1, progress=stop)
    work = place / f".{names[1]}.partial"
    records = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()[1:]]
    assert 0 < len(records) < 10
    if damaged:
        [file] = (work / "result").glob("*.safetensors")
        content = file.read_bytes()
        file.write_bytes(content[:8] + content[8:].translate(bytes(255 - byte for byte in range(256))))
    with mock.patch.object(OutputWorkspace, "write", autospec=True, side_effect=OutputWorkspace.write) as writes:
        made = extract_vector("base", "math", names[1], **vars(how), resume=True)
    written = {call.args[1] for call in writes.call_args_list}
    again = [kept.name for kept in made.tensors if any(kept.name.removesuffix(".weight") in name for name in written)]
    assert len(again) == len(made.tensors) - (0 if damaged else len(records))
    for kind in ("", ".manifest.json"):
        whole, resumed = (place / f"{name}{kind}" for name in names)
        if whole.is_dir():
            assert tree_bytes(whole) == tree_bytes(resumed)
        elif how.format != "lora":
            assert whole.read_bytes() == resumed.read_bytes()
    assert not work.exists()


def test_what_can_not_be_asked(place: Path) -> None:
    wrong = {
        "takes no --rank": {"rank": 4},
        "takes one of --density": {"format": "sparse"},
        "takes one of --rank": {"format": "lowrank", "rank": 4, "energy": 0.5},
        "up to 1, got 1.5": {"format": "sparse", "density": 1.5},
        "above 0": {"format": "lora", "rank": 0},
        "Unknown format": {"format": "tree"},
    }
    for told, what in wrong.items():
        with pytest.raises(UsageError, match=told):
            ExtractSettings(**what)
    with pytest.raises(UsageError, match=r"a \.safetensors file"):
        extract_vector("base", "math", "v")
    with pytest.raises(UsageError, match="an adapter is a folder"):
        extract_vector("base", "math", "v.safetensors", format="lora", rank=4)
    math = read_folder(place / "math")
    math["model.norm.weight"][1] = torch.nan
    write_folder(place / "bad", math, config=CONFIG)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        extract_vector("base", "bad", "v.safetensors")
    assert not list(place.glob("v*"))
