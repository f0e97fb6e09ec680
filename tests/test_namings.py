"""One model under two namings: extrapolated, merged, as a vector, compared, and held to the same names throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.naming.alignment import shown_as
from mergekit_lite.checkpoint.naming.transformers_tables import match_names
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.errors import PlanError
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder

EXPERTS, WIDTH, HIDDEN = 3, 6, 8
VISION = {"vision_config": {}, "text_config": {"hidden_size": HIDDEN}}


def text(seed: int) -> State:
    return state(seed, hidden=HIDDEN)


def tower(seed: int) -> State:
    made = {f"encoder.{name}": tensor for name, tensor in state(seed + 10).items() if "layers" in name}
    generator = torch.Generator().manual_seed(seed)
    return made | {"patch_embedding.weight": torch.randn(8, 3, 2, 2, generator=generator).bfloat16()}


def mixture(seed: int) -> State:
    """Return a model with the experts of each layer by themselves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    experts = {
        f"model.layers.{layer}.mlp.experts.{number}.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for layer in range(2)
        for number in range(EXPERTS)
        for name, shape in shapes.items()
    }
    for layer in range(2):
        router = torch.randn(EXPERTS, HIDDEN, generator=generator)
        experts[f"model.layers.{layer}.mlp.gate.weight"] = router.bfloat16()
    return text(seed) | experts


def stacked(tensors: State, turned: bool = False) -> State:
    """Return a mixture with the experts of each layer in two tensors, as transformers 5 has them, or transposed too."""
    made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"

        def all_of(name: str, module: str = module) -> torch.Tensor:
            return torch.stack([tensors[f"{module}.{number}.{name}.weight"] for number in range(EXPERTS)])

        joint = {
            "gate_up_proj": torch.cat([all_of("gate_proj"), all_of("up_proj")], 1),
            "down_proj": all_of("down_proj"),
        }
        made |= {f"{module}.{name}": tensor.mT if turned else tensor for name, tensor in joint.items()}
    return made


def as_mixtral(tensors: State) -> State:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def renamed(name: str) -> str:
        for own, other in names.items():
            name = name.replace(f".{own}.weight", f".{other}.weight") if "experts" in name else name
        return name.replace(".mlp.", ".block_sparse_moe.") if "experts" in name or "gate" in name else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def under(beginning: str, tensors: State) -> State:
    return {beginning + name: tensor for name, tensor in tensors.items()}


def vision_language(language: str, head: str, visual: str) -> Callable[[int], State]:
    """Return a maker of models whose modules have these beginnings."""

    def made(seed: int) -> State:
        tensors = text(seed)
        own = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
        return under(language, own) | {f"{head}lm_head.weight": tensors["lm_head.weight"]} | under(visual, tower(seed))

    return made


# Two ways to name and store one model, made of a seed.
NAMINGS: dict[str, tuple[Callable[[int], State], Callable[[int], State]]] = {
    "Gemma-3": (
        vision_language("language_model.model.", "language_model.", "vision_tower.vision_model."),
        vision_language("model.language_model.", "", "model.vision_tower."),
    ),
    "Qwen-VL": (
        vision_language("model.", "", "visual."),
        vision_language("model.language_model.", "", "model.visual."),
    ),
    "Nemotron-H": (text, lambda seed: {n.replace("model.", "backbone."): t for n, t in text(seed).items()}),
    "GPT-2": (
        lambda seed: {n.replace("model.layers", "h").removeprefix("model."): t for n, t in text(seed).items()},
        lambda seed: {
            n.replace("model.layers", "transformer.h").replace("model.", "transformer."): t
            for n, t in text(seed).items()
        },
    ),
    "FSDP": (
        text,
        lambda seed: {
            name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): tensor
            for name, tensor in under("_fsdp_wrapped_module.", text(seed)).items()
        },
    ),
    "DDP of torch.compile": (text, lambda seed: under("module._orig_mod.", text(seed))),
    "experts together": (mixture, lambda seed: stacked(mixture(seed))),
    "experts together, transposed": (mixture, lambda seed: stacked(mixture(seed), turned=True)),
    "experts transposed": (lambda seed: stacked(mixture(seed)), lambda seed: stacked(mixture(seed), turned=True)),
    "Mixtral": (lambda seed: as_mixtral(mixture(seed)), lambda seed: stacked(mixture(seed))),
}

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # no part of an output's names


