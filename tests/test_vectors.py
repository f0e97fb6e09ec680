"""Task vectors: exact where they say so, else off by what they say; the same bytes in any cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError, MergekitLiteError, NonFiniteError, PlanError, UsageError
from mergekit_lite.methods import merge_tensors
from mergekit_lite.vectors.apply import apply
from mergekit_lite.vectors.combine import combine
from mergekit_lite.vectors.encoders import split
from mergekit_lite.vectors.extract import Settings, extract
from tests.adapters import folded, lora, write_adapter
from tests.models import State, bytes_of, read_folder, same_bytes, state, tree_bytes, tuned, write_folder

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOSSY = (
    Settings("sparse", density=0.2),
    Settings("sparse", threshold=1e-3),
    Settings("sign"),
    Settings("lowrank", rank=4),
    Settings("lowrank", energy=0.5),
)
Q = "model.layers.0.self_attn.q_proj"
BIG = "model.layers.1.mlp.down_proj.weight"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base (one tensor larger than a block), two models made from it, and another model."""
    monkeypatch.chdir(tmp_path)
    base = state(0, hidden=64, vocabulary=48) | {BIG: torch.randn(1501, 1100).mul(0.02).bfloat16()}
    write_folder(tmp_path / "base", base, shards=2, config=CONFIG)
    for number, name in enumerate(("math", "code"), start=1):
        write_folder(tmp_path / name, tuned(base, number), config=CONFIG)
    write_folder(tmp_path / "other", state(9, hidden=64, vocabulary=48) | {BIG: base[BIG]}, config=CONFIG)
    return tmp_path


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bytes(found[name], tensor), name


