"""Data in and out: rows as other tools have them become answers, scores or rows for training, and rows go to tools."""
