"""Counts and losses of the pair stage by domain, laid out as the FuseChat-3.0 card has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.answers.rows import Prompt, write_text
from mergekit_lite.distillation.pairing.assign import Assignment, Dropped, SftExample, Waiting
from mergekit_lite.distillation.pairing.candidates import Inventory
from mergekit_lite.distillation.pairing.counts import HEADS, AnswerCounts, counts_by_role
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rules import PreferencePair


@dataclass
class Counts:
    """Numbers of one domain's prompts by what they became, and of the answers to them."""

    prompts: int = 0
    sft: int = 0
    preference: int = 0
    waiting: int = 0  # for the target's own answers
    dropped: dict[str, int] = field(default_factory=dict)  # by stage and reason
    answers: dict[str, int] = field(default_factory=dict)  # all of them, and the unusable ones by reason

    @property
    def total(self) -> int:
        """Rows of both stages, with those that wait."""
        return self.sft + self.preference + self.waiting

    @property
    def share(self) -> str:
        """Share of SFT rows, as the card prints it."""
        return f"{100 * self.sft / self.total:.1f}%" if self.total else "–"


@dataclass(frozen=True)
class PairingTable:
    """The counts of each domain and their sum, and of the answers to look at before training."""

    domains: Mapping[str, Counts]
    sources: Mapping[str, AnswerCounts] = field(default_factory=dict)  # the answers there are, by source
    roles: Mapping[str, AnswerCounts] = field(default_factory=dict)  # the answers in the rows: SFT, chosen, rejected

    @property
    def overall(self) -> Counts:
        """The sum over all domains."""
        counts = list(self.domains.values())
        numbers = (sum(getattr(each, name) for each in counts) for name in ("prompts", "sft", "preference", "waiting"))
        return Counts(*numbers, *(_summed(getattr(each, name) for each in counts) for name in ("dropped", "answers")))

    def write(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        rows = {name: _row(counts) for name, counts in self.domains.items()}
        answers = {
            what: {name: {**asdict(each), "mean_length": each.mean_length} for name, each in counts.items()}
            for what, counts in (("sources", self.sources), ("roles", self.roles))
        }
        data = {"domains": rows, "all": _row(self.overall), **answers}
        write_text(path, f"{json.dumps(data, indent=1, ensure_ascii=False)}\n")

    def show(self, reporter: Reporter) -> None:
        """Report the counts as a table, then the losses as another."""
        named = [*self.domains.items(), *([("all", self.overall)] if len(self.domains) > 1 else [])]
        waiting = any(counts.waiting for _, counts in named)
        heads = ["domain", ">prompts", ">dropped", ">total", ">SFT", ">preference", *[">waiting"][: int(waiting)]]
        rows = []
        for name, counts in named:
            figures = [counts.prompts, sum(counts.dropped.values()), counts.total, counts.sft, counts.preference]
            figures += [counts.waiting] if waiting else []
            rows.append([name or "–", *(f"{figure:,}" for figure in figures), counts.share])
        if rows:  # none where the rows are given
            reporter.table([*heads, ">SFT share"], rows)
        losses = [
            [name or "–", f"{number:,}", what]
            for name, counts in self.domains.items()
            for what, number in [*counts.dropped.items(), *counts.answers.items()]
            if what != "answers"
        ]
        if losses:
            reporter.table(["domain", ">lost", "why"], losses)
        for what, looked_at in (("source", self.sources), ("in rows as", self.roles)):
            if looked_at:
                reporter.table([what, *HEADS], [[name, *each.cells] for name, each in looked_at.items()])


def table_of(
    assigned: Mapping[str, Assignment],
    prompts: Mapping[str, Prompt],
    inventory: Inventory,
    rows: Mapping[str, Iterable[Mapping[str, Any]]],
) -> PairingTable:
    """Count assignments, by the prompt's id, the answers there are, and those in the rows that were written."""
    domains: dict[str, Counts] = {}
    for prompt, assignment in assigned.items():
        domain = prompts[prompt].domain
        counts = domains.setdefault(domain, Counts(answers=_answers(inventory.counts.get(domain, Counter()))))
        counts.prompts += 1
        counts.sft += isinstance(assignment, SftExample)
        counts.preference += isinstance(assignment, PreferencePair)
        counts.waiting += isinstance(assignment, Waiting)
        if isinstance(assignment, Dropped):
            why = f"prompts, {assignment.stage}: {assignment.reason.why}"
            counts.dropped[why] = counts.dropped.get(why, 0) + 1
    for counts in domains.values():
        counts.dropped = dict(sorted(counts.dropped.items()))
    return PairingTable(domains, inventory.sources, counts_by_role(rows))


def _answers(counts: Counter[str]) -> dict[str, int]:
    return {what if what == "answers" else f"answers: {what}": counts[what] for what in sorted(counts) if counts[what]}


def _row(counts: Counts) -> dict[str, object]:
    return {"prompts": counts.prompts, "total": counts.total, "share": counts.share, **asdict(counts)}


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))
