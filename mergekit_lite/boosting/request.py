"""The request of a boost, and all checks of it that need no weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.prompts import Prompts, as_row, load
from mergekit_lite.answers.scoring.rivals import meets_rivals
from mergekit_lite.answers.serving import serve_words
from mergekit_lite.boosting.candidates.family import (
    Family,
    PairFamily,
    RecipeFamily,
    RunFamily,
    can_bracket,
    check_plans,
)
from mergekit_lite.boosting.candidates.tunable import Tunable, parse
from mergekit_lite.boosting.measure import opponent as opponents
from mergekit_lite.boosting.measure import scores as scoring
from mergekit_lite.boosting.measure.likelihood import read_pairs, read_texts
from mergekit_lite.boosting.measure.scores import LM_EVAL, LOG_RATIO, NLL, PAIRS, ScoreSpec
from mergekit_lite.boosting.search.choice import Searcher
from mergekit_lite.boosting.search.guards import limits
from mergekit_lite.boosting.search.looks import portion
from mergekit_lite.boosting.search.optuna_search import SAMPLERS, optuna_search
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import MOST, START, bracket, grid
from mergekit_lite.errors import UsageError, listing, nearest
from mergekit_lite.pages import drawing

if TYPE_CHECKING:
    from mergekit_lite.answers.aggregating.answering import ToAnswer
    from mergekit_lite.answers.likelihood import Pair
    from mergekit_lite.answers.rows import Prompt

SEARCHES = ("bracket", "grid", *SAMPLERS)
ALPHA = f"alpha=0:{MOST:g}"
GRID = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the paper, for finished models
GRID_POINTS = 5  # of other parameters
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=512)  # the first two as ExPO's authors have them
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One boost, as the command line gives it; its help explains each option."""

    output: Path
    scores: tuple[str, ...]
    sft: str | None = None
    aligned: str | None = None
    recipe: Path | None = None
    base: str | None = None
    checkpoints: tuple[str, ...] = ()
    steps: tuple[float, ...] = ()
    tune: tuple[str, ...] = ()
    prompts: tuple[Path, ...] = ()
    opponent: Path | None = None
    pairs: Path | None = None
    limit: int | None = None
    search: str | None = None
    start: float = START
    step: float | None = None
    final_step: float | None = None
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trials: int = 30
    storage: str | None = None
    limits: tuple[str, ...] = ()
    confidence: float = 0.95
    held_out: float = 0.5
    stop_early: bool = True
    sampling: Sampling = SAMPLING
    samples: int = 1
    seed: int = 0
    batch_size: int = 16
    likelihoods: bool = True
    serve_command: str | None = None
    serve_patience: float = 600.0
    servers: int = 1
    concurrency: int = 32
    parallel: int | None = None
    at_once: int = 1
    device: str = "cpu"
    ray: str | None = None
    threads: int | None = None
    study: Path | None = None
    force: bool = False
    sync: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # of plan_extrapolation

    @property
    def folder(self) -> Path:
        """The search's folder, with what was measured and the report."""
        return self.study or self.output.with_name(f"{self.output.name}.boost")