def distance(a: State, b: State) -> float:
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in b)) ** 0.5


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
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors")
    assert made.error == 0
    apply(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out")
    assert_same(read_folder(tmp_path / "out"), expected)


@settings(max_examples=200, deadline=None)
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
        extract(tmp_path / before, tmp_path / after, tmp_path / "v.safetensors", force=True)
        apply(tmp_path / before, [str(tmp_path / "v.safetensors")], tmp_path / "out", force=True)
        assert_same(read_folder(tmp_path / "out"), read_folder(tmp_path / after))


def test_tensors_that_are_no_differences(tmp_path: Path) -> None:
    """Integers, tensors that only the tuned model has, a vocabulary that grew; what is the same takes no room."""
    base = state(0) | {"ids": torch.arange(5), "rotary_emb.inv_freq": torch.ones(4)}
    after = tuned(base, 1) | {"ids": torch.arange(5) * 2, "value_head.weight": torch.ones(1, 8)}
    del after["rotary_emb.inv_freq"]
    after["model.norm.weight"] = base["model.norm.weight"]
    after["lm_head.weight"] = torch.cat([after["lm_head.weight"], torch.ones(2, 8).bfloat16()])
    write_folder(tmp_path / "base", base)
    write_folder(tmp_path / "tuned", after)
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors")
    told = "\n".join(made.notes)
    assert made.unchanged == 1 and all(name in told for name in ("value_head", "lm_head", "inv_freq"))
    apply(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out")
    assert_same(read_folder(tmp_path / "out"), after | {"rotary_emb.inv_freq": base["rotary_emb.inv_freq"]})
    with pytest.raises(CheckpointError, match=r"(?s)3 problems.*it can't be scaled"):
        apply(tmp_path / "base", [f"{tmp_path / 'v.safetensors'}:0.5"], tmp_path / "half")
    del base["model.norm.weight"]
    write_folder(tmp_path / "less", base)
    with pytest.raises(PlanError, match=r"model.norm.weight: is in .*tuned, but not in .*less"):
        extract(tmp_path / "tuned", tmp_path / "less", tmp_path / "w.safetensors")


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_tied_heads(tied: str, tmp_path: Path) -> None:
    base, after = state(0), tuned(state(0), 1)
    del {"base": base, "tuned": after}[tied]["lm_head.weight"]
    write_folder(tmp_path / "base", base, config=CONFIG | {"tie_word_embeddings": tied == "base"})
    write_folder(tmp_path / "tuned", after)
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors")
    assert "ties it" in "".join(made.notes)
    apply(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out")
    expected = dict(after)
    expected.setdefault("lm_head.weight", after["model.embed_tokens.weight"])
    assert_same(read_folder(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("how", LOSSY, ids=str)
def test_what_is_thrown_away_is_told(how: Settings, place: Path) -> None:
    made = extract("base", "math", "v.safetensors", how)
    apply("base", ["v.safetensors"], "out", dtype="float32")
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

    def via(how: Settings) -> torch.Tensor:
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors", how, force=True)
        apply(tmp_path / "base", [str(tmp_path / "v.safetensors")], tmp_path / "out", force=True)
        return read_folder(tmp_path / "out")["x.weight"]

    assert via(Settings("sign")).tolist() == [[2, -2, 2, -2], [2, 2, -2, 2]]
    assert via(Settings("sparse", density=0.25)).tolist() == [[0, 0, 0, -4], [0, 0, 0, 5]]
    # four of magnitude 1 share a place: the one with the lowest index is kept
    assert via(Settings("sparse", density=0.5)).tolist() == [[3, -1, 0, -4], [0, 0, 0, 5]]
    assert via(Settings("sparse", threshold=3)).tolist() == [[3, 0, 0, -4], [0, 0, 0, 5]]
    left, values, right = torch.linalg.svd(delta.double())
    best = values[0] * left[:, :1] @ right[:1]
    torch.testing.assert_close(via(Settings("lowrank", rank=1)).double(), best, atol=1e-6, rtol=0)


def test_low_rank_is_near_the_best_and_finds_what_is_there(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shape, rank = (300, 200), 12
    factors = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    base = torch.zeros(shape)
    decaying = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    slow = decaying.U * (torch.arange(1, 201) ** -0.5) @ decaying.Vh
    write_folder(tmp_path / "base", {"x.weight": base, "y.weight": base.clone()})
    write_folder(tmp_path / "tuned", {"x.weight": factors, "y.weight": slow})
    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "v.safetensors", Settings("lowrank", rank=16))
    exact, near = made.tensors
    values = torch.linalg.svdvals(slow.double()).square()
    assert exact.error < 1e-3
    assert near.error == pytest.approx(float((values[16:].sum() / values.sum()) ** 0.5), rel=5e-3)
    by_energy = Settings("lowrank", energy=0.999)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "w.safetensors", by_energy)
    assert load_file(tmp_path / "w.safetensors")["x.weight:left"].shape[1] <= rank


@pytest.mark.parametrize("how", (Settings(), *LOSSY), ids=str)
def test_same_bytes_for_any_threads_and_blocks(how: Settings, place: Path) -> None:
    for threads in (1, 3):
        extract("base", "math", f"{threads}.safetensors", how, threads=threads)
    assert Path("1.safetensors").read_bytes() == Path("3.safetensors").read_bytes()
    for output, block, threads in (("one", 1 << 15, 1), ("three", 1 << 20, 3)):
        apply("base", ["1.safetensors:0.7"], output, block=block, threads=threads)
    assert_same(read_folder(place / "one"), read_folder(place / "three"))


def test_any_run_of_elements_reads_alike(place: Path) -> None:
    from mergekit_lite.checkpoint.reader import Reader
    from tests.checkpoint.reading import read_all

    adapter = write_adapter(place / "adapter", lora(BIG.removesuffix(".weight"), 1501, 1100))
    for number, how in enumerate((Settings(), *LOSSY)):
        extract("base", "math", f"{number}.safetensors", how)
    checkpoint = open_checkpoint(f"base+{adapter}:-0.5+" + "+".join(f"{n}.safetensors:0.3" for n in range(6)))
    whole = read_all(checkpoint)[BIG].flatten()
    with Reader() as reader:
        for start, count in ((0, 1), (65_535, 2), (1099, 3000), (131_073, 70_001), (1501 * 1100 - 5, 5)):
            out = torch.empty(count)
            reader.read(checkpoint.tensors[BIG], start, out)
            assert same_bytes(out, whole[start : start + count]), start


def test_scaled_negated_and_analogous(place: Path) -> None:
    base, math, code = (read_folder(place / name) for name in ("base", "math", "code"))
    write_adapter(place / "adapter", lora(Q, 64, 64))
    for name in ("math", "code"):
        extract("base", name, f"{name}.safetensors")
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


def test_adapters_add_up_as_products(place: Path) -> None:
    """Never A with A and B with B; replaced tensors move by their distance from the base."""
    base = read_folder(place / "base")
    for number in (1, 2):
        whole = {"base_model.model.model.norm.weight": torch.full((64,), float(number)).bfloat16()}
        write_adapter(place / f"a{number}", lora(Q, 64, 64, seed=number) | whole)
    apply("base", ["a1:0.5", "a2:-2"], "out", dtype="float32")
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
    extract("base", "math", "v.safetensors")
    base = read_folder(place / "base")
    write_folder(place / "renamed", base, config=CONFIG)  # one shard instead of two
    apply("renamed", ["v.safetensors"], "out")
    assert_same(read_folder(place / "out"), read_folder(place / "math"))
    for wrong, what in (("other", "weights"), ("code", "weights")):
        with pytest.raises(CheckpointError, match=f"made from base, whose {what} are not those of {wrong}.*--rebase"):
            apply(wrong, ["v.safetensors"], "no")
    apply("code", ["v.safetensors"], "rebased", rebase=True, dtype="float32")
    math, code = read_folder(place / "math"), read_folder(place / "code")
    for name, tensor in read_folder(place / "rebased").items():
        expected = code[name].double() + math[name].double() - base[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-9)


def test_recipes_name_vectors(place: Path) -> None:
    """As with the models they stand for, which are read as float32."""
    for name in ("math", "code"):
        extract("base", name, f"{name}.safetensors")
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
        extract("base", name, f"{name}.safetensors")
    base, *models = (read_folder(place / name) for name in ("base", "math", "code"))
    over = [{name: m[name].double() - base[name].double() for name in base} for m in models]
    zero = {name: torch.zeros_like(tensor) for name, tensor in over[0].items()}
    if method == "slerp":
        with pytest.raises(MergekitLiteError):  # it goes from a base to one model
            combine(["math.safetensors", "code.safetensors"], "v.safetensors", method, parameters)
        return
    combine(["math.safetensors", "code.safetensors"], "v.safetensors", method, parameters, threads=2)
    got = load_file("v.safetensors")
    for name in base:
        own = None if method == "linear" else zero[name].float()
        deltas = [o[name].float() for o in over]
        whole = merge_tensors(method, own, deltas, tensor_name=name, **{"weight": 1.0} | parameters)
        torch.testing.assert_close(got[name], whole, rtol=1e-5, atol=1e-9)
    apply("base", ["v.safetensors"], "out")
    assert all(tensor.dtype == torch.bfloat16 for tensor in read_folder(place / "out").values())


def test_combining_vectors_of_different_tensors_and_bases(place: Path) -> None:
    base = read_folder(place / "base")
    write_folder(place / "partly", base | {BIG: read_folder(place / "math")[BIG]}, config=CONFIG)
    extract("base", "math", "a.safetensors")
    extract("base", "partly", "b.safetensors")
    combine(["a.safetensors", "b.safetensors:-1"], "v.safetensors", "linear", {"weight": 1, "normalize": False})
    got = load_file("v.safetensors")
    assert not got[BIG].any()
    expected = read_folder(place / "math")["model.norm.weight"].double() - base["model.norm.weight"].double()
    torch.testing.assert_close(got["model.norm.weight"].double(), expected, rtol=1e-6, atol=1e-9)
    extract("code", "math", "c.safetensors")
    with pytest.raises(CheckpointError, match=r"c.safetensors: was made from code.*--rebase"):
        combine(["a.safetensors", "c.safetensors"], "w.safetensors", "linear", {"weight": 1})
    combine(["a.safetensors", "c.safetensors"], "w.safetensors", "linear", {"weight": 1}, rebase=True)


def test_outputs_are_never_replaced_or_half_made(place: Path) -> None:
    extract("base", "math", "v.safetensors")
    before = Path("v.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"--force replaces it"):
        extract("base", "code", "v.safetensors")

    def fail(done: int, total: int) -> None:
        if done > 0.7 * total:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        extract("base", "code", "v.safetensors", force=True, progress=fail)
    with pytest.raises(RuntimeError, match="stopped"):
        extract("base", "code", "w.safetensors", Settings("lowrank", energy=0.1), progress=fail)
    assert Path("v.safetensors").read_bytes() == before and not Path("w.safetensors").exists()
    extract("base", "code", "w.safetensors")  # what is left of it is no hindrance
    with pytest.raises(UsageError, match="Inputs are never touched"):
        extract("base", "code", "base/v.safetensors")


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
            Settings(**what)
    with pytest.raises(UsageError, match=r"a \.safetensors file"):
        extract("base", "math", "v")
    with pytest.raises(UsageError, match="an adapter is a folder"):
        extract("base", "math", "v.safetensors", Settings("lora", rank=4))
    math = read_folder(place / "math")
    math["model.norm.weight"][1] = torch.nan
    write_folder(place / "bad", math, config=CONFIG)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        extract("base", "bad", "v.safetensors")
    assert not list(place.glob("v*"))


def test_a_vector_is_no_model(place: Path) -> None:
    extract("base", "math", "v.safetensors")
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
    extract("base", "math", "v.safetensors", Settings("sparse", density=0.3))

    def fail(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        apply("base", ["v.safetensors:0.5"], "out", threads=1, progress=fail)
    apply("base", ["v.safetensors:0.5"], "out", resume=True)
    apply("base", ["v.safetensors:0.5"], "whole")
    trees = [tree_bytes(place / name) for name in ("out", "whole")]
    for tree in trees:
        tree.pop("README.md")
    assert trees[0] == trees[1]
    assert bytes_of(read_folder(place / "out")[BIG]) != bytes_of(read_folder(place / "base")[BIG])


def test_what_is_made_verifies(place: Path) -> None:
    for name in ("math", "code"):
        extract("base", name, f"{name}.safetensors")
    write_adapter(place / "adapter", lora(Q, 64, 64))
    apply("base", ["math.safetensors:0.5", "adapter:-2"], "out")
    sound = CliRunner().invoke(main, ["verify", "out", "--all"])
    assert sound.exit_code == 0, sound.output
    extract("base", "code", "math.safetensors", force=True)
    assert CliRunner().invoke(main, ["verify", "out", "--all"]).exit_code == 1
    combine(["math.safetensors", "code.safetensors"], "v.safetensors", "ties", {"density": 0.5})
    told = CliRunner().invoke(main, ["verify", "v.safetensors"])
    assert "not made again" in told.output
