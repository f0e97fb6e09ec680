"""Compare the outputs of mergekit and mergekit_lite for the same recipes: ``make parity``."""
