"""Mixtures of experts, known by the names and settings of the published families: built, and remade."""
