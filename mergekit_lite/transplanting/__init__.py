"""A model with another model's tokenizer: rows of tokens that both have are kept, the others rebuilt from them."""
