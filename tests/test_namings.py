"""One model under two namings: extrapolated, merged, as a vector, compared, and held to the same names throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.one_naming import shown_as
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
    """A model with the experts of each layer by themselves."""
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
    """The same with the experts of each layer in two tensors, as transformers 5 has them; or transposed as well."""
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
    """A maker of models whose modules have these beginnings."""

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
    "Qwen-VL": (vision_language("model.", "", "visual."), vision_language("model.language_model.", "", "model.visual.")),
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
            n.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace("model.", "_fsdp_wrapped_module.model.", 1): t
            for n, t in text(seed).items()
        },
    ),
    "DDP of torch.compile": (text, lambda seed: under("module._orig_mod.", text(seed))),
    "experts together": (mixture, lambda seed: stacked(mixture(seed))),
    "experts together, transposed": (mixture, lambda seed: stacked(mixture(seed), turned=True)),
    "experts transposed": (lambda seed: stacked(mixture(seed)), lambda seed: stacked(mixture(seed), turned=True)),
    "Mixtral": (lambda seed: as_mixtral(mixture(seed)), lambda seed: stacked(mixture(seed))),
}  # fmt: skip


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # no part of an output's names


@pytest.fixture(params=[(name, turned) for name in NAMINGS for turned in (False, True)], ids=str)
def folders(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ``a`` and ``b`` under two namings, and ``a_as_b`` under that of ``b``."""
    name, turned = request.param
    one, two = NAMINGS[name][::-1] if turned else NAMINGS[name]
    write_folder(tmp_path / "a", one(0))
    write_folder(tmp_path / "a_as_b", two(0))
    write_folder(tmp_path / "b", tuned(two(0), 1))
    monkeypatch.chdir(tmp_path)


def read(folder: str) -> State:
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in read_folder(Path(folder)).items()
    }


def assert_same(one: str, other: str) -> None:
    made, expected = read(one), read(other)
    assert made.keys() == expected.keys() == read_folder(Path(one)).keys()
    assert [name for name in made if not same_bytes(made[name], expected[name])] == []


@pytest.mark.usefixtures("folders")
def test_every_command_takes_them_as_one_model() -> None:
    a, b = read("a_as_b"), read("b")
    mergekit_lite.extrapolate("a", "b", "out", 0.5)
    mergekit_lite.extrapolate("a_as_b", "b", "expected", 0.5)
    assert_same("out", "expected")
    for name, tensor in read("out").items():
        exact = 1.5 * b[name].double() - 0.5 * a[name].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-7, atol=1e-6)
    assert mergekit_lite.verify("out", samples="all").findings == ()

    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}}
    mergekit_lite.merge(recipe | {"models": [{"model": "b"}, {"model": "a"}]}, "merged")
    mergekit_lite.merge(recipe | {"models": [{"model": "b"}, {"model": "a_as_b"}]}, "expected_merge")
    assert_same("merged", "expected_merge")

    mergekit_lite.extract_vector("b", "a", "v.safetensors")
    mergekit_lite.apply_vectors("b", ["v.safetensors"], "applied")
    assert_same("applied", "a_as_b")

    figures = [mergekit_lite.compare("b", [model]).overall for model in ("a", "a_as_b")]
    assert figures[0] == figures[1]
