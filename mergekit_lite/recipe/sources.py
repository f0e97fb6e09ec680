"""Models and slices of a recipe: what each names, with which layers and parameters, and the base among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mergekit_lite.errors import nearest
from mergekit_lite.methods import METHODS
from mergekit_lite.methods.parameters import NO_EFFECT, Parameter
from mergekit_lite.recipe import values
from mergekit_lite.recipe.listed_runs import checkpoints
from mergekit_lite.recipe.places import place
from mergekit_lite.recipe.recipe import Slice, Source
from mergekit_lite.recipe.rules import Parameters, Rule, Rules
from mergekit_lite.recipe.values import fields, items, layer_range, rules, text
from mergekit_lite.yaml_document import Fields, Mark, Node, Remark, Scalar, describe

MODEL_KEYS = ("model", "parameters", "statistics", "part", "rename")
SOURCE_KEYS = ("model", "layer_range", "parameters", "statistics", "part", "rename")
MAY_LACK = ("parameters", "statistics", "part", "rename")
RUN_KEYS = ("run", "last", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
VECTORS = ("vector:", "rebase:")  # what references begin with that are added to the base

WITHOUT_EFFECT = {  # keys that mergekit ignores
    "name": "'name' has no effect: it is for recipes of several documents",
    "architecture": "'architecture' has no effect: names come from the models' files",
    "residual_weight": "'residual_weight' has no effect, as in mergekit",
}


@dataclass
class SourcesParser:
    """Reads what a recipe merges; what is wrong, and what has no effect, is gathered for the whole of it."""

    documents: Collection[str] = ()  # the names of documents, which models may be
    problems: list[Remark] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)
    idle: list[Remark] = field(default_factory=list)  # parameters where they have no effect
    used: tuple[str, ...] = ()  # methods of the recipe; empty where one is unknown, so that no parameter is judged
    base: str | None = None
    refused: bool = False  # whether a parameter stands where it can't
    lists_run: bool = False  # whether checkpoints were looked for
    named: dict[str, str] = field(default_factory=dict)  # by its place, what each model was called first

    def slices(self, parts: Mapping[str, Node], at: Mark, what: str = "the recipe") -> tuple[Slice, ...]:
        """Return the slices of a recipe or a module; ``models`` are one."""
        if ("models" in parts) == ("slices" in parts):
            which = "both 'models' and 'slices'" if "models" in parts else "neither 'models' nor 'slices'"
            self.problems.append(Remark(at, f"{what} has {which}: it needs exactly one of them"))
        if "models" in parts:
            models = items(parts["models"], "models", self.problems)
            sources = [source for node in models for source in self.sources(node)]
            return (self.completed(sources, self.base, {}, parts["models"].at),) if sources else ()
        return tuple(self.slice(node) for node in items(parts.get("slices"), "slices", self.problems))

    def slice(self, node: Node) -> Slice:
        """Return an entry of ``slices``."""
        parts = self.fields(node, "a slice", SLICE_KEYS, {})
        if "sources" not in parts and isinstance(node, Fields):
            self.problems.append(Remark(node.at, "the slice has no 'sources'"))
        base = self.base_model(parts) or self.base
        listed = items(parts.get("sources"), "sources", self.problems)
        sources = [self.source(part, "a source", SOURCE_KEYS, base) for part in listed]
        return self.completed(sources, base, self.parameters(parts, self.used), node.at)

    def sources(self, node: Node) -> list[Source]:
        """Return the model that an entry of ``models`` names, or the checkpoints of its run."""
        if not isinstance(node, Fields) or "run" not in {key.text for key, _ in node.entries}:
            return [self.source(node, "a model", MODEL_KEYS, self.base)]
        parts = self.fields(node, "a run", RUN_KEYS, {})
        found = checkpoints(parts["run"], parts.get("last"), self.problems)
        own = self.parameters(parts, self.used, "a run")
        takes_step = any("step" in METHODS[name].parameters for name in self.used if name)
        steps = [{"step": (Rule((float(step),)),)} if takes_step else {} for _, step in found]
        self.lists_run = True
        models = [self.one_name(model) for model, _ in found]
        return [Source(model, None, own | step, at=node.at) for model, step in zip(models, steps, strict=True)]

    def source(self, node: Node, what: str, known: tuple[str, ...], base: str | None) -> Source:
        """Return an entry of ``models`` or of a slice's ``sources``, which may have the known keys."""
        layered = {"layer_range": "layer_range is for the sources of slices: 'models' takes all layers of each model"}
        parts = self.fields(node, what, known, layered)
        for key in known:
            if key not in MAY_LACK and key not in parts and isinstance(node, Fields):
                self.problems.append(Remark(node.at, f"{what} has no {key!r}"))
        model = self.reference(parts, "model") or ""
        if model.startswith(VECTORS):
            if not base:
                needs = f"{model!r} is a task vector: it needs a base_model to be added to"
                self.problems.append(Remark(node.at, needs))
            model = f"{base}+{model}"
        if model:
            model = values.read_as(parts.get("part"), parts.get("rename"), self.problems) + model
        layers = layer_range(parts["layer_range"], "layer_range", self.problems) if "layer_range" in parts else None
        own = self.parameters(parts, self.used, model, model == base)
        return Source(model, layers, own, self.statistics(parts, model), node.at)

    def statistics(self, parts: Mapping[str, Node], model: str) -> str | None:
        """Return the file of a model's statistics, if it has one; where no method reads it, note that."""
        if (node := parts.get("statistics")) is None:
            return None
        if self.used and not any(METHODS[name].statistics for name in self.used):
            no_use = f"{' and '.join(self.used)} reads no statistics: those of {model!r} have no effect"
            self.notes.append(Remark(node.at, no_use))
            return None
        return text(node, "statistics", self.problems) or None

    def completed(self, sources: list[Source], base: str | None, parameters: Parameters, at: Mark) -> Slice:
        """Return the slice with its base among the sources.

        As in mergekit, ``models:`` merges a base that it doesn't list. Slices name their sources themselves: there the
        base joins only where a method has a use for it.
        """
        for index, source in enumerate(sources):
            if source.model and source.model in {earlier.model for earlier in sources[:index]}:
                self.problems.append(Remark(source.at, f"{source.model!r} is listed twice: a model goes in once"))
        listed = [source.model for source in sources]
        continues = bool(self.used) and all(METHODS[name].config_source == "model" for name in self.used)
        if base is not None and listed == [base] and continues:
            self.notes.append(Remark(sources[0].at, f"{base!r} is continued from itself: it is the base_model too"))
            return Slice((*sources, Source(base, sources[0].layers, at=at)), 1, parameters, at)
        ranges = {source.layers for source in sources}
        wanted = ranges == {None} or not all(METHODS[name].merges_base for name in self.used)
        if base is not None and base not in listed and wanted and sources:
            if len(ranges) > 1:
                differ = f"base_model {base!r} is not among the sources and their ranges differ: list it with its own"
                self.problems.append(Remark(at, differ))
            sources, listed = [*sources, Source(base, sources[0].layers, at=at)], [*listed, base]
        return Slice(tuple(sources), listed.index(base) if base in listed else None, parameters, at)

    def parameters(
        self, parts: Mapping[str, Node], methods: tuple[str, ...], model: str | None = None, base: bool = False
    ) -> dict[str, Rules]:
        """Return the parameters of one level: of the model named, else of several."""
        node = parts.get("parameters")
        if node is None or not methods or "" in methods:
            return {}
        if not isinstance(node, Fields):
            self.problems.append(Remark(node.at, f"'parameters' expects a mapping, got {describe(node)}"))
            return {}
        taken: dict[str, Parameter] = {}
        for name in reversed(methods):
            if base and not METHODS[name].merges_base:
                continue
            known = METHODS[name].parameters
            taken |= {key: parameter for key, parameter in known.items() if model is None or parameter.each}
        by_name = {}
        for key, value in node.entries:
            if key.text in NO_EFFECT:
                self.notes.append(Remark(key.at, NO_EFFECT[key.text]))
            elif key.text not in taken:
                self.untaken(key, methods, model, base)
            elif isinstance(value, Scalar) and value.value is None:
                self.problems.append(Remark(key.at, f"{key.text!r} has no value"))
            else:
                by_name[key.text] = rules(value, key.text, taken[key.text], self.problems, self.notes)
        return by_name

    def untaken(self, key: Scalar, methods: tuple[str, ...], model: str | None, base: bool) -> None:
        """Note a parameter that does nothing at this level, as in mergekit; refuse one that no method knows."""
        who = " and ".join(methods)
        verb = "takes" if len(methods) == 1 else "take"
        known = [METHODS[method].parameters for method in methods]
        if any(key.text in each and not each[key.text].each for each in known):
            one = "is one value for all models and has no effect under a model, nor in mergekit"
            self.idle.append(Remark(key.at, f"{key.text!r} {one}: put it under the recipe's 'parameters'"))
        elif base and any(key.text in each for each in known):
            self.idle.append(Remark(key.at, f"{who} {verb} no {key.text!r} of the base model {model!r}: no effect"))
        elif key.text in all_parameters():
            self.idle.append(Remark(key.at, f"{who} {verb} no {key.text!r}: no effect"))
        else:
            self.refused = True
            everything = {name for each in known for name in each}
            hint = nearest(key.text, everything) or (f" Known: {', '.join(sorted(everything))}." if everything else "")
            self.problems.append(Remark(key.at, f"{who} {verb} no parameter {key.text!r}.{hint}"))

    def fields(self, node: Node, what: str, known: tuple[str, ...], refused: Mapping[str, str]) -> dict[str, Node]:
        """Return the values of a mapping by key, as ``values.fields``; what mergekit ignores is noted."""
        if not isinstance(node, Fields):
            return fields(node, what, known, self.problems, refused)
        heeded = []
        for key, value in node.entries:
            if key.text in known or key.text in refused:
                heeded.append((key, value))
            elif key.text in WITHOUT_EFFECT:
                self.notes.append(Remark(key.at, WITHOUT_EFFECT[key.text]))
            elif key.text in all_parameters():
                beside = f"{key.text!r} has no effect beside 'parameters', nor in mergekit: put it under 'parameters'"
                self.idle.append(Remark(key.at, beside))
            else:
                heeded.append((key, value))
        return fields(Fields(tuple(heeded), node.at), what, known, self.problems, refused)

    def reference(self, parts: Mapping[str, Node], name: str) -> str | None:
        """Return a reference: empty where it is wrong, None where the key is missing."""
        if name not in parts:
            return None
        return self.one_name(values.reference(parts[name], name, self.problems, self.notes))

    def one_name(self, reference: str) -> str:
        """Return what a model was called first, so that it is one however it is written."""
        return self.named.setdefault(place(reference, self.documents), reference)

    def base_model(self, parts: Mapping[str, Node]) -> str | None:
        """Return the base like other references; it can't be a task vector."""
        name = self.reference(parts, "base_model")
        if name is not None and name.startswith(VECTORS):
            self.problems.append(Remark(parts["base_model"].at, f"base_model {name!r} is a task vector, not a model"))
            return ""
        return name


def all_parameters() -> frozenset[str]:
    """Return the names of all parameters of all methods."""
    return frozenset(name for method in METHODS.values() for name in method.parameters) | NO_EFFECT.keys()
