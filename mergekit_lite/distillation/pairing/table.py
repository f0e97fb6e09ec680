"""Counts and losses of the pair stage by domain, laid out as the FuseChat-3.0 card has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mergekit_lite.answers.rows import Prompt, write_text
from mergekit_lite.distillation.assign import Fate, Lost, Sft, Waiting
from mergekit_lite.distillation.reporter import Tell
from mergekit_lite.distillation.rules import Pair


@dataclass
class Counts:
    """Of one domain, in prompts but for ``answers``.

    Attributes:
        prompts: that were asked.
        sft: that became SFT rows.
        preference: that became preference rows.
        waiting: that wait for the target's own answers.
        dropped: by stage and reason.
        answers: of the sources and of the target: all, and what kept some of them from use.
    """

    prompts: int = 0
    sft: int = 0
    preference: int = 0
    waiting: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows of both stages, those that wait included."""
        return self.sft + self.preference + self.waiting

    @property
    def share(self) -> str:
        """Of SFT rows, as the card prints it."""
        return f"{100 * self.sft / self.total:.1f}%" if self.total else "–"


@dataclass(frozen=True)
class Table:
    """All domains, and their sum."""

    domains: Mapping[str, Counts]

    @property
    def overall(self) -> Counts:
        """The sum of all domains."""
        counts = list(self.domains.values())
        return Counts(
            prompts=sum(one.prompts for one in counts),
            sft=sum(one.sft for one in counts),
            preference=sum(one.preference for one in counts),
            waiting=sum(one.waiting for one in counts),
            dropped=_summed(one.dropped for one in counts),
            answers=_summed(one.answers for one in counts),
        )

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        rows = {name: _row(counts) for name, counts in self.domains.items()}
        text = json.dumps({"domains": rows, "all": _row(self.overall)}, indent=1, ensure_ascii=False)
        write_text(path, f"{text}\n")

    def show(self, tell: Tell) -> None:
        """Counts, then losses."""
        named = [*self.domains.items(), *([("all", self.overall)] if len(self.domains) > 1 else [])]
        waiting = any(counts.waiting for _, counts in named)
        heads = ["domain", ">prompts", ">dropped", ">total", ">SFT", ">preference", *[">waiting"][: int(waiting)]]
        rows = []
        for name, counts in named:
            figures = [counts.prompts, sum(counts.dropped.values()), counts.total, counts.sft, counts.preference]
            figures += [counts.waiting] if waiting else []
            rows.append([name or "–", *(f"{figure:,}" for figure in figures), counts.share])
        tell.table([*heads, ">SFT share"], rows)
        losses = [
            [name or "–", f"{number:,}", what]
            for name, counts in self.domains.items()
            for what, number in [*counts.dropped.items(), *counts.answers.items()]
            if what != "answers"
        ]
        if losses:
            tell.table(["domain", ">lost", "why"], losses)


def table_of(became: Mapping[str, Fate], prompts: Mapping[str, Prompt], answers: Mapping[str, Counter[str]]) -> Table:
    """The counts of what became of all prompts."""
    domains: dict[str, Counts] = {}
    for prompt, fate in became.items():
        domain = prompts[prompt].domain
        counts = domains.setdefault(domain, Counts(answers=_answers(answers.get(domain, Counter()))))
        counts.prompts += 1
        counts.sft += isinstance(fate, Sft)
        counts.preference += isinstance(fate, Pair)
        counts.waiting += isinstance(fate, Waiting)
        if isinstance(fate, Lost):
            why = f"prompts, {fate.stage}: {fate.reason.why}"
            counts.dropped[why] = counts.dropped.get(why, 0) + 1
    for counts in domains.values():
        counts.dropped = dict(sorted(counts.dropped.items()))
    return Table(domains)


def _answers(counted: Counter[str]) -> dict[str, int]:
    return {
        what if what == "answers" else f"answers: {what}": counted[what] for what in sorted(counted) if counted[what]
    }


def _row(counts: Counts) -> dict[str, object]:
    return {"prompts": counts.prompts, "total": counts.total, "share": counts.share, **asdict(counts)}


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))
