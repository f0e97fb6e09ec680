"""Pages and pictures that reports are made of: one HTML file that needs nothing else, plots that take its colours."""
