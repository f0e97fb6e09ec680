"""Where everything of one distillation lies. The stages know each other by these files only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """The folder of one recipe.

    ``samples`` and ``scores`` hold ledgers (``answers/ledger.py``):

        prompts.jsonl                       {id, messages, domain, reference, tests}, in the order of the data
        samples/SOURCE.jsonl                {prompt, source, index, text, finish, tokens}
        scores/SCORER/SOURCE.jsonl          {prompt, index, score, why}: a score may be null, why tells the reason
        pairs/sft.jsonl                     {prompt, domain, messages, response, source, index, score, scores, rule,
                                            why}
        pairs/target.jsonl                  {prompt, domain}: what the target itself has to answer for its pairs
        pairs/preference.jsonl              {prompt, domain, messages, chosen: [RESPONSE …],
                                            rejected: [RESPONSE …], gap, rule, why}
        pairs/dropped.jsonl                 {prompt, domain, stage: sft | preference, why, detail}: detail may lack
        pairs/table.json                    counts and losses by domain, as in the FuseChat-3.0 card
        train/sft/  train/preference/       model folders, with checkpoints and log while they are made
        report/                             report.md, report.html, *.png, report.json; and, as above, prompts.jsonl,
                                            samples/ and scores/ of the held-out prompts, the models for sources

    A RESPONSE is ``{text, source, index, score, scores, role, win}`` with role ``source`` (a source model's) or
    ``target`` (the target's own). ``score`` is what it was ranked by, ``scores`` is what every scorer said, ``win`` how
    probably it beats the other answers of its role to the prompt.
    """

    root: Path

    @property
    def prompts(self) -> Path:
        """The prompts as they were when the first stage ran."""
        return self.root / "prompts.jsonl"

    def samples(self, source: str) -> Path:
        """The answers of one source."""
        return self.root / "samples" / f"{source}.jsonl"

    def scores(self, scorer: str, source: str) -> Path:
        """One scorer's verdicts on the answers of one source."""
        return self.root / "scores" / scorer / f"{source}.jsonl"

    def pairs(self, name: str) -> Path:
        """``sft``, ``preference``, ``dropped`` or ``target`` rows."""
        return self.root / "pairs" / f"{name}.jsonl"

    def trained(self, stage: str) -> Path:
        """The model that ``sft`` or ``preference`` training ends with."""
        return self.root / "train" / stage

    @property
    def report(self) -> Path:
        """The pages and pictures."""
        return self.root / "report"