@dataclass(frozen=True)
class Prepared:
    """A request that can be carried out."""

    request: Request
    family: Family  # of all candidates
    scores: tuple[ScoreSpec, ...]  # of the candidates; the first one decides
    prompts: tuple[Prompt, ...]  # to answer
    opponent: ToAnswer | None  # whose answers candidates are compared with; it isn't asked yet
    pairs: Mapping[str, Pair]  # of preference, by item
    texts: Mapping[str, str]  # to read, by item
    search: str  # its name
    searcher: Searcher  # begins the search, once the folder exists
    settings: Settings  # how candidates are judged
    portion: int  # answers that are made before the next ones are begun; see ``looks.portion``
    devices: tuple[str, ...]  # of the models, one for each process that measures; on a cluster the kind of them
    threads: int | None  # of each of several; None for one, which takes those of torch
    notes: tuple[str, ...]  # remarks for the user

    @property
    def device(self) -> str:
        """The device of the model in this process, and of the one that is written."""
        return self.devices[0] if self.request.ray is None else "cpu"

    @property
    def measures_elsewhere(self) -> bool:
        """Whether other processes measure."""
        return len(self.devices) > 1 or self.request.ray is not None

    def against(self, answers: Mapping[str, str]) -> Prepared:
        """Return it with the opponent's answers, by the prompts' ids."""
        return replace(self, prompts=opponents.facing(self.prompts, answers))

    def identity(self) -> dict[str, Any]:
        """Return all that a row depends on except the candidate's params; one study has one identity."""
        request = self.request
        family: dict[str, Any] = {
            "models": {name: list(source.identity()[2:]) for name, source in self.family.opened.items()},
            "options": dict(request.options),
            "baseline": dict(self.family.baseline),
        }
        if isinstance(self.family, RecipeFamily):
            family["recipe"] = self.family.tuning.text(self.family.baseline)
        if isinstance(self.family, RunFamily):
            family["steps"] = self.family.steps
        data = [*map(as_row, self.prompts), *map(repr, self.pairs.values()), *self.texts.values()]
        scored = [score._replace(scorer=None)._asdict() for score in self.scores]
        settings = [score.scorer.model_dump(mode="json") for score in self.scores if score.scorer is not None]
        return {
            **family,
            "data": xxhash.xxh3_128_hexdigest(json.dumps(data).encode()),
            "scores": json.dumps([scored, settings]),
            "sampling": request.sampling.model_dump(),
            "samples": request.samples,
            "seed": request.seed,
            "batch_size": request.batch_size,
            "likelihoods": request.likelihoods,
            "device": self.devices[0].partition(":")[0],
            "serve_command": request.serve_command,
            **({"thoughts": "kept"} if request.serve_command is not None else {}),
        }


def prepare(request: Request) -> Prepared:
    """Check a request and open what it names; of the models only headers are read.

    Raises:
        MergekitLiteError: it can't be carried out; the message has every problem that can be seen at once.
    """
    problems: list[str] = []
    scores = _try(problems, lambda: scoring.parse(request.scores)) or ()
    tunables = _try(problems, lambda: _tunables(request)) or ()
    limits_given = _try(problems, lambda: limits(request.limits))
    devices = _try(problems, lambda: _devices(request))
    _try(problems, lambda: drawing.check_drawable(None))
    if (command := request.serve_command) is not None:
        _try(problems, lambda: serve_words(command, "--serve-command"))
    problems += _missing(request, scores)
    problems += [f"{request.output}: lies in the folder of the search"] * (
        request.folder in (request.output, *request.output.parents)
    )
    prompts = _try(problems, lambda: load(Prompts(path=path, keep="all") for path in request.prompts))
    asked = () if prompts is None else tuple(prompts.prompts[: request.limit])
    opponent = _try(
        problems, lambda: opponents.opponent_of(request.opponent, scores, asked, request.folder, request.ray)
    )
    path = request.pairs
    pairs = _try(problems, lambda: read_pairs(path, request.limit)) if path is not None else {}
    texts: dict[str, str] = {}
    for score in scores:
        if score.kind == NLL:
            texts |= _try(problems, lambda: read_texts(Path(score.target), request.limit)) or {}  # noqa: B023
    if problems:
        raise UsageError(problems[0] if len(problems) == 1 else listing("This can't be done as asked", problems))
    assert prompts is not None and pairs is not None and limits_given is not None and devices is not None
    family = _family(request, tunables)
    notes = [f"left out: {text}" for text in prompts.problems]
    notes += [f"{prompts.repeated:,} prompts were there before and are asked once"] * bool(prompts.repeated)
    notes += check_plans(family)
    _check_memory(request, family, devices)
    together = portion(len(asked) * request.samples, request.batch_size)
    settings = Settings(
        score=scores[0].name,
        baseline=family.baseline,
        limits=limits_given,
        confidence=request.confidence,
        held_out=request.held_out,
        batch=together // math.gcd(together, request.samples),
        stop_early=request.stop_early,
        head_to_head=tuple(one.name for one in scores if one.scorer is not None and meets_rivals(one.scorer)),
    )
    search = request.search or ("bracket" if can_bracket(family) else "tpe")
    searcher = _searcher(request, search, family, settings)
    return Prepared(
        request,
        family,
        scores,
        asked,
        opponent,
        pairs,
        texts,
        search,
        searcher,
        settings,
        together,
        devices,
        _threads_of_each(devices) if request.ray is None else 1,
        tuple(notes),
    )


