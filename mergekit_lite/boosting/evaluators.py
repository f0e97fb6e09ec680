"""The evaluator of a request: one in this process, or one in each worker of a team.

A worker gets the request and prepares it itself (``WorkerSetup``). So no open file and no function has to travel, and a
worker measures the same wherever it runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mergekit_lite.answers.scoring.registry import kind_of, open_scorer
from mergekit_lite.answers.scoring.scorer import Scorer
from mergekit_lite.boosting.candidates.candidate import ONLY, Job, Piece, Seat, pieces
from mergekit_lite.boosting.candidates.family import PairFamily
from mergekit_lite.boosting.measure.answering import ANSWERS_AT_ONCE, Answering, Likelihoods
from mergekit_lite.boosting.measure.evaluator import Measure, ModelEvaluator
from mergekit_lite.boosting.measure.generators import LocalGenerator, ServerGenerator
from mergekit_lite.boosting.measure.likelihood import PreferenceAccuracy, TextLikelihood
from mergekit_lite.boosting.measure.processes import Processes
from mergekit_lite.boosting.measure.ray_actors import RayActors
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.boosting.measure.scores import LM_EVAL, LOG_RATIO, NLL, PAIRS, ScoreSpec
from mergekit_lite.boosting.measure.tasks import Harness
from mergekit_lite.boosting.measure.workers import Places, Workers
from mergekit_lite.boosting.request import Prepared, Request, prepare
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.ray_cluster import files_of, workers_of
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.errors import RunError

SERVING = "serving"  # the folder of the servers' models, in the study's


@dataclass
class WorkerSetup:
    """Makes the function that does jobs; entered in the process of the worker."""

    request: Request  # for one device
    seat: Seat
    items: Sequence[str]  # all, in their common order
    identity: Any  # of the study
    opponent: Mapping[str, str]  # its answers, by prompt; nobody is asked here
    _opened: ExitStack = field(default_factory=ExitStack, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def __enter__(self) -> Callable[[Job], Iterator[Piece]]:
        """Open the inputs and scorers; the model is built for the first job.

        Raises:
            RunError: what is measured changed since the search began.
        """
        self._opened = ExitStack()
        prepared = prepare(self.request)
        if self.opponent:
            prepared = prepared.against(self.opponent)
        if prepared.identity() != self.identity:
            raise RunError("Models, prompts or other data changed since the search began. Run it again.")
        evaluator = self._opened.enter_context(evaluator_of(prepared, self.seat))
        return partial(pieces, evaluator, self.items)

    def __exit__(self, *exception: object) -> None:
        self._opened.close()


@contextmanager
def cluster_of(prepared: Prepared) -> Iterator[Cluster | None]:
    """Give the Ray cluster that a request names, or None; it is connected before anything is measured.

    Raises:
        UsageError: there is no such cluster, or no GPU in it.
        RunError: Ray can't be started.
    """
    device = CPU if prepared.devices[0] == CPU else "cuda"
    with workers_of(prepared.request.ray, device, threads=1) as cluster:
        if cluster is not None:
            cluster.must_see(files_of(prepared.family.opened.values()))
            cluster.connect()
        yield cluster


@contextmanager
def team_of(
    prepared: Prepared, items: Sequence[str], cluster: Cluster | None, note: Callable[[str], None]
) -> Iterator[Workers]:
    """Give a team of workers, on a cluster or else one for each of the request's devices; it is ended with the context.

    Raises:
        RunError: no machine of the cluster can measure.
    """
    request = prepared.request
    try:
        if cluster is None:
            places: Places = Processes(_environments(prepared))
            devices: Sequence[str] = prepared.devices
        else:
            plan = prepared.family.plan(prepared.family.baseline)
            memory = 0 if request.serve_command is not None else plan.bytes_to_write
            places = actors = RayActors(cluster, memory, request.parallel, note)
            devices = prepared.devices * actors.fill()
        with Workers(_setups(prepared, items, devices), places, note) as team:
            yield team
    finally:
        shutil.rmtree(request.folder / SERVING, ignore_errors=True)  # of servers that were ended in the middle


def _setups(prepared: Prepared, items: Sequence[str], devices: Sequence[str]) -> list[WorkerSetup]:
    """Return what makes each worker what it is."""
    request = replace(prepared.request, parallel=1, ray=None, opponent=None)
    own = (
        replace(request, threads=request.threads or prepared.threads)
        if devices[0] == CPU
        else replace(request, device="cuda:0")
    )
    opponent = {prompt.id: prompt.opponent for prompt in prepared.prompts if prompt.opponent is not None}
    seats = (Seat(number, len(devices)) for number in range(len(devices)))
    return [WorkerSetup(own, seat, items, prepared.identity(), opponent) for seat in seats]


def _environments(prepared: Prepared) -> list[dict[str, str]]:
    """Return the variables of each process: its threads, and its own GPU, so that scorers, too, take that one."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = [name.strip() for name in seen.split(",") if name.strip()]
    environments = []
    for device in prepared.devices:
        environments.append({"OMP_NUM_THREADS": str(prepared.threads)})
        if device != CPU:
            number = int(device.partition(":")[2])
            environments[-1]["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
    return environments


@contextmanager
def evaluator_of(prepared: Prepared, seat: Seat = ONLY, measures: bool = True) -> Iterator[ModelEvaluator]:
    """Make the evaluator of a request; the scorers' models are freed with the context.

    Args:
        prepared: the request.
        seat: of this process among those that measure.
        measures: whether it will; else it opens no scorer and only knows the items.
    """
    request = prepared.request
    resident = ResidentModel(prepared.family, prepared.device, request.threads)
    with ExitStack() as opened:
        ways: list[Measure] = []
        kinds = {score.kind for score in prepared.scores}
        if prepared.prompts:
            scorers = _scorers(prepared.scores, seat, opened) if measures else []
            ways.append(
                Answering(
                    prepared.prompts,
                    request.samples,
                    request.seed,
                    opened.enter_context(_generator(prepared, resident, seat)),
                    scorers,
                    _likelihoods(prepared, resident, LOG_RATIO in kinds),
                    max(ANSWERS_AT_ONCE, request.batch_size),
                    prepared.portion if request.serve_command is None else None,
                    prepared.family.baseline if prepared.settings.head_to_head else None,
                )
            )
        if PAIRS in kinds:
            ways.append(PreferenceAccuracy(resident, prepared.pairs, request.batch_size))
        if NLL in kinds:
            ways.append(TextLikelihood(resident, prepared.texts, request.batch_size))
        for score in prepared.scores:
            if score.kind == LM_EVAL:
                ways.append(Harness(resident, score, request.seed, request.batch_size))
        yield ModelEvaluator(ways, resident)


def _scorers(scores: Sequence[ScoreSpec], seat: Seat, opened: ExitStack) -> list[Scorer]:
    """Open the scorers of answers; those of several workers share the requests that may be open at a judge."""
    given = [score.scorer for score in scores if score.scorer is not None]
    if seat.of > 1:
        given = [
            each.model_copy(update={"concurrency": max(1, each.concurrency // seat.of)})
            if "concurrency" in kind_of(each.kind).takes
            else each
            for each in given
        ]
    return [opened.enter_context(open_scorer(each)) for each in given]


def _generator(
    prepared: Prepared, resident: ResidentModel, seat: Seat
) -> AbstractContextManager[ServerGenerator | LocalGenerator]:
    request = prepared.request
    if request.serve_command is None:
        return nullcontext(LocalGenerator(resident, request.sampling, request.batch_size, prepared.portion))
    folder = request.folder / SERVING
    return ServerGenerator(
        resident,
        request.serve_command,
        folder if seat.of == 1 else folder / str(seat.number),
        request.sampling,
        request.concurrency,
        request.serve_patience,
        request.servers,
        seat,
    )


def _likelihoods(prepared: Prepared, resident: ResidentModel, ratio: bool) -> Likelihoods | None:
    request = prepared.request
    if request.serve_command is not None or not (request.likelihoods or ratio):
        return None
    weak = prepared.family.weak if ratio and isinstance(prepared.family, PairFamily) else None
    return Likelihoods(resident, request.batch_size, weak)
