"""Models in this process, made of plans instead of files: built by transformers, filled by the engine."""
