"""Who measures what: the items that a search wants, cut into jobs and given to the workers of a team.

A job is a part of one portion of the items, of one candidate. Workers measure candidates side by side where the search
names several. Those that have nothing of their own help with another's. So the bracket, which names one candidate at a
time, the baseline and the held-out items are shared, too. What a row is doesn't depend on who measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mergekit_lite.answers.thoughts import parted
from mergekit_lite.boosting.candidates.candidate import NONE, Job, Params, Rivals, Team, label
from mergekit_lite.boosting.search.study import Study


class Demand(NamedTuple):
    """What is wanted of a candidate."""

    params: Params
    items: Sequence[str]
    ahead: bool = False  # perhaps it isn't needed: only a worker without anything else measures it


class Measuring:
    """Gives the workers of a team their jobs, and records what they send."""

    def __init__(self, team: Team, study: Study, portions: Sequence[Sequence[str]], head_to_head: Params | None = None):
        """Take a team.

        Args:
            team: measures.
            study: records.
            portions: of all items; see ``Evaluator.portions``.
            head_to_head: the baseline, where a score compares candidates' answers with its own: then an item is
                measured once the baseline has answered it.
        """
        self.head_to_head = head_to_head
        self.team = team
        self.study = study
        self._portion_of = {item: number for number, portion in enumerate(portions) for item in portion}
        # A portion that is most of the items takes too long for a guess.
        self.can_run_ahead = team.size > 1 and 2 * max(map(len, portions), default=0) <= len(self._portion_of)
        self._given: dict[int, Job] = {}  # by worker
        self._last: dict[int, str] = {}  # the candidate that a worker measured last, whose weights it has

    def measure(self, *demands: Demand) -> None:
        """Measure all that is missing of the demands."""
        while any(self.study.missing(demand.params, demand.items) for demand in demands):
            self.step(demands)

    def step(self, demands: Iterable[Demand]) -> None:
        """Give free workers what is wanted, and record what is sent until a job has ended."""
        demands = list(demands)
        for worker in self.team.workers:
            if worker not in self._given and (job := self._job(worker, demands)) is not None:
                self._given[worker], self._last[worker] = job, label(job.params)
                self.team.give(worker, job)
        while not self._one_ended() or self._complete():
            pass

    def _one_ended(self) -> bool:
        """Record what a worker sends next; return whether that was the end of its job."""
        worker, piece = self.team.next()
        job = self._given[worker]
        self.study.record(job.params, piece)
        if piece.ended:
            del self._given[worker]
            missing = self.study.missing(job.params, sorted(job.wanted))
            if missing and not piece.lost:
                raise RuntimeError(f"{label(job.params)}: no row came for {missing[:3]}")
        return piece.ended

    def _complete(self) -> bool:
        """Return whether some job has all its rows, so that only its end is still to come."""
        return any(not self.study.missing(job.params, list(job.wanted)) for job in self._given.values())

    def _job(self, worker: int, demands: Sequence[Demand]) -> Job | None:
        """Return what a worker does next: what is sure to be needed, of its own candidate, of one that nobody has."""
        busy = Counter(label(job.params) for job in self._given.values())
        best, found = None, None
        for demand in demands:
            name = label(demand.params)
            rank = (demand.ahead, name != self._last.get(worker), busy[name])
            if (best is None or rank < best) and (wanted := self._open(demand)):
                best, found = rank, Job(demand.params, wanted, self._rivals(demand.params, wanted))
        return found

    def _open(self, demand: Demand) -> frozenset[str]:
        """Return what is missing of the first portion that has something which nobody is measuring."""
        name = label(demand.params)
        given = [job.wanted for job in self._given.values() if label(job.params) == name]
        missing = [
            item for item in self.study.missing(demand.params, demand.items) if not any(item in of for of in given)
        ]
        if self.head_to_head is not None and self._meets(demand.params):
            unanswered = {*self.study.missing(self.head_to_head, missing)}
            missing = [item for item in missing if item not in unanswered]
        first = {self._portion_of[item] for item in missing[:1]}
        return frozenset(item for item in missing if self._portion_of[item] in first)

    def _meets(self, params: Params) -> bool:
        """Return whether a candidate's answers are compared with the baseline's."""
        return self.head_to_head is not None and label(params) != label(self.head_to_head)

    def _rivals(self, params: Params, wanted: frozenset[str]) -> Rivals:
        if self.head_to_head is None or not self._meets(params):
            return NONE
        rows = self.study.rows(self.head_to_head, sorted(wanted))
        return {item: parted(row["text"]).answer for item, row in rows.items() if "text" in row}
