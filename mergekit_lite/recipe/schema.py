"""The recipe language: mergekit's YAML for one family of models, made strict, and extended.

    merge_method: ties             # required
    models:                        # or slices, or modules; exactly one of the three
      - model: org/tuned@main      # a reference: path, org/name, @revision, +lora; or {model: {path, revision}, lora}
        parameters: {weight: 0.5}  # of this model; precedence: model > slice > recipe > the method's default
    slices:                        # layers of several models behind each other
      - sources:
          - {model: org/a, layer_range: [0, 24], parameters: {weight: 1}}
        base_model: org/base       # for this slice
        parameters: {weight: 1}
    modules:                       # parts of the model, each merged by itself; what is in none is the base's
      text_decoder: {slices: [...]}         # or models; {models: [...], parameters: {...}}
      vision_tower: {models: [...]}         # mergekit's names, or what names of tensors begin with
    base_model: org/base           # with it a model may be vector:v.safetensors, a task vector added to it
    parameters: {normalize: true}
    dtype: bfloat16                # of the output; inputs are not cast to it first (mergekit does)
    out_dtype: float32             # of the output, before dtype
    tokenizer_source: base         # or one of the models, or union, of all tokens; rows move to their tokens
    tokenizer: {source: base, tokens: {"<eot>": {source: org/a, force: true}}, width: max, pad_to_multiple_of: 64}
    chat_template: chatml          # auto, a name, or a template

Values of parameters, gradients and filters: ``rules.py``. Additions to mergekit's language:

      - model: org/llm             # under models or sources: it stands for a part of the base, whose names begin so
        part: model.language_model.
        rename: {transformer.: model.}      # beginnings of its names that are read as others
      - model: org/tuned           # under models or sources: with what 'mergekit-lite statistics' gathered of it
        statistics: tuned-gram.safetensors
      - run: grpo/step-*           # under models: the checkpoints of a training run, by a pattern or in its folder
        last: 10                   # of them; methods that take the step of each model (relex) have it from the names
    include: [mlp, self_attn]      # the tensors that are merged; all others are copied
    exclude: [norm, "regex:^lm_head", {filter: mlp, layers: [0, 4]}]    # tensors that are copied
    overrides:                     # for the tensors of a filter: other parameters, or another method
      - filter: norm               # and/or layers: [first, end]; the first override that matches decides
        merge_method: linear       # default: the recipe's
        parameters: {weight: 1}    # before all other levels; for what they lack those hold too
    seed: 0                        # of everything random (random_seed is read as well)
    rounding: stochastic           # or nearest, the default
    backbone: only                 # embedding and head are copied: for other vocabularies; or all, the default
    new_rows: copy                 # of expo: rows that only the aligned model's vocabulary has; or refuse, the default

Keys that mergekit ignores and that are known (``name``, ``architecture``, a parameter where it does nothing) are notes.
Everything else is an error, and all errors are reported at once. What only mergekit has is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mergekit_lite import dtypes
from mergekit_lite.errors import nearest
from mergekit_lite.methods import METHODS
from mergekit_lite.methods.parameters import NO_EFFECT, Parameter
from mergekit_lite.recipe import values
from mergekit_lite.recipe.completeness import lacking, miscounted
from mergekit_lite.recipe.listed_runs import checkpoints
from mergekit_lite.recipe.recipe import BACKBONES, NEW_ROWS, Module, Override, Recipe, Slice, Source
from mergekit_lite.recipe.rules import Filter, Parameters, Rule, Rules, joined
from mergekit_lite.recipe.values import choice, fields, filter_of, items, layer_range, rules, text
from mergekit_lite.rounding import ROUNDINGS
from mergekit_lite.yaml_document import Fields, Items, Mark, Node, RecipeError, Remark, Scalar, describe, read

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "include", "exclude", "backbone", "new_rows", "overrides", "seed", "random_seed",
    "rounding",
)  # fmt: skip
MODEL_KEYS = ("model", "parameters", "statistics", "part", "rename")
SOURCE_KEYS = ("model", "layer_range", "parameters", "statistics", "part", "rename")
MAY_LACK = ("parameters", "statistics", "part", "rename")
RUN_KEYS = ("run", "last", "parameters")
MODULE_KEYS = ("models", "slices", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
OVERRIDE_KEYS = ("filter", "layers", "merge_method", "parameters")
MIXTURE = "is of recipes of mixtures (mergekit-moe): mergekit-lite moe RECIPE -o OUT builds them"
VECTORS = ("vector:", "rebase:")  # what references begin with that are added to the base
REFUSED = {
    **{key: f"{key!r} {MIXTURE}" for key in ("experts", "shared_experts", "gate_mode", "experts_per_token")},
    **{key: f"{key}: recipes of mergekit-evolve are not supported yet" for key in ("genome", "tasks")},
}

WITHOUT_EFFECT = {  # keys that mergekit ignores
    "name": "'name' has no effect: it is for recipes of several documents",
    "architecture": "'architecture' has no effect: names come from the models' files",
    "residual_weight": "'residual_weight' has no effect, as in mergekit",
}


def parse(content: str, source: str = "The recipe") -> Recipe:
    """Return the recipe in a YAML text. Raises RecipeError with every problem, its place, and the text's ``source``."""
    return recipe_of(read(content, source), source)


