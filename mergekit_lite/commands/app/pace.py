"""How long plans will take here: this machine is measured once, and each kind of tensor when a plan first has it."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Hashable, Sequence

from mergekit_lite.checkpoint.extents import is_elsewhere_file
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import FOLDER, PROGRAM
from mergekit_lite.commands.prediction import headline, not_predicted
from mergekit_lite.commands.units import seconds
from mergekit_lite.multimerge import Step
from mergekit_lite.planning import Plan
from mergekit_lite.prediction import Cluster, measured_costs, predict_in_turn, this_cluster
from mergekit_lite.prediction.costs import Cost, Costs, kind_of, python_step


class Pace:
    """What was measured of this machine, for as long as the server lives."""

    def __init__(self, places: Places) -> None:
        """Measure nothing yet."""
        self.places = places
        self._measuring = threading.Lock()  # two measurements at once would measure each other
        self._machine: tuple[Cluster, float, float] | None = None
        self._costs: dict[Hashable, Cost] = {}
        self._need_torch: set[Hashable] = set()
        self._importing = 0.0

    def told(self, steps: Sequence[Step], planning: float) -> str:
        """Return in a line how long steps will take, of which planning took some seconds of processor time."""
        plans = [step.plan for step in steps if not step.is_fused]
        if why := next(filter(None, map(not_predicted, plans)), None):
            return why
        if any(is_elsewhere_file(file.path) for plan in plans for source in plan.inputs for file in source.files):
            return "time is not predicted: weights lie elsewhere"
        with self._measuring:
            if self._machine is None:
                self._machine = this_cluster(self.places.root / "merged"), self._start_up(), python_step()
            cluster, start, step = self._machine
            told = predict_in_turn(plans, cluster, None, start + planning, lambda plan: self._costs_of(plan, step))
        if len(plans) == 1:
            return headline(told.predictions[0])
        return f"about {seconds(told.seconds)} for all documents; the last one: {headline(told.predictions[-1])}"

    def _costs_of(self, plan: Plan, step: float) -> Costs:
        """Return what a plan's jobs cost, as it was measured or is now, where Python takes some seconds for a step."""
        kinds = [None if job.scales_of else kind_of(job) for job in plan.jobs]
        known = {kind: self._costs[kind] for kind in kinds if kind is not None and kind in self._costs}
        if any(kind is not None and kind not in known for kind in kinds):
            costs = measured_costs(plan)
            self._costs |= costs.of_kind
            self._importing = max(self._importing, costs.importing)
            if costs.needs_torch:
                self._need_torch |= costs.of_kind.keys()
            known = costs.of_kind
        importing = self._importing if known.keys() & self._need_torch else 0.0
        return Costs(kinds, known, importing, step)

    def _start_up(self) -> float:
        """Return the processor time that a merge takes before it looks at its recipe: of one that has none."""
        nothing = self.places.root / FOLDER / ".none.yml"
        process = subprocess.Popen(
            [*PROGRAM, "merge", str(nothing), "-o", "none"], cwd=self.places.root, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        return used.ru_utime + used.ru_stime
