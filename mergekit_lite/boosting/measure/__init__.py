"""Measuring candidates: weights set in place, answers, log-probabilities, tasks, and their scores."""
