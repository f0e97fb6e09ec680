"""``python -m tests.elsewhere.measuring``: candidates measured side by side by processes, the first of which dies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mergekit_lite.boosting.candidates.candidate import ItemRow, Job, Piece
from mergekit_lite.boosting.measure.processes import Processes
from mergekit_lite.boosting.measure.workers import Workers


class Doubling:
    """Makes what measures twice a candidate's alpha, and prints meanwhile; the first process of all dies of it."""

    def __enter__(self) -> Callable[[Job], Iterator[Piece]]:
        return self.measure

    def __exit__(self, *exception: object) -> None:
        with Path("stopped").open("a") as file:
            file.write("in order\n")

    def measure(self, job: Job) -> Iterator[Piece]:
        print("αβ", flush=True)  # the line to the parent is no place for it
        for item in sorted(job.wanted):
            if item == "fatal" and not Path("died").exists():
                Path("died").touch()
                os._exit(7)
            yield Piece([ItemRow(item=item, values={"twice": 2 * job.params["alpha"]})])
        yield Piece(ended=True)


def main() -> None:
    said: list[str] = []
    missing = {0: {"a", "fatal"}, 1: {"b"}}
    rows: list[tuple[int, str, object]] = []
    with Workers([Doubling(), Doubling()], Processes([{}, {}]), said.append) as team:
        for worker, wanted in missing.items():
            team.give(worker, Job({"alpha": worker + 1.0}, frozenset(wanted)))
        while any(missing.values()):
            worker, piece = team.next()
            for row in piece.rows:
                missing[worker].remove(row["item"])
                rows.append((worker, row["item"], row["values"]["twice"]))
            if piece.lost:
                team.give(worker, Job({"alpha": worker + 1.0}, frozenset(missing[worker])))
    assert sorted(rows) == [(0, "a", 2.0), (0, "fatal", 2.0), (1, "b", 4.0)], rows
    assert len(said) == 1 and "ended with exit code 7. Another one takes its place." in said[0], said


if __name__ == "__main__":
    from tests.elsewhere import measuring  # so that its class has a name that workers know

    measuring.main()
