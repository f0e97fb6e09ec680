"""A recipe as plain data that YAML can hold: ``schema.parse`` reads it back as an equal recipe."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import yaml

from mergekit_lite.errors import UsageError
from mergekit_lite.recipe.recipe import Recipe, Slice, Source, TokenRow, Vocabulary
from mergekit_lite.recipe.rules import Filter, Parameters, Rule, Rules, joined
from mergekit_lite.yaml_document import dump

Data = dict[str, Any]


def as_data(recipe: Recipe) -> Data:
    """Return a recipe of one output in the recipe language, without what is at its default."""
    whole = not recipe.modules and len(recipe.slices) == 1 and recipe.slices[0].is_whole
    of_slice = recipe.slices[0].parameters if whole else {}
    written = {
        "merge_method": recipe.merge_method,
        "base_model": recipe.base_model,
        "models": [_source(source) for source in _listed(recipe.slices[0])] if whole else None,
        "slices": None if whole or recipe.modules else [_slice(part, recipe.base_model) for part in recipe.slices],
        "modules": _modules(recipe),
        "parameters": _parameters(joined(of_slice, recipe.parameters)),
        "overrides": [
            (_filter(each.filter) or {"filter": "*"})
            | {"merge_method": each.merge_method}
            | _with_parameters(each.parameters)
            for each in recipe.overrides
        ],
        "include": list(map(_filter_or_text, recipe.include)),
        "exclude": list(map(_filter_or_text, recipe.exclude)),
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
        "rounding": recipe.rounding if recipe.rounding != "nearest" else None,
        "seed": recipe.seed,
        "backbone": recipe.backbone if recipe.backbone != "all" else None,
        "new_rows": recipe.new_rows if recipe.new_rows != "refuse" else None,
        "chat_template": recipe.chat_template,
        **_tokenizer(recipe),
    }
    return {name: value for name, value in written.items() if value}


def lasting_text(recipe: Recipe, text: str) -> str:
    """Return a recipe's text; where it stands for a training run, one that names the checkpoints that were found."""
    return to_yaml(as_data(recipe)) if recipe.lists_run else text


def _tokenizer(recipe: Recipe) -> Data:
    """Return the keys of the tokenizer."""
    vocabulary = recipe.vocabulary
    if vocabulary == Vocabulary():
        return {"tokenizer_source": recipe.tokenizer}
    tokens = {row.token: _token(row) for row in vocabulary.tokens}
    written = {
        "source": recipe.tokenizer,
        "tokens": tokens or None,
        "width": vocabulary.width if vocabulary.width != "base" else None,
        "pad_to_multiple_of": vocabulary.pad_to_multiple_of,
    }
    return {"tokenizer": {name: value for name, value in written.items() if value}}


def _token(row: TokenRow) -> Data:
    source: Any = row.model
    if row.zero:
        source = {"kind": "zero"}
    elif row.number is not None:
        source = {"kind": "model_token", "model": row.model, "token_id": row.number}
    elif row.other is not None:
        source = {"kind": "model_token", "model": row.model, "token": row.other}
    return ({"source": source} if source else {}) | ({"force": True} if row.force else {})


def to_yaml(recipe: Mapping[str, Any]) -> str:
    """Return the text of a recipe in plain data. Raises UsageError where it holds what YAML can't."""
    try:
        return dump(dict(recipe), width=1000)
    except yaml.representer.RepresenterError as error:
        raise UsageError(f"A recipe holds texts, numbers, lists and mappings, got {error.args[-1]!r}.") from error


def _listed(part: Slice) -> tuple[Source, ...]:
    """Return the models to list: a base that stands at the end and says nothing is taken for granted."""
    last = len(part.sources) - 1
    says_nothing = not part.sources[last].parameters and part.sources[last].statistics is None
    return part.sources[:last] if part.base == last > 0 and says_nothing else part.sources


def _modules(recipe: Recipe) -> Data:
    """Return what makes each module."""
    modules, slices = {}, iter(recipe.slices)
    for module in recipe.modules:
        own = list(islice(slices, module.slices))
        if len(own) == 1 and own[0].is_whole and own[0].base in (None, _base_of(recipe, own[0])):
            listed = [_source(source) for source in _listed(own[0])]
            modules[module.name] = {"models": listed, **_with_parameters(own[0].parameters)}
        else:
            modules[module.name] = {"slices": [_slice(part, recipe.base_model) for part in own]}
    return modules


def _base_of(recipe: Recipe, part: Slice) -> int | None:
    """Return which source of a slice is the recipe's base."""
    models = [source.model for source in part.sources]
    return models.index(recipe.base_model) if recipe.base_model in models else None


def _slice(part: Slice, base_model: str | None) -> Data:
    written: Data = {"sources": [_source(source) for source in part.sources]}
    if part.base is not None and part.sources[part.base].model != base_model:
        written["base_model"] = part.sources[part.base].model
    return written | _with_parameters(part.parameters)


def _source(source: Source) -> Data:
    layers = {"layer_range": list(source.layers)} if source.layers is not None else {}
    statistics = {"statistics": source.statistics} if source.statistics is not None else {}
    return {"model": source.model, **layers, **statistics} | _with_parameters(source.parameters)


def _with_parameters(parameters: Parameters) -> Data:
    return {"parameters": _parameters(parameters)} if parameters else {}


def _parameters(parameters: Parameters) -> Data:
    return {name: _rules(rules) for name, rules in parameters.items()}


def _rules(rules: Rules) -> Any:
    if len(rules) == 1 and rules[0].filter.matches_all:
        return _value(rules[0])
    return [_filter(rule.filter) | {"value": _value(rule)} for rule in rules]


def _value(rule: Rule) -> Any:
    return rule.values[0] if len(rule.values) == 1 else list(rule.values)


def _filter(pattern: Filter) -> Data:
    """Return the keys of a filter; none where it matches everything."""
    name: Data = {"filter": pattern.text} if pattern.text != "*" else {}
    return name | ({"layers": list(pattern.layers)} if pattern.layers is not None else {})


def _filter_or_text(pattern: Filter) -> Any:
    return pattern.text if pattern.layers is None else _filter(pattern)
