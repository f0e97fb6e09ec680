"""The search for a candidate: what to try next, the study of measured rows, the choice. Knows no models."""
