"""Output: where bytes will lie, how they get there, and what travels beside the weights."""