def write(one: Callable[[int], State], two: Callable[[int], State]) -> None:
    """Write ``a`` and ``b`` under two namings, and ``a_as_b`` under that of ``b``."""
    write_folder(Path("a"), one(0))
    write_folder(Path("a_as_b"), two(0))
    write_folder(Path("b"), tuned(two(0), 1))


def read(folder: str) -> State:
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in read_folder(Path(folder)).items()
    }


def assert_same(one: str, other: str) -> None:
    made, expected = read(one), read(other)
    assert made.keys() == expected.keys() == read_folder(Path(one)).keys()
    assert [name for name in made if not same_bytes(made[name], expected[name])] == []


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("naming", NAMINGS)
def test_extrapolated(naming: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(*(NAMINGS[naming][::-1] if turned else NAMINGS[naming]))
    mergekit_lite.extrapolate("a", "b", "out", 0.5)
    mergekit_lite.extrapolate("a_as_b", "b", "expected", 0.5)
    assert_same("out", "expected")
    a, b = read("a_as_b"), read("b")
    for name, tensor in read("out").items():
        exact = 1.5 * b[name].double() - 0.5 * a[name].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-7, atol=1e-6)
    assert mergekit_lite.verify("out", samples="all").findings == ()


@settings(max_examples=8)
@given(st.lists(st.sampled_from(["model", "module", "layers", "encoder", "x"]), min_size=1, max_size=3).map(".".join))
def test_a_beginning_changes_no_byte(beginning: str) -> None:
    with TemporaryDirectory() as folder:
        a, b, out, expected = (Path(folder) / name for name in ("a", "b", "out", "expected"))
        write_folder(b, tuned(text(0), 1))
        mergekit_lite.extrapolate(write_folder(a, text(0)), b, expected, 0.5)
        write_folder(a, under(f"{beginning}.", text(0)))
        mergekit_lite.extrapolate(a, b, out, 0.5)
        assert_same(str(out), str(expected))


