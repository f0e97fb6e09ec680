"""Task vectors, what a tuned model adds to its base: as files, looked at, compared."""
