"""Output: files of weights while they are written, their journal, and the small files of a model."""
