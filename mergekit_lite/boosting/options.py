"""The options of a boost, flat as the command line and Python have them, and the request that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.boosting.request import SAMPLING, Request
from mergekit_lite.errors import UsageError
from mergekit_lite.options import NewRows, Rounding, Width
from mergekit_lite.training_runs import run_of

RANGES = {
    **dict.fromkeys(
        (
            "limit",
            "trials",
            "max_tokens",
            "samples",
            "batch_size",
            "concurrency",
            "servers",
            "threads",
            "parallel",
            "at_once",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(("temperature", "serve_patience"), (0, math.inf)),
    "confidence": (0.5, 0.999),
    "held_out": (0, 0.9),
    "top_p": (1e-6, 1),
}
OF_SAMPLING = ("temperature", "top_p", "max_tokens")
OF_PAIR = {  # options of ``plan_extrapolation`` with the values that a request leaves out
    "include": (),
    "exclude": (),
    "new_rows": "refuse",
    "tokenizer_source": None,
    "width": "base",
    "out_dtype": None,
    "rounding": "nearest",
    "shard_size": None,
    "copy_code": False,
}
NOT_OF_RUN = ("new_rows", "tokenizer_source", "width")


class BoostOptions(TypedDict, total=False):
    """The options of ``boost``.

    Attributes:
        tune: what is searched for, ``PATH=LOW:HIGH`` each: ``alpha=0:8``, ``to_step=75:1000`` of a run,
            ``parameters.t[filter=mlp]=0:1`` of a recipe.
        steps: of a run's checkpoints; by default those in their names.
        prompts: JSONL or Parquet files with prompts to answer.
        opponent: a recipe of models that answer together (docs/answer.md): their answers are what ``pairwise`` and
            functions compare candidates with. They are asked once, before anything is measured.
        pairs: a JSONL file with preference pairs, for the score ``pairs``.
        limit: most prompts, pairs and texts that are used.
        search: ``bracket`` for one alpha or a run (the default there), ``grid``, ``tpe`` (the default else) or
            ``cmaes``.
        start: the bracket's first alpha; 0.5 by default. Of a run the bracket counts in its last checkpoint's steps,
            beyond that checkpoint.
        step: the bracket's first step; ``start`` by default.
        final_step: the bracket's last step; by default it goes by the best alpha.
        grid: the grid's values by the name of what is tuned.
        trials: of tpe and cmaes; 30 by default.
        storage: URL of Optuna's database; SQLite in the search's folder by default.
        limits: what answers may become at most, ``NAME=MOST`` each: ``growth=1.2``, ``kl=none``.
        confidence: with which a candidate is better, in [0.5, 0.999]; 0.95 by default.
        held_out: share of the items that only confirm the choice, in [0, 0.9]; 0.5 by default.
        stop_early: measure hopeless candidates on some of the items only; True by default.
        study: the search's folder; ``OUTPUT.boost`` by default.
        temperature: of answers; 0.7 by default, 0 is greedy.
        top_p: of answers, in (0, 1]; 0.9 by default.
        max_tokens: most tokens of an answer; 512 by default.
        samples: answers to each prompt; 1 by default.
        batch_size: answers made at once; 16 by default.
        likelihoods: compute how likely answers are under candidate and baseline; True by default.
        serve_command: starts a server of each candidate; ``{model}`` and ``{port}`` stand for its folder and port,
            ``{number}`` for that of the server, from 0.
        serve_patience: seconds until the server is ready; 600 by default.
        servers: that are started over each candidate and share its prompts; 1 by default.
        concurrency: open requests to each server; 32 by default.
        parallel: processes that measure side by side, each with a model, or with ``servers``, of its own; by default
            one for each GPU of ``device``, else 1. With ``ray`` the most workers.
        at_once: candidates that tpe and cmaes draw before they know how the ones before did; 1 by default.
        include, exclude, new_rows, tokenizer_source, width, out_dtype, rounding, shard_size, copy_code: as of
            ``extrapolate``, for a pair; but for ``new_rows``, ``tokenizer_source`` and ``width`` for a run, too.
        seed: of answers, the items' order and rounding; 0 by default.
        threads: that set weights in a process; by default one for each core, shared by the processes.
        device: ``cpu`` (the default), ``cuda`` for all GPUs, ``cuda:1`` …, or ``auto``.
        ray: measure on the machines of a Ray cluster, ``auto``, ``HOST:PORT`` or ``local:N``: by a worker for each
            processor, with ``device`` cuda for each GPU.
        force: replace an existing output.
        sync: bring the output to the disk before it gets its name, as in ``run``.
    """

    tune: Sequence[str]
    steps: Sequence[float]
    prompts: Sequence[str | Path]
    opponent: str | Path | None
    pairs: str | Path | None
    limit: int | None
    search: Literal["bracket", "grid", "tpe", "cmaes"] | None
    start: float
    step: float | None
    final_step: float | None
    grid: Mapping[str, Sequence[float]]
    trials: int
    storage: str | None
    limits: Sequence[str]
    confidence: float
    held_out: float
    stop_early: bool
    study: str | Path | None
    temperature: float
    top_p: float
    max_tokens: int
    samples: int
    batch_size: int
    likelihoods: bool
    serve_command: str | None
    serve_patience: float
    servers: int
    concurrency: int
    parallel: int | None
    at_once: int
    include: Sequence[str]
    exclude: Sequence[str]
    new_rows: NewRows
    tokenizer_source: str | None
    width: Width
    out_dtype: str | None
    rounding: Rounding
    shard_size: int | None
    copy_code: bool
    seed: int
    threads: int | None
    device: str
    ray: str | None
    force: bool
    sync: bool


def request_of(
    output: str | Path,
    scores: Sequence[str],
    sft: str | Path | None,
    aligned: str | Path | None,
    recipe: str | Path | None,
    options: BoostOptions,
    base: str | Path | None = None,
    checkpoints: str | Path | Sequence[str | Path] = (),
) -> Request:
    """Return the request that flat options make; ``prepare`` checks it.

    Raises:
        UsageError: one model of the pair is missing, a run has no base, no checkpoints or no clear steps, an option is
            not for a run, or a number is out of its range.
    """
    if (sft is None) != (aligned is None):
        raise UsageError("Name both models: mergekit-lite boost SFT ALIGNED …")
    if (base is None) != (not checkpoints):
        raise UsageError("Name the base and the checkpoints of a run: mergekit-lite boost BASE CKPT CKPT …")
    given: dict[str, Any] = dict(options)
    for name, (low, high) in RANGES.items():
        value = given.get(name)
        if value is not None and not low <= value <= high:
            upper = f" up to {high:g}" if math.isfinite(high) else ""
            raise UsageError(f"--{name.replace('_', '-')}: expected a number from {low:g}{upper}, got {value:g}.")
    sampling = {name: given.pop(name) for name in OF_SAMPLING if name in given}
    of_pair = {name: given.pop(name, usual) for name, usual in OF_PAIR.items()}
    of_pair = {name: value for name, value in of_pair.items() if value and value != OF_PAIR[name]}
    if base is not None and (unfit := [f"--{name.replace('_', '-')}" for name in NOT_OF_RUN if name in of_pair]):
        raise UsageError(f"{', '.join(unfit)}: of a pair, not of a run.")
    if recipe is None and (seed := given.get("seed", 0)):
        of_pair["seed"] = seed
    run, at = run_of(checkpoints, given.pop("steps", ())) if base is not None else ((), given.pop("steps", ()))
    given |= {name: tuple(given.get(name, ())) for name in ("tune", "limits")}
    paths = {"recipe": recipe, **{name: given.get(name) for name in ("opponent", "pairs", "study")}}
    given |= {name: None if path is None else Path(path) for name, path in paths.items()}
    return Request(
        output=Path(output),
        scores=tuple(scores),
        sft=None if sft is None else str(sft),
        aligned=None if aligned is None else str(aligned),
        prompts=tuple(map(Path, given.pop("prompts", ()))),
        sampling=Sampling(**(SAMPLING.model_dump() | sampling)),
        base=None if base is None else str(base),
        checkpoints=tuple(run),
        steps=tuple(at),
        options=of_pair,
        **given,
    )