def _devices(request: Request) -> tuple[str, ...]:
    """Return the device of each process that measures: every GPU, unless one is named or fewer are asked for.

    Raises:
        UsageError: the device is unknown or missing, or the address of a cluster can't be one.
    """
    from mergekit_lite.engine.devices import ALL, chosen_device, chosen_devices
    from mergekit_lite.engine.ray_cluster import check_address

    if request.ray is not None:
        check_address(request.ray, request.device)
        return ("cpu" if request.device == "cpu" else "cuda",)

    several = request.device in ("auto", "cuda", ALL) and chosen_device(request.device.replace(ALL, "cuda")) != "cpu"
    found = chosen_devices(ALL if several else request.device)
    by_servers = request.serve_command is not None  # which have GPUs of their own
    number = request.parallel or (1 if by_servers else len(found))
    return tuple(islice(cycle(found), number))


def _threads_of_each(devices: Sequence[str]) -> int | None:
    """Return each process's share of the threads that torch takes here."""
    if len(devices) == 1:
        return None
    import torch

    return max(1, torch.get_num_threads() // len(devices))


def _check_memory(request: Request, family: Family, devices: Sequence[str]) -> None:
    """Refuse several models whose weights alone don't fit into what is free.

    Raises:
        UsageError: with what they take and what is there.
    """
    from mergekit_lite.engine.devices import memory_left

    if request.serve_command is not None or request.ray is not None:
        return
    weights = family.plan(family.baseline).bytes_to_write
    for device, number in Counter(devices).items():
        if number > 1 and (free := memory_left(device)) is not None and number * weights > free:
            raise UsageError(
                f"{number} models take {number} × {weights / 1e9:.2f} GB, but only {free / 1e9:.2f} GB of memory are "
                f"free on {device}: lower --parallel."
            )


def _try(problems: list[str], make: Callable[[], T]) -> T | None:
    """Return what ``make`` does; or None, with the message of its UsageError in ``problems``."""
    try:
        return make()
    except UsageError as error:
        problems.append(str(error))
        return None


def _tunables(request: Request) -> tuple[Tunable, ...]:
    pair = request.sft is not None and request.aligned is not None
    run = request.base is not None and bool(request.checkpoints)
    if pair + run + (request.recipe is not None) != 1:
        raise UsageError("Name SFT and ALIGNED, or BASE and the checkpoints of a run, or a --recipe: exactly one.")
    if request.recipe is not None and not request.tune:
        raise UsageError("Which numbers of the recipe? For instance --tune parameters.weight=0:1.5.")
    if run and not request.tune:
        raise UsageError("How far may a run go on? For instance --tune to_step=75:1000.")
    if request.steps and not run:
        raise UsageError("--steps are those of a run's checkpoints: give --tune to_step=LOW:HIGH.")
    return parse(request.tune or (ALPHA,))


def _missing(request: Request, scores: Sequence[ScoreSpec]) -> list[str]:
    kinds = {score.kind for score in scores}
    of_answers = sorted(score.kind for score in scores if score.of_answers)
    problems = []
    if not request.scores:
        problems.append("What are candidates scored by? For instance --score reward:MODEL, or --score pairs.")
    if of_answers and not request.prompts:
        problems.append(f"--score {of_answers[0]} judges answers: it needs --prompts.")
    if scores and not of_answers and request.prompts:
        problems.append("--prompts are there, but no score of answers: give one, such as --score reward:MODEL.")
    if PAIRS in kinds and request.pairs is None:
        problems.append("--score pairs needs --pairs FILE.")
    if scores and PAIRS not in kinds and request.pairs is not None:
        problems.append("--pairs are there, but nothing that scores them: give --score pairs.")
    if LOG_RATIO in kinds and (request.sft is None or request.serve_command is not None):
        problems.append("--score log_ratio is for a pair SFT ALIGNED in this process: no --recipe, no --serve-command.")
    if request.servers > 1 and request.serve_command is None:
        problems.append("--servers is the number of servers that --serve-command starts: give one.")
    if (
        request.ray is not None
        and request.serve_command is not None
        and (request.parallel, request.device) == (None, "cpu")
    ):
        problems.append("--ray with --serve-command needs --parallel N, or --device cuda: each worker starts servers.")
    if request.at_once > 1 and request.search not in (None, *SAMPLERS):
        problems.append(f"--at-once is for tpe and cmaes: {request.search} measures side by side what it can.")
    if LM_EVAL in kinds and find_spec("lm_eval") is None:
        problems.append("--score lm-eval:… needs the package lm_eval: pip install lm_eval.")
    if request.search is not None and request.search not in SEARCHES:
        problems.append(f"No search is called {request.search!r}.{nearest(request.search, SEARCHES)}")
    return problems


def _family(request: Request, tunables: Sequence[Tunable]) -> Family:
    if request.recipe is not None:
        unused = [f"--{name.replace('_', '-')}" for name, value in request.options.items() if value]
        if unused:
            raise UsageError(f"{', '.join(unused)}: a recipe says that itself.")
        return RecipeFamily(request.recipe, tunables)
    if request.base is not None:
        return RunFamily(request.base, request.checkpoints, request.steps, tunables, request.options)
    assert request.sft is not None and request.aligned is not None
    return PairFamily(request.sft, request.aligned, tunables, request.options)


def _searcher(request: Request, kind: str, family: Family, settings: Settings) -> Searcher:
    """Return what begins the search. Raises UsageError where it doesn't fit the tuned parameters."""
    if kind == "bracket":
        if not can_bracket(family):
            raise UsageError("The bracket searches one alpha of a pair, or a run's step. Else take grid, tpe or cmaes.")
        return _bracket(request, family)
    if kind == "grid":
        values = _grid(request.grid, family)
        return lambda same: grid(values)
    storage = request.storage or f"sqlite:///{(request.folder / 'study.db').absolute()}"
    return lambda same: optuna_search(
        family.ranges,
        settings,
        storage=storage,
        sampler=kind,
        trials=request.trials,
        seed=request.seed,
        at_once=request.at_once,
    )


def _bracket(request: Request, family: Family) -> Searcher:
    """Return the bracket. A step (1 + alpha)·last of a run is as far on its line as alpha is on a pair's."""
    ((name, of),) = family.ranges.items()
    origin, unit = (family.last, family.last) if isinstance(family, RunFamily) else (0.0, 1.0)
    most = (of.high - origin) / unit
    if most <= 0:
        raise UsageError(f"--tune {name}: {of.high:g} is not beyond the baseline, {origin:g}.")
    start, step, final = min(request.start, most), request.step, request.final_step
    return lambda same: bracket(name, start, step, final, most, same, origin, unit)


def _grid(given: Mapping[str, tuple[float, ...]], family: Family) -> dict[str, Sequence[float]]:
    unknown = [name for name in given if name not in family.ranges]
    if unknown:
        raise UsageError(f"--grid {unknown[0]}: is not tuned.{nearest(unknown[0], family.ranges)}")
    values: dict[str, Sequence[float]] = {}
    for name, of in family.ranges.items():
        width = (of.high - of.low) / (GRID_POINTS - 1)
        even = [float(f"{of.low + width * number:.6g}") for number in range(GRID_POINTS)]
        usual = GRID if name == "alpha" and isinstance(family, PairFamily) else even
        values[name] = given.get(name, usual)
        outside = [value for value in values[name] if not of.low <= value <= of.high]
        if outside:
            raise UsageError(f"--grid {name}: {outside[0]:g} is outside of its range {of.low:g}:{of.high:g}.")
    if math.prod(map(len, values.values())) > 1000:
        raise UsageError("The grid has more than 1,000 candidates: give fewer values, or take --search tpe.")
    return values
