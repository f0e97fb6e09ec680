"""Task vectors as files: made from two models, added to models, combined with each other."""
