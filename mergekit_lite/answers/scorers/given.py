"""Scores that came with the answers: of a data set, or from somebody else's scorer.

The stage that reads the data writes them down. An answer that is left has none.
"""

from __future__ import annotations

from mergekit_lite.answers.scoring.scorer import Judged, Score, Scorer, ScorerOptions, ScorerSettings, scorer


class Options(ScorerOptions):
    """None."""


@scorer("given", judges=False)
class Given(Scorer):
    """No score: those that the data have are there already."""

    def __init__(self, settings: ScorerSettings, options: Options):
        self.name = settings.name

    def score_one(self, judged: Judged) -> Score:
        """Return no score, and why."""
        return Score(None, "the data have no score of it")