@pytest.mark.parametrize("naming", ["Gemma-3", "FSDP", "experts together", "Mixtral"])
def test_every_command_takes_them_as_one_model(naming: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(*NAMINGS[naming])

    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    mergekit_lite.merge(recipe | {"models": [{"model": "b"}, {"model": "a"}]}, "merged")
    mergekit_lite.merge(recipe | {"models": [{"model": "b"}, {"model": "a_as_b"}]}, "expected_merge")
    assert_same("merged", "expected_merge")

    mergekit_lite.extract_vector("b", "a", "v.safetensors")
    mergekit_lite.apply_vectors("b", ["v.safetensors"], "applied")
    assert_same("applied", "a_as_b")

    figures = [mergekit_lite.compare("b", [model]).overall for model in ("a", "a_as_b")]
    assert figures[0] == figures[1]


@pytest.fixture
def with_and_without_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ``text``, and ``vision`` that has the same language part under other names and a tower besides."""
    config = {"model_type": "tiny", "hidden_size": HIDDEN}
    write_folder(tmp_path / "text", text(0), config=config)
    seeing = vision_language("language_model.model.", "language_model.", "vision_tower.")(1)
    vision = {"model_type": "tiny_vl", "text_config": config, "vision_config": {"hidden_size": 8}}
    write_folder(tmp_path / "vision", seeing, config=vision)
    monkeypatch.chdir(tmp_path)


def of_language(tensors: State) -> State:
    return {n.removeprefix("language_model."): t for n, t in tensors.items() if n.startswith("language_model.")}


@pytest.mark.usefixtures("with_and_without_tower")
def test_a_tower_that_one_model_alone_has_is_copied_or_left_out() -> None:
    language, vision = read("text"), read("vision")
    number = sum("vision_tower" in name for name in vision)
    for sft, aligned, note in (
        ("text", "vision", f"{number} tensors of vision_tower copied: only vision has that part."),
        ("vision", "text", f"{number} tensors left out: text has no vision_tower."),
    ):
        plan = mergekit_lite.plan_extrapolation(sft, aligned, f"from-{sft}", 0.5)
        assert note in plan.notes
        mergekit_lite.extrapolate(sft, aligned, f"from-{sft}", 0.5)
    towards_vision, towards_text = read("from-text"), read("from-vision")
    assert towards_vision.keys() == vision.keys()
    assert towards_text.keys() == language.keys()
    assert all(same_bytes(towards_vision[name], vision[name]) for name in vision if "vision_tower" in name)
    for made, one, other in (
        (of_language(towards_vision), of_language(vision), language),
        (towards_text, language, of_language(vision)),
    ):
        for name, tensor in made.items():
            exact = 1.5 * one[name].double() - 0.5 * other[name].double()
            torch.testing.assert_close(tensor.double(), exact, rtol=2**-7, atol=1e-6)


@pytest.mark.usefixtures("with_and_without_tower")
def test_a_tower_is_no_part_of_a_vector_for_text() -> None:
    for base, after, note in (
        ("text", "vision", "vision_tower: only vision has it, so it is no part of the vector"),
        ("vision", "text", "vision_tower: only vision has it, and models made with the vector keep it"),
    ):
        extracted = mergekit_lite.extract_vector(base, after, "v.safetensors", force=True)
        assert sum(each.startswith(note) for each in extracted.notes) == 1
        mergekit_lite.apply_vectors(base, ["v.safetensors"], f"as-{after}")
    assert read("as-vision").keys() == read("text").keys()
    assert_same("as-vision", "as-vision")
    applied, vision, language = read("as-text"), read("vision"), read("text")
    assert applied.keys() == vision.keys()
    assert all(same_bytes(tensor, language[name]) for name, tensor in of_language(applied).items())
    assert all(same_bytes(read("as-vision")[name], tensor) for name, tensor in of_language(vision).items())


def test_a_missing_layer_is_no_tower(tmp_path: Path) -> None:
    whole = vision_language("model.", "", "visual.")(0)
    config = {"text_config": {}, "vision_config": {}}
    without = {name: t for name, t in whole.items() if not name.startswith(("visual", "model.layers.0.mlp"))}
    write_folder(tmp_path / "whole", whole, config=config)
    write_folder(tmp_path / "without", without, config={"model_type": "tiny"})
    with pytest.raises(PlanError) as refused:
        mergekit_lite.extrapolate(tmp_path / "without", tmp_path / "whole", tmp_path / "out", 0.5)
    assert refused.value.problems == (
        f"model.layers.0.mlp.up_proj.weight: is missing in {tmp_path / 'without'}; exclude it to take it from "
        f"{tmp_path / 'whole'} as it is",
    )


def test_a_head_that_an_architecture_has_not_is_left_out(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in text(1).items() if "lm_head" not in name}
    write_folder(tmp_path / "lm", text(0), config={"architectures": ["TinyForCausalLM"]})
    write_folder(tmp_path / "embedding", bare, config={"architectures": ["TinyModel"]})
    plan = mergekit_lite.plan_extrapolation(tmp_path / "lm", tmp_path / "embedding", tmp_path / "out", 0.5)
    assert {job.name for job in plan.merged} == bare.keys()
    assert any(note.startswith("lm_head.weight is left out") for note in plan.notes)


@pytest.mark.parametrize("command", ["extrapolate", "merge", "vector", "compare"])
def test_names_that_do_not_fit_are_one_sentence(command: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "a", text(0))
    strange = {name.replace("proj.weight", "kernel"): t for name, t in under("x.", text(0)).items() if "layers" in name}
    write_folder(tmp_path / "b", strange)
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "v.safetensors"))
    with pytest.raises(PlanError) as refused:
        if command == "extrapolate":
            mergekit_lite.extrapolate(a, b, tmp_path / "out", 0.5)
        elif command == "merge":
            recipe = {"merge_method": "slerp", "base_model": a, "parameters": {"t": 0.5}}
            mergekit_lite.merge(recipe | {"models": [{"model": a}, {"model": b}]}, tmp_path / "out")
        elif command == "vector":
            mergekit_lite.extract_vector(a, b, out)
        else:
            mergekit_lite.compare(a, [b])
    sentences = [problem for problem in refused.value.problems if "have no counterpart" in problem]
    assert len(sentences) == 1
    assert "x.model.…" in sentences[0]
    assert len(refused.value.problems) <= 2


def test_an_ambiguous_beginning_is_told(tmp_path: Path) -> None:
    layers = {name.removeprefix("model."): tensor for name, tensor in text(0).items() if "layers" in name}
    write_folder(tmp_path / "two", under("left.", layers) | under("right.", tuned(layers, 1)))
    write_folder(tmp_path / "one", under("x.", layers))
    with pytest.raises(PlanError, match=r"x\. could be left\. or right\. of"):
        mergekit_lite.extrapolate(tmp_path / "one", tmp_path / "two", tmp_path / "out", 0.5)


def test_a_vector_finds_its_tensors_under_other_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", text(0))
    write_folder(tmp_path / "b", tuned(text(0), 1))
    write_folder(tmp_path / "base", under("module.", text(0)))
    vector = tmp_path / "v.safetensors"
    mergekit_lite.extract_vector(tmp_path / "a", tmp_path / "b", vector)
    mergekit_lite.apply_vectors(tmp_path / "base", [str(vector)], tmp_path / "out", rebase=True)
    assert_same(str(tmp_path / "out"), str(tmp_path / "b"))


@pytest.mark.parametrize("naming", ["experts together", "experts together, transposed", "experts transposed"])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_are_read_alike_wherever_they_are_cut(naming: str, turned: bool, tmp_path: Path) -> None:
    one, two = NAMINGS[naming][::-1] if turned else NAMINGS[naming]
    expected = two(0)
    model = open_checkpoint(write_folder(tmp_path / "a", one(0)))
    shown = shown_as(model, open_checkpoint(write_folder(tmp_path / "b", expected)))
    assert shown.tensors.keys() == expected.keys()
    with Reader() as reader:
        for name, spec in shown.tensors.items():
            flat = expected[name].reshape(-1)
            for start in range(0, spec.numel, 7):
                for count in (1, 5, 20, spec.numel):
                    count = min(count, spec.numel - start)
                    assert torch.equal(spec.elements(reader, start, count), flat[start : start + count]), name


def test_quantised_experts_are_stacked(tmp_path: Path) -> None:
    plain, codes, decoded = mixture(0), State(), State()
    for name, tensor in plain.items():
        if ".experts." in name:
            codes[name] = tensor.to(torch.float8_e4m3fn)
            codes[f"{name}_scale"] = torch.full((), 0.25)
            decoded[name] = (codes[name].float() * 0.25).bfloat16()
        else:
            codes[name] = decoded[name] = tensor
    write_folder(tmp_path / "codes", codes)
    write_folder(tmp_path / "decoded", stacked(decoded))
    write_folder(tmp_path / "b", tuned(stacked(plain), 1))
    mergekit_lite.extrapolate(tmp_path / "codes", tmp_path / "b", tmp_path / "out", 0.5)
    mergekit_lite.extrapolate(tmp_path / "decoded", tmp_path / "b", tmp_path / "expected", 0.5)
    assert_same(str(tmp_path / "out"), str(tmp_path / "expected"))
    assert mergekit_lite.verify(tmp_path / "out", samples="all").findings == ()


def test_names_that_transformers_alone_knows(tmp_path: Path) -> None:
    """A ViT as the hub has it and as transformers 5 names it: six names within a layer differ."""
    from transformers import ViTConfig, ViTForImageClassification

    tiny = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**tiny, image_size=4, patch_size=2))
    model.save_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "new", save_original_format=False)
    hub, new = read(str(tmp_path / "hub")), read(str(tmp_path / "new"))
    assert hub.keys() != new.keys()
    mergekit_lite.extrapolate(tmp_path / "hub", tmp_path / "new", tmp_path / "out", 0.5)
    assert_same(str(tmp_path / "out"), str(tmp_path / "new"))  # the same model, so its own extrapolation
    mergekit_lite.extrapolate(tmp_path / "new", tmp_path / "hub", tmp_path / "back", 0.5)
    assert_same(str(tmp_path / "back"), str(tmp_path / "hub"))
    _, loading = ViTForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["GenerationConfig"]},
        {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 10**9},
        {"architectures": ["Qwen3ForCausalLM"], "vision_config": {"depth": 10**9}},
        {"architectures": [7]},
    ],
)
def test_a_config_that_transformers_does_not_know_gives_no_names(config: dict[str, object] | None) -> None:
    assert match_names({}, config, {}, config) is None
