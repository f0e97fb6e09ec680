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

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from mergekit_lite import dtypes
from mergekit_lite.errors import nearest
from mergekit_lite.methods import METHODS
from mergekit_lite.recipe import values
from mergekit_lite.recipe.completeness import lacking, miscounted
from mergekit_lite.recipe.recipe import BACKBONES, NEW_ROWS, Module, Override, Recipe, Slice
from mergekit_lite.recipe.rules import Filter, joined
from mergekit_lite.recipe.sources import WITHOUT_EFFECT, SourcesParser, all_parameters
from mergekit_lite.recipe.values import choice, fields, filter_of, items, text
from mergekit_lite.rounding import ROUNDINGS
from mergekit_lite.yaml_document import Fields, Items, Mark, Node, RecipeError, Remark, Scalar, describe, read

KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "include", "exclude", "backbone", "new_rows", "overrides", "seed", "random_seed",
    "rounding",
)  # fmt: skip
MODULE_KEYS = ("models", "slices", "parameters")
OVERRIDE_KEYS = ("filter", "layers", "merge_method", "parameters")
MIXTURE = "is of recipes of mixtures (mergekit-moe): mergekit-lite moe RECIPE -o OUT builds them"
REFUSED = {
    **{key: f"{key!r} {MIXTURE}" for key in ("experts", "shared_experts", "gate_mode", "experts_per_token")},
    **{key: f"{key}: recipes of mergekit-evolve are not supported yet" for key in ("genome", "tasks")},
}


def parse(content: str, source: str = "The recipe") -> Recipe:
    """Return the recipe in a YAML text. Raises RecipeError with every problem, its place, and the text's ``source``."""
    return recipe_of(read(content, source), source)


def recipe_of(root: Node, source: str, documents: Collection[str] = ()) -> Recipe:
    """Return the recipe in the tree of a document, one of several of these names. Raises RecipeError as ``parse``."""
    parser = _Parser(documents)
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


class _Parser(SourcesParser):
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
        known = {*KEYS, *REFUSED, *WITHOUT_EFFECT, *all_parameters()}
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

    def override(self, node: Node, main: str) -> tuple[Override, dict[str, Node]]:
        misplaced = {name: f"{name!r} is a parameter: put it under 'parameters'" for name in all_parameters()}
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
