"""Recipes: what the user wants, as data."""

from mergekit_lite.recipe.layers import Output, Outputs, outputs
from mergekit_lite.recipe.recipe import Module, Override, Recipe, Slice, Source
from mergekit_lite.recipe.resolve import Numbers, Resolved, resolve
from mergekit_lite.recipe.schema import parse
from mergekit_lite.recipe.writing import as_data, lasting_text, to_yaml
from mergekit_lite.yaml_document import RecipeError, text_of

__all__ = [
    "Module", "Numbers", "Output", "Outputs", "Override", "Recipe", "RecipeError", "Resolved", "Slice", "Source",
    "as_data", "lasting_text", "outputs", "parse", "resolve", "text_of", "to_yaml",
]  # fmt: skip
