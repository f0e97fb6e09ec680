"""Task vectors: what tuning adds to a model, extracted into files, applied and combined."""
