"""The scorers, one file each: a module of this package is a kind of scorer, found by being here."""
