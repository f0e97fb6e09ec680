"""``mergekit-lite boost``: choose alpha, or any numbers of a merge recipe, by measuring."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from mergekit_lite.commands import running, values
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lite.boosting.options import BoostOptions
    from mergekit_lite.boosting.request import Prepared
    from mergekit_lite.boosting.search.point import Point
    from mergekit_lite.commands.screen import Screen

FILE = click.Path(dir_okay=False, path_type=Path)


class ScoreOption(click.Option):
    """``--score``: its help lists the kinds of scores there are when it is shown."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help."""
        from mergekit_lite.boosting.measure.scores import forms

        self.help = f"{'; '.join(forms().values())}. The first one decides."
        return super().get_help_record(ctx)


@click.command(
    name="boost",
    epilog="""\b
Examples:
  mergekit-lite boost ./sft ./dpo --prompts dev.jsonl --score reward:./rm -o ./boosted
  mergekit-lite boost ./sft ./dpo --pairs prefs.jsonl --score pairs -o ./boosted
  mergekit-lite boost ./sft ./dpo --prompts dev.jsonl --score log_ratio --search grid --grid 0.1,0.2,0.5 -o ./boosted
  mergekit-lite boost ./sft ./dpo --prompts dev.jsonl --score maths --device cuda --parallel 8 -o ./boosted
  mergekit-lite boost ./sft ./dpo --prompts dev.jsonl --score maths --device cuda --ray auto -o /shared/boosted
  mergekit-lite boost ./sft ./dpo --prompts dev.jsonl --opponent moa.yml
      --score pairwise:judge,server=http://localhost:8000/v1 -o ./boosted
  mergekit-lite boost ./base './run/step-*' --tune to_step=75:1000 --prompts dev.jsonl --score maths -o ./boosted
  mergekit-lite boost --recipe merge.yml --tune 'parameters.t[filter=mlp]=0:1' --tune 'parameters.t=0:1'
      --prompts maths.jsonl --score maths --score nll:wiki.txt --limits loss:nll=0.05 -o ./merged
""",
)
@click.argument("models", nargs=-1, metavar="[SFT ALIGNED | BASE CKPT…]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The chosen model's folder.")
@click.option("--recipe", type=FILE, help="Instead of SFT and ALIGNED: a merge recipe, with --tune.")
@click.option(
    "--tune",
    metavar="PATH=LOW:HIGH",
    multiple=True,
    help="What is searched for, for instance parameters.weight=0:1.5, parameters.t[filter=mlp]=0:1 or alpha=0:8; "
    "to_step=75:1000 makes BASE and CKPT… a training run.",
)
@click.option(
    "--steps",
    metavar="N,M[,…]",
    callback=values.numbers,
    help="Of a run's checkpoints; by default those in their names.",
)
@click.option("--score", "scores", cls=ScoreOption, metavar="KIND[:WHAT]", multiple=True)
@click.option("--prompts", type=FILE, multiple=True, help="JSONL or Parquet with prompts to answer.")
@click.option(
    "--opponent",
    type=FILE,
    metavar="RECIPE",
    help="Models that answer the prompts together, as for answer: pairwise and functions compare with their answers.",
)
@click.option("--pairs", type=FILE, help="JSONL with preference pairs, for --score pairs.")
@click.option("--limit", type=int, help="Most prompts, pairs and texts that are used.")
@click.option(
    "--search",
    type=click.Choice(["bracket", "grid", "tpe", "cmaes"]),
    help="bracket for one alpha or a run (bracket, bisect, refine), else tpe.",
)
@click.option(
    "--start",
    type=float,
    default=0.5,
    show_default=True,
    help="The bracket's first alpha; of a run this share beyond its last step.",
)
@click.option("--step", type=float, help="The bracket's first step; --start by default.")
@click.option("--final-step", type=float, help="The bracket's last step; by default goes by the best alpha.")
@click.option("--grid", metavar="[NAME=]A,B…", multiple=True, help="The grid's values; NAME is alpha by default.")
@click.option("--trials", type=int, default=30, show_default=True, help="Of tpe and cmaes.")
@click.option("--storage", metavar="URL", help="Optuna's database; SQLite in the search's folder by default.")
@click.option(
    "--limits",
    metavar="NAME=MOST",
    multiple=True,
    help="What answers may become at most: growth, truncated, repetition, identical, unscored, kl, kl_per_token, "
    "loss:SCORE; none is no limit.",
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="That a candidate is better.")
@click.option(
    "--held-out",
    type=float,
    default=0.5,
    show_default=True,
    help="The share of items, up to 0.9, that takes no part in the search and confirms its choice.",
)
@click.option("--all-items", is_flag=True, help="Measure every candidate on all items, hopeless ones too.")
@click.option("--study", type=click.Path(path_type=Path), help="The search's folder; OUTPUT.boost by default.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=0.9, show_default=True, help="Share of the likeliest tokens.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Of an answer.")
@click.option("--samples", type=int, default=1, show_default=True, help="Answers to each prompt.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Answers made at once.")
@click.option("--no-kl", is_flag=True, help="Don't compute how likely answers are under candidate and baseline.")
@click.option(
    "--serve-command",
    metavar="COMMAND",
    help="A server of your own answers: started for each candidate over a temporary folder, with {model} and "
    "{port} in its place, for instance 'vllm serve {model} --port {port}'.",
)
@click.option("--serve-patience", type=float, default=600.0, show_default=True, help="Seconds until it is ready.")
@click.option(
    "--servers",
    type=int,
    default=1,
    show_default=True,
    help="That are started over each candidate and share its prompts; {number} in the command stands for 0, 1 …: "
    "'env CUDA_VISIBLE_DEVICES={number} vllm serve {model} --port {port}'.",
)
@click.option("--concurrency", type=int, default=32, show_default=True, help="Open requests, of each server.")
@click.option(
    "--parallel",
    type=int,
    help="Processes that measure side by side, each with a model of its own in memory, or with --servers of its own; "
    "by default one for each GPU, else 1. With --ray the most workers.",
)
@click.option(
    "--at-once",
    type=int,
    default=1,
    show_default=True,
    help="Candidates that tpe and cmaes draw before they know how the last ones did; their steps depend on it.",
)
@click.option("--include", metavar="REGEX", multiple=True, help="As in extrapolate.")
@click.option("--exclude", metavar="REGEX", multiple=True, help="As in extrapolate.")
@click.option("--new-rows", type=click.Choice(["refuse", "copy"]), default="refuse", help="As in extrapolate.")
@running.takes_tokenizer_source
@click.option("--out-dtype", help="As in extrapolate; candidates are judged in it.")
@click.option("--rounding", type=click.Choice(["nearest", "stochastic"]), default="nearest", help="Likewise.")
@click.option("--shard-size", metavar="SIZE", callback=values.size, help="As in extrapolate.")
@click.option("--copy-code", is_flag=True, help="As in extrapolate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of answers, items' order and rounding.")
@click.option("--threads", type=int, help="That set weights in a process; by default one for each core.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda (all GPUs), cuda:1 … or auto.")
@running.takes_ray
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
@running.takes_sync
@click.option("--dry-run", is_flag=True, help="Check everything and print what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors, warnings and the verdict only.")
def command(
    models: tuple[str, ...],
    output: Path,
    scores: tuple[str, ...],
    recipe: Path | None,
    grid: tuple[str, ...],
    all_items: bool,
    no_kl: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Choose how far to go past ALIGNED, or past the end of a training run, by measuring, and make that model.

    The models are loaded once, as one; each candidate's weights are set in place, exactly as they would be written.
    What is measured is kept in OUTPUT.boost: a search that was killed goes on, and measures nothing twice. Where no
    candidate is sure to be better, that is the answer, and no model is made.
    """
    from mergekit_lite.boosting.description import described
    from mergekit_lite.boosting.options import request_of
    from mergekit_lite.boosting.request import prepare
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.planning.delta_check import delta_warning

    screen = Screen(quiet=quiet or as_json, verbose=False)
    given |= {"grid": _grid(grid), "stop_early": not all_items, "likelihoods": not no_kl}
    named = {"sft": None, "aligned": None, "recipe": recipe} | _named(models, given["tune"])
    prepared = prepare(request_of(output, scores, options=cast("BoostOptions", given), **named))
    for note in (*prepared.notes, delta_warning(prepared.family.plan(prepared.family.baseline))):
        screen.warn(note)
    if not dry_run:
        _carry_out(prepared, screen, as_json)
    elif as_json:
        click.echo(json.dumps(described(prepared), indent=1))
    else:
        _show(prepared, screen)


def _named(models: tuple[str, ...], tune: tuple[str, ...]) -> dict[str, Any]:
    """Return what the models are: a pair, or a run where its step is tuned. Raises UsageError for what is neither."""
    from mergekit_lite.boosting.candidates.tunable import TO_STEP

    if models and any(text.startswith(TO_STEP) for text in tune):
        base, *checkpoints = models
        return {"base": base, "checkpoints": checkpoints[0] if len(checkpoints) == 1 else checkpoints}
    if len(models) not in (0, 2):
        raise UsageError(
            "Name both models: mergekit-lite boost SFT ALIGNED …, or the base and the checkpoints of a run with "
            "--tune to_step=LOW:HIGH."
        )
    return dict(zip(("sft", "aligned"), models, strict=False))


def _grid(texts: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    grid: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, listed = text.rpartition("=")
        grid[name or "alpha"] = values.numbers(None, None, listed)
    return grid


def _carry_out(prepared: Prepared, screen: Screen, as_json: bool) -> None:
    from mergekit_lite.boosting.boosting import search_and_write
    from mergekit_lite.boosting.summary import verdict
    from mergekit_lite.commands.reporter import TerminalReporter
    from mergekit_lite.commands.screen import made, no_line
    from mergekit_lite.output.companions import what_is_missing

    reporter = TerminalReporter(quiet=screen.quiet)
    with _stopping_the_server():
        boosted = search_and_write(prepared, partial(_show_point, screen), screen.progress, screen.warn, reporter)
    if as_json:
        click.echo(json.dumps(boosted.to_json(), indent=1))
        return
    for line in verdict(boosted.result):
        screen.out.print(line)
    if boosted.finished is not None:
        for output in boosted.finished.outputs:
            screen.out.print(made(output))
    screen.out.print(f"report: {boosted.page}")
    if boosted.finished is not None:
        screen.warn(no_line(boosted.finished.reports[0]))
        screen.warn(what_is_missing(prepared.family.plan(prepared.family.baseline)))


@contextmanager
def _stopping_the_server() -> Iterator[None]:
    """Turn a request to end this process into an exit, so that contexts stop the server they started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_point(screen: Screen, point: Point) -> None:
    from mergekit_lite.boosting.summary import figures

    if not screen.quiet:
        why = point.dropped or ", ".join(point.beyond)
        screen.err.print(f"{point.name}: {figures(point.gain)}{f', {why}' if why else ''}")


def _show(prepared: Prepared, screen: Screen) -> None:
    from mergekit_lite.boosting.description import described
    from mergekit_lite.commands.screen import table

    folder, output = prepared.request.folder, prepared.request.output
    facts = {**described(prepared), "kept in": str(folder), "output": str(output)}
    screen.out.print(table(("", ""), facts.items()))
