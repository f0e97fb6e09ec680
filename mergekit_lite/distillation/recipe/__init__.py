"""The recipe of a distillation: its keys (``schema.py``), what contradicts what (``checks.py``), YAML to recipe."""
