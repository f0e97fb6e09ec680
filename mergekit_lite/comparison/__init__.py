"""Models looked at and compared: sizes of changes, directions, signs, health."""
