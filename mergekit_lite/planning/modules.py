"""Parts of a model that are merged by slices of their own: which tensors are whose, and what the config says of them.

A module goes by mergekit's name for it (``text_decoder``, ``vision_tower`` … of vision-language models; ``encoder``,
``decoder``, ``shared`` of T5 and its kin) or by what its tensors' names begin with; ``default`` is all that no other
module of the recipe has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.errors import nearest
from mergekit_lite.planning.configs import Config, Origin, recounted, relayered
from mergekit_lite.recipe import Module, Outputs, Recipe
from mergekit_lite.recipe import outputs as outputs_of

DEFAULT = "default"
LANGUAGE = ("language_model.", "model.language_model.")
# What the names of a module's tensors begin with, in the layouts of transformers before version 5 and since.
WITH_TOWERS: Mapping[str, tuple[str, ...]] = {
    "text_decoder": (*LANGUAGE, "lm_head."),
    "vision_tower": ("vision_tower.", "model.vision_tower.", "visual.", "model.visual."),
    "vision_model": ("vision_model.", "model.vision_model."),
    "multi_modal_projector": ("multi_modal_projector.", "model.multi_modal_projector.", "visual.merger.",
                              "model.visual.merger.", "model.visual.deepstack_merger_list."),
}  # fmt: skip
ENCODER_DECODER: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder.", "model.encoder."),
    "decoder": ("decoder.", "model.decoder."),
    "shared": ("shared.", "model.shared.", "lm_head."),
}
# Where configs say how many layers a module has: the section, and the keys there.
COUNTED_IN: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "vision_tower": ("vision_config", ("depth", "num_hidden_layers", "num_layers")),
    "vision_model": ("vision_config", ("depth", "num_hidden_layers", "num_layers")),
    "encoder": ("", ("num_layers", "encoder_layers")),
    "decoder": ("", ("num_decoder_layers", "decoder_layers")),
}


@dataclass(frozen=True)
class Modules:
    """The outputs of a recipe with modules.

    Attributes:
        outputs: the tensors of all modules, with ``part`` as the recipe counts its slices.
        layers: how many layers each module has whose layers were moved, by its number.
        outside: tensors of the model that gives the config that are in no module.
    """

    outputs: Outputs
    layers: Mapping[int, int]
    outside: tuple[str, ...]


def outputs_of_modules(
    recipe: Recipe, inputs: Sequence[Checkpoint], config_source: int, promised: Mapping[str, int | None]
) -> Modules:
    """Return what each tensor of the modules of a recipe is made of. Unknown modules are among the problems."""
    source = inputs[config_source]
    known = known_modules(source.tensors)
    owners = _Owners(recipe.modules, known)
    problems = list(_unknown(recipe.modules, known, source))
    tensors, layers, begin = [], dict[int, int](), 0
    for number, module in enumerate(recipe.modules):
        part = slice(begin, begin + module.slices)
        slices, models = recipe.slices[part], {each.model for own in recipe.slices[part] for each in own.sources}
        names = {
            model: [name for name in each.tensors if owners.of(name) == number]
            for model, each in zip(recipe.models, inputs, strict=True)
            if model in models
        }
        empty = [model for model, own in names.items() if not own]
        problems += [f"{model} has no tensor in the module {module.name!r}" for model in empty if not problems]
        if not problems:
            made = outputs_of(slices, names, source.reference, promised)
            problems += [f"module {module.name!r}: {problem}" for problem in made.problems]
            tensors += [each._replace(part=each.part + begin) for each in made.tensors]
            if made.layers is not None:
                layers[number] = made.layers
        begin = part.stop
    outside = tuple(name for name in source.tensors if owners.of(name) is None)
    return Modules(Outputs(tuple(tensors), None, tuple(problems)), layers, outside)


def known_modules(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the modules that a model has of those that mergekit names, with what their tensors' names begin with."""
    names = list(names)

    def has(beginnings: tuple[str, ...]) -> bool:
        return any(name.startswith(beginnings) for name in names)

    towers = {module: own for module, own in WITH_TOWERS.items() if has(own)}
    if towers.keys() - {"text_decoder"}:
        if not has(LANGUAGE):
            towers["text_decoder"] = (*WITH_TOWERS["text_decoder"], "model.")
        return towers
    kin = {module: own for module, own in ENCODER_DECODER.items() if has(own)}
    return kin if {"encoder", "decoder"} <= kin.keys() else {}


