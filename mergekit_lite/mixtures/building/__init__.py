"""Mixtures built from dense models, as a recipe of mergekit-moe says, or of one model to be trained further."""
