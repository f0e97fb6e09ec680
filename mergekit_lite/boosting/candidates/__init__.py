"""Candidates: their tuned parameters and plans. Knows nothing of searching or measuring."""