class _Owners:
    """Which module of a recipe has a tensor: the one with the longest beginning of its name."""

    def __init__(self, modules: Sequence[Module], known: Mapping[str, tuple[str, ...]]) -> None:
        self.default = next((number for number, module in enumerate(modules) if module.name == DEFAULT), None)
        self.beginnings: dict[str, int | None] = {}
        if any(module.name in known for module in modules):  # others that mergekit names have theirs, listed or not
            self.beginnings = {beginning: None for own in known.values() for beginning in own}
        for number, module in enumerate(modules):
            self.beginnings |= dict.fromkeys(known.get(module.name, (beginning_of(module.name),)), number)

    def of(self, name: str) -> int | None:
        """Return the number of the module that has a tensor; None for that of no module of the recipe."""
        having = [each for each in self.beginnings if name.startswith(each) or name == each.removesuffix(".")]
        owner = self.beginnings[max(having, key=len)] if having else None
        return self.default if owner is None else owner


def beginning_of(module: str) -> str:
    """Return what the names begin with of a module that goes by that."""
    return module.rstrip(".") + "."


def _unknown(modules: Sequence[Module], known: Mapping[str, tuple[str, ...]], source: Checkpoint) -> Iterator[str]:
    first = {".".join(name.split(".")[:depth]) for name in source.tensors for depth in (1, 2)}
    choices = sorted({*known, *(each for each in first if not each.rpartition(".")[2].isdigit())})
    for module in modules:
        beginning = beginning_of(module.name)
        is_there = any(name.startswith(beginning) or name == module.name for name in source.tensors)
        if module.name not in (*known, DEFAULT) and not is_there:
            listed = f" Its modules: {', '.join(known)}." if known else ""
            hint = nearest(module.name, choices)
            yield (
                f"line {module.at.line}: no module {module.name!r} in {source.reference}, where no tensor's name "
                f"begins so.{hint}{listed}"
            )


def config_of_modules(
    recipe: Recipe, inputs: Sequence[Checkpoint], config_source: int, origins: Mapping[int, Sequence[Origin]]
) -> tuple[Config | None, list[str]]:
    """Return the config for modules whose layers were moved, by their numbers, and what the user should know."""
    config = inputs[config_source].config
    notes: list[str] = []
    if config is None or not origins:
        return None, []
    is_known = bool(known_modules(inputs[config_source].tensors))
    for number, layers in origins.items():
        name = recipe.modules[number].name
        kind = _kind(name)
        if kind == "text_decoder" or (not is_known and len(recipe.modules) == 1):
            made, told = relayered(inputs, config_source, layers, config)
            config, notes = made or config, [*notes, *told]
            continue
        section, keys = COUNTED_IN.get(kind, ("", ()))
        counted = recounted(config, section, keys, len(layers))
        if counted is None:
            notes.append(f"config: where it says how many layers {name} has isn't known: set it to {len(layers)}")
        else:
            config, told = counted
            notes += told if list(layers) != [(config_source, layer) for layer in range(len(layers))] else []
    return config, notes


def _kind(name: str) -> str:
    """Return which of the modules that mergekit names one is that goes by what its tensors' names begin with."""
    tables = (*WITH_TOWERS.items(), *ENCODER_DECODER.items())
    return next((kind for kind, own in tables if beginning_of(name).startswith(own)), name)
