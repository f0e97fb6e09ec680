"""Task vectors, what a tuned model adds to its base: looked at, compared."""