def recipe_of(root: Node, source: str) -> Recipe:
    """Return the recipe in the tree of a document. Raises RecipeError as ``parse``."""
    parser = _Parser()
    if not isinstance(root, Fields):
        expected = f"a recipe is a mapping with merge_method and models or slices, got {describe(root)}"
        raise RecipeError(source, [Remark(root.at, expected)])
    recipe = parser.recipe(root)
    if parser.used:
        parser.problems += miscounted(recipe)
        # A misspelt parameter is reported once, not also as one that is missing.
        missing = [] if parser.refused else list(lacking(recipe))
        parser.problems += [*missing, *parser.idle] if missing else []
    if parser.problems:
        raise RecipeError(source, parser.problems)
    return recipe


@dataclass
class _Parser:
    problems: list[Remark] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)
    idle: list[Remark] = field(default_factory=list)  # parameters where they have no effect
    used: tuple[str, ...] = ()  # methods of the recipe; empty where one is unknown, so that no parameter is judged
    base: str | None = None
    refused: bool = False  # whether a parameter stands where it can't
    lists_run: bool = False  # whether checkpoints were looked for

    def recipe(self, root: Node) -> Recipe:
        parts = self.fields(self.unwrapped(self.without_definitions(root)), "the recipe", KEYS, REFUSED)
        main = self.method(parts.get("merge_method"), root.at)
        self.base = self.base_model(parts)
        listed = items(parts.get("overrides"), "overrides", self.problems)
        overrides = [self.override(node, main) for node in listed]
        named = tuple(dict.fromkeys([main, *(override.merge_method for override, _ in overrides)]))
        self.used = named if "" not in named else ()
        modules, slices = self.modules(parts, root.at)
        recipe = Recipe(
            main,
            slices,
            self.base,
            self.parameters(parts, self.used),
            modules=modules,
            overrides=tuple(replace(o, parameters=self.parameters(keys, (o.merge_method,))) for o, keys in overrides),
            include=tuple(self.pattern(node) for node in self.several(parts.get("include"))),
            exclude=tuple(self.pattern(node) for node in self.several(parts.get("exclude"))),
            dtype=values.dtype(parts.get("dtype"), "dtype", self.problems),
            out_dtype=values.dtype(parts.get("out_dtype"), "out_dtype", self.problems, dtypes.OUTPUTS),
            rounding=self.chosen(parts, "rounding", ROUNDINGS),
            seed=values.seed(parts, self.problems, self.notes),
            new_rows=self.chosen(parts, "new_rows", NEW_ROWS),
            backbone=self.chosen(parts, "backbone", BACKBONES),
            chat_template=values.template(parts.get("chat_template"), self.problems),
            notes=(*self.notes, *self.idle),
            lists_run=self.lists_run,
            at=parts["merge_method"].at if "merge_method" in parts else root.at,
        )
        tokenizer, vocabulary = values.tokenizer(parts, recipe.models, self.problems, self.notes)
        return replace(recipe, tokenizer=tokenizer, vocabulary=vocabulary)

    def without_definitions(self, root: Node) -> Node:
        """Return the recipe without keys of its own that only hold what aliases elsewhere stand for, with a note."""
        if not isinstance(root, Fields):
            return root
        known = {*KEYS, *REFUSED, *WITHOUT_EFFECT, *_all_parameters()}
        used = {id(node) for key, value in root.entries if key.text in known for node in _nodes(value)}
        entries = []
        for key, value in root.entries:
            is_own = key.text not in known and not nearest(key.text, KEYS)
            if is_own and any(id(node) in used for node in _nodes(value)):
                self.notes.append(Remark(key.at, f"{key.text!r} has no effect but through its aliases"))
            else:
                entries.append((key, value))
        return Fields(tuple(entries), root.at)

    def unwrapped(self, root: Node) -> Node:
        """Return a recipe whose only module is ``default``, which is the whole model, as one without modules."""
        entries = {key.text: (key, value) for key, value in root.entries} if isinstance(root, Fields) else {}
        _, modules = entries.get("modules", (None, None))
        if not isinstance(modules, Fields) or [key.text for key, _ in modules.entries] != ["default"]:
            return root
        del entries["modules"]
        [(_, module)] = modules.entries
        for key, value in module.entries if isinstance(module, Fields) else ():
            if key.text in entries:
                self.problems.append(Remark(key.at, f"{key.text!r} stands in the module and in the recipe: give one"))
            entries[key.text] = key, value
        return Fields(tuple(entries.values()), root.at)

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
            elif key.text in _all_parameters():
                beside = f"{key.text!r} has no effect beside 'parameters', nor in mergekit: put it under 'parameters'"
                self.idle.append(Remark(key.at, beside))
            else:
                heeded.append((key, value))
        return fields(Fields(tuple(heeded), node.at), what, known, self.problems, refused)

    def method(self, node: Node | None, at: Mark) -> str:
        if node is None:
            self.problems.append(Remark(at, "the recipe has no 'merge_method'"))
            return ""
        name = text(node, "merge_method", self.problems)
        if name in METHODS or not name:
            return name
        hint = nearest(name, METHODS) or f" Known: {', '.join(sorted(METHODS))}."
        self.problems.append(Remark(node.at, f"unknown merge_method {name!r}.{hint}"))
        return ""

    def reference(self, parts: Mapping[str, Node], name: str) -> str | None:
        """Return a reference: empty where it is wrong, None where the key is missing."""
        return values.reference(parts[name], name, self.problems, self.notes) if name in parts else None

    def base_model(self, parts: Mapping[str, Node]) -> str | None:
        """Return the base like other references; it can't be a task vector."""
        name = self.reference(parts, "base_model")
        if name is not None and name.startswith(VECTORS):
            self.problems.append(Remark(parts["base_model"].at, f"base_model {name!r} is a task vector, not a model"))
            return ""
        return name

    def modules(self, parts: Mapping[str, Node], at: Mark) -> tuple[tuple[Module, ...], tuple[Slice, ...]]:
        """Return the modules of a recipe, if it has any, and its slices: those of one module after the other."""
        if "modules" not in parts:
            return (), self.slices(parts, at)
        if others := [repr(key) for key in ("models", "slices") if key in parts]:
            beside = f"the recipe has {' and '.join(others)} beside 'modules': it needs exactly one of them"
            self.problems.append(Remark(at, beside))
        node = parts["modules"]
        if not isinstance(node, Fields) or not node.entries:
            self.problems.append(Remark(node.at, f"'modules' expects a mapping of modules, got {describe(node)}"))
            return (), ()
        modules, slices = [], list[Slice]()
        for key, value in node.entries:
            own = self.fields(value, f"the module {key.text!r}", MODULE_KEYS, {})
            of_module, shared = self.slices(own, value.at, f"the module {key.text!r}"), self.parameters(own, self.used)
            slices += [replace(each, parameters=joined(each.parameters, shared)) for each in of_module]
            modules.append(Module(key.text, len(of_module), key.at))
        return tuple(modules), tuple(slices)

    def slices(self, parts: Mapping[str, Node], at: Mark, what: str = "the recipe") -> tuple[Slice, ...]:
        if ("models" in parts) == ("slices" in parts):
            which = "both 'models' and 'slices'" if "models" in parts else "neither 'models' nor 'slices'"
            self.problems.append(Remark(at, f"{what} has {which}: it needs exactly one of them"))
        if "models" in parts:
            models = items(parts["models"], "models", self.problems)
            sources = [source for node in models for source in self.sources(node)]
            return (self.completed(sources, self.base, {}, parts["models"].at),) if sources else ()
        return tuple(self.slice(node) for node in items(parts.get("slices"), "slices", self.problems))

    def slice(self, node: Node) -> Slice:
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
        return [Source(model, None, own | step, at=node.at) for (model, _), step in zip(found, steps, strict=True)]

    def source(self, node: Node, what: str, known: tuple[str, ...], base: str | None) -> Source:
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
        elif key.text in _all_parameters():
            self.idle.append(Remark(key.at, f"{who} {verb} no {key.text!r}: no effect"))
        else:
            self.refused = True
            everything = {name for each in known for name in each}
            hint = nearest(key.text, everything) or (f" Known: {', '.join(sorted(everything))}." if everything else "")
            self.problems.append(Remark(key.at, f"{who} {verb} no parameter {key.text!r}.{hint}"))

    def override(self, node: Node, main: str) -> tuple[Override, dict[str, Node]]:
        misplaced = {name: f"{name!r} is a parameter: put it under 'parameters'" for name in _all_parameters()}
        parts = fields(node, "an override", OVERRIDE_KEYS, self.problems, misplaced)
        if not {"filter", "layers"} & parts.keys() and isinstance(node, Fields):
            self.problems.append(Remark(node.at, "the override has neither 'filter' nor 'layers'"))
        if not {"merge_method", "parameters"} & parts.keys() and isinstance(node, Fields):
            self.problems.append(Remark(node.at, "the override has neither 'merge_method' nor 'parameters'"))
        name = self.method(parts["merge_method"], node.at) if "merge_method" in parts else main
        return Override(filter_of(parts, self.problems), name, at=node.at), parts

    def several(self, node: Node | None) -> tuple[Node, ...]:
        """Return the entries of a list, or the one thing that stands in its place."""
        return (node,) if isinstance(node, Scalar | Fields) else items(node, "filters", self.problems)

    def pattern(self, node: Node) -> Filter:
        """Return the filter of an entry of ``include`` or ``exclude``."""
        if not isinstance(node, Fields):
            return filter_of({"filter": node}, self.problems)
        parts = fields(node, "a filter", ("filter", "layers"), self.problems)
        if not parts:
            self.problems.append(Remark(node.at, "the filter has neither 'filter' nor 'layers'"))
        return filter_of(parts, self.problems)

    def chosen(self, parts: Mapping[str, Node], name: str, known: tuple[str, ...]) -> str:
        """Return one of the known texts; the first one where the recipe doesn't say."""
        return (choice(parts[name], name, known, self.problems) if name in parts else None) or known[0]


def _nodes(node: Node) -> Iterator[Node]:
    """Yield a value of the document and all that are in it."""
    yield node
    within = [value for _, value in node.entries] if isinstance(node, Fields) else []
    for child in node.items if isinstance(node, Items) else within:
        yield from _nodes(child)


def _all_parameters() -> frozenset[str]:
    """Return the names of all parameters of all methods."""
    return frozenset(name for method in METHODS.values() for name in method.parameters) | NO_EFFECT.keys()
