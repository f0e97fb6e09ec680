"""Candidates on the stand: weights set in place, answers, log-probabilities, tasks; and what scores them."""
