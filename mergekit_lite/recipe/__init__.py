"""Recipes: what the user wants, as data."""

from mergekit_lite.recipe.recipe import Recipe, Setting

__all__ = ["Recipe", "Setting"]
