"""Mixtures of experts: built from dense models, and known by the names and settings of the published families."""
