"""The files of one distillation. The stages know each other by these files only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """The folder of one recipe.

    Files in ``samples`` and ``scores`` are ledgers (``answers/ledger.py``):

        prompts.jsonl                       {id, messages, domain, reference, tests}, in the order of the data
        samples/SOURCE.jsonl                {prompt, source, index, text, finish, tokens}
        scores/SCORER/SOURCE.jsonl          {prompt, index, score, why}: a score may be null, why has the reason
        pairs/sft.jsonl                     {prompt, domain, messages, response, source, index, score, scores, rule,
                                            why}
        pairs/target.jsonl                  {prompt, domain}: prompts that the target itself has to answer
        pairs/preference.jsonl              {prompt, domain, messages, chosen: [RESPONSE …],
                                            rejected: [RESPONSE …], gap, rule, why}
        pairs/dropped.jsonl                 {prompt, domain, stage: sft | preference, why, detail}: detail is optional
        pairs/table.json                    counts and losses by domain, as in the FuseChat-3.0 card
        train/sft/  train/preference/       model folders with their logs; STAGE.partial/ until finished
        report/                             report.md, report.html, *.png, report.json; and as above, for the held-out
                                            prompts, prompts.jsonl, samples/MODEL.jsonl and scores/SCORER/MODEL.jsonl

    A RESPONSE is ``{text, source, index, score, scores, role, win}``. Its role is ``source`` (a source model's answer)
    or ``target`` (the target's own). It was ranked by ``score``; ``scores`` has the scores of all scorers. ``win`` is
    the probability that it beats the other answers of its role to the prompt.
    """

    root: Path

    @property
    def prompts(self) -> Path:
        """The prompts as they were when the sample stage first ran."""
        return self.root / "prompts.jsonl"

    def samples(self, source: str) -> Path:
        """Return the file of the answers of one source."""
        return self.root / "samples" / f"{source}.jsonl"

    def scores(self, scorer: str, source: str) -> Path:
        """Return the file of one scorer's scores of the answers of one source."""
        return self.root / "scores" / scorer / f"{source}.jsonl"

    def pairs(self, name: str) -> Path:
        """Return the file of the ``sft``, ``preference``, ``dropped`` or ``target`` rows."""
        return self.root / "pairs" / f"{name}.jsonl"

    def trained(self, stage: str) -> Path:
        """Return the folder of the model that ``sft`` or ``preference`` training makes."""
        return self.root / "train" / stage

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.root / "report"
