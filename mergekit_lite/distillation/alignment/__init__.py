"""Two tokenizers side by side: one text in the tokens of both, and one vocabulary in terms of the other."""
