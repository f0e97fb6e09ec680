"""The same recipes through mergekit and mergekit_lite, and what comes out compared: ``make parity``."""
