"""Generators of candidates' answers: the model in this process, or a server of the user's over a temporary folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.asking import Respondent, Sampling, Task
from mergekit_lite.answers.local import Local, ready
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.rows import Answer, Key
from mergekit_lite.answers.server import Served, Server
from mergekit_lite.answers.serving import RunningServer, serve_words, serving_several
from mergekit_lite.boosting.candidates.candidate import ONLY, Params, Seat, label
from mergekit_lite.boosting.measure.resident_model import ResidentModel

if TYPE_CHECKING:
    from mergekit_lite.answers.local import ReadyModel


class LocalGenerator(Local):
    """Answers with the model in this process, in the dtype it will be written in."""

    def __init__(self, resident: ResidentModel, sampling: Sampling, batch_size: int, portion: int) -> None:
        """``batch_size`` answers are generated at once; batches are cut from each ``portion`` of the tasks."""
        super().__init__("candidate", "the candidate", sampling, batch_size=batch_size)
        self.resident = resident
        self.portion = portion

    def for_candidate(self, params: Params) -> Respondent:
        """Load the candidate and return the model."""
        self.resident.load(params)
        return self

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the wanted answers, portion by portion.

        The items wanted first come first in ``tasks``, in whole portions, so no batch is generated for a part of it.
        """
        for start in range(0, len(tasks), self.portion):
            portion = tasks[start : start + self.portion]
            yield from super().answers(portion, wanted.intersection(task.key for task in portion))

    @cached_property
    def tokenizer(self) -> Any:
        """The output's tokenizer."""
        return self.resident.tokenizer

    @cached_property
    def loaded(self) -> ReadyModel:
        """The model in this process, ready to answer."""
        loaded = ready(self.resident.model, self.tokenizer, self.sampling)
        # Candidates far out overflow; their answers show it, and the search needn't end.
        loaded.model.generation_config.remove_invalid_values = True
        return loaded


@dataclass
class ServerGenerator:
    """Answers with servers, which are started for each candidate and stopped when another one is to answer.

    Several ones share a candidate's prompts. An answer follows from prompt and seed, whichever server gives it: so the
    number of servers changes no row.
    """

    resident: ResidentModel  # of the family; its model is not built for this
    command: str  # starts the server, with ``{model}`` and ``{port}`` for folder and port. No shell reads it.
    folder: Path  # where candidates are written; each is removed with its server
    sampling: Sampling  # how answers are drawn
    concurrency: int = 32  # open requests, of each server
    patience: float = 600.0  # seconds that a server has to load a model
    servers: int = 1  # that are started over each candidate
    seat: Seat = ONLY  # whose servers these are
    _running: ExitStack = field(default_factory=ExitStack, init=False)
    _candidate: str = field(default="", init=False)
    _respondent: Respondent | None = field(default=None, init=False)

    def __enter__(self) -> ServerGenerator:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the running servers, and remove its candidate."""
        self._running.close()
        self._candidate = ""

    def for_candidate(self, params: Params) -> Respondent:
        """Start the servers over the candidate, unless they are running.

        Raises:
            RunError: a server ended, or wasn't ready in time; the message has the end of its output.
            NonFiniteError: the candidate's weights aren't finite.
        """
        if self._respondent is None or label(params) != self._candidate:
            self.__exit__()
            self._respondent = Served("candidate", self._running.enter_context(self._served(params)))
            self._candidate = label(params)
        return self._respondent

    @contextmanager
    def _served(self, params: Params) -> Iterator[Server]:
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed search
        try:
            model = self._written(params)
            words = serve_words(self.command, "--serve-command")
            logs = [self.folder / f"server-{number}.log" for number in range(self.servers)]
            with serving_several(words, str(model), logs, self.patience, self.seat) as running:
                body = RequestBody(running[0].model, self.sampling)
                names = {each.url: each.model for each in running}
                ended = partial(_all_ended, running)
                yield Server(list(names), body, concurrency=self.concurrency, names=names, ended=ended)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self, params: Params) -> Path:
        from mergekit_lite.engine.run import run
        from mergekit_lite.resident.weights import Rewritten

        started, path, resident = time.monotonic(), self.folder / "model", self.resident
        finished = run(resident.family.plan(params, path), device=resident.device, threads=resident.threads)
        resident.rewritten[label(params)] = Rewritten(finished.reports[0], ())
        resident.seconds[label(params)] += time.monotonic() - started
        return path


def _all_ended(servers: Sequence[RunningServer]) -> str | None:
    """Return why the first server answers no more, where none does; None while one runs."""
    said = [server.ended() for server in servers]
    return said[0] if all(said) else None
