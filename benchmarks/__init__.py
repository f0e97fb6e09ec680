"""The speed and memory tables of the README: ``python -m benchmarks.extrapolate``."""
