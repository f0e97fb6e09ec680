"""Which candidates are tried, what is kept of them, and which one is chosen. Knows no models, only rows."""
