"""``mergekit-lite distill``: several strong models teach a small one by preferences."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.commands import CommandGroup
from mergekit_lite.commands.reporter import TerminalReporter
from mergekit_lite.commands.running import takes_ray

if TYPE_CHECKING:
    from mergekit_lite.distillation.data.exporting import Format
    from mergekit_lite.distillation.recipe.schema import Recipe


@click.group(name="distill", cls=CommandGroup)
def command() -> None:
    """Distill strong models into a small one: by their answers (WRPO, FuseChat-3.0), or their distributions (FuseLLM).

    A recipe goes through five stages, six with teachers; each reads files and writes files in the recipe's folder, and
    goes on where it stopped.

    \b
    Examples:
      mergekit-lite distill run recipe.yaml --dry-run
      mergekit-lite distill run recipe.yaml
      mergekit-lite distill sample recipe.yaml
    """


def stage(name: str, examples: tuple[str, ...] = ("",)) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a function the command of a stage, with a recipe as its argument."""
    lines = "".join(f"\n  mergekit-lite distill {name} recipe.yaml {options}".rstrip() for options in examples)

    def as_command(function: Callable[..., None]) -> click.Command:
        function = click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")(function)
        function = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))(function)
        return command.command(name=name, epilog=f"\b\nExamples:{lines}")(function)

    return as_command


FILE = click.Path(dir_okay=False, path_type=Path)
skip_missing_option = click.option(
    "--skip-missing", is_flag=True, help="Go on without the answers that a source fails to give."
)


@stage("run", ("", "--dry-run", "--dry-run --json"))
@skip_missing_option
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
def run(recipe: Path, quiet: bool, skip_missing: bool, dry_run: bool, as_json: bool) -> None:
    """Run all stages of RECIPE in their order. What is done is not done again.

    Where pairs are made of the target's own answers, it is asked for them once its SFT is done: sample, score, pair
    and train have a second turn then.
    """
    if as_json and not dry_run:
        raise click.UsageError("--json is for --dry-run.")
    from mergekit_lite.distillation.distilling import distill

    reporter = TerminalReporter(quiet=quiet or as_json)
    if dry_run:
        _show_plan(recipe, reporter, as_json)
    else:
        distill(recipe, skip_missing=skip_missing, reporter=reporter)


@stage("sample", ("", "--skip-missing", "--ray auto", "--source strong --write-batch requests.jsonl"))
@skip_missing_option
@takes_ray
@click.option("--source", metavar="NAME", help="The source of a batch, if there are several.")
@click.option(
    "--write-batch", type=FILE, metavar="FILE", help="Ask nobody: write a source's requests in OpenAI's batch format."
)
@click.option("--read-batch", type=FILE, metavar="FILE", help="Ask nobody: read the results of such requests.")
def sample(
    recipe: Path,
    quiet: bool,
    skip_missing: bool,
    ray: str | None,
    source: str | None,
    write_batch: Path | None,
    read_batch: Path | None,
) -> None:
    """Ask the sources of RECIPE: prompts × sources × samples.

    Asks only for what is missing.
    """
    if write_batch is not None and read_batch is not None:
        raise click.UsageError("--write-batch and --read-batch are two steps: the service's work lies between them.")
    file = write_batch or read_batch
    if file is None:
        if source is not None:
            raise click.UsageError("--source is for --write-batch and --read-batch.")
        return _carry_out("sample", recipe, quiet, skip_missing=skip_missing, ray=ray)
    if ray is not None:
        raise click.UsageError("--ray is for models that answer here: a batch asks nobody.")
    from mergekit_lite.distillation import batch

    reporter = TerminalReporter(quiet=quiet)
    step = batch.write_batch if write_batch is not None else batch.read_batch
    return step(_at_work(recipe, reporter), source, file, reporter)


@stage("score")
def score(recipe: Path, quiet: bool) -> None:
    """Score the answers: reward models, verifiers, judges."""
    _carry_out("score", recipe, quiet)


@stage("pair", ("", "--skip-missing"))
@skip_missing_option
def pair(recipe: Path, quiet: bool, skip_missing: bool) -> None:
    """Make SFT and preference rows of the answers.

    Prints what became of every prompt.
    """
    _carry_out("pair", recipe, quiet, skip_missing=skip_missing)


@stage("teach", ("", "--skip-missing"))
@click.option("--skip-missing", is_flag=True, help="Go on without the rows that a teacher's server fails to score.")
def teach(recipe: Path, quiet: bool, skip_missing: bool) -> None:
    """Ask the teachers what they think of the SFT rows, token by token.

    Asks only for what is missing. mergekit-lite inspect FOLDER/teach/NAME tells what is there.
    """
    _carry_out("teach", recipe, quiet, skip_missing=skip_missing)


@stage("train")
def train(recipe: Path, quiet: bool) -> None:
    """Train the target: sft, fuse, on_policy, preference.

    Each as far as there are rows.
    """
    _carry_out("train", recipe, quiet)


@stage("report")
def report(recipe: Path, quiet: bool) -> None:
    """Write the report.

    It has curves, scores before and after on held-out prompts, and answers side by side.
    """
    from mergekit_lite.distillation.recipe.loading import load
    from mergekit_lite.distillation.report import report as write_report

    write_report(load(recipe), TerminalReporter(quiet=quiet))  # of all rounds


@stage("export", ("--format trl -o rows",))
@click.option(
    "--format", "form", required=True, type=click.Choice(["trl", "llama-factory", "sharegpt"]), help="Of which tool."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A new folder; files lie in it as JSON Lines.",
)
def export(recipe: Path, quiet: bool, form: Format, output: Path) -> None:
    """Write the rows of RECIPE for another tool.

    The stage pair has made them.
    """
    from mergekit_lite.distillation.data.exporting import export as export_rows

    reporter = TerminalReporter(quiet=quiet)
    export_rows(_at_work(recipe, reporter), reporter, to=output, form=form)


def _carry_out(name: str, recipe: Path, quiet: bool, **options: bool | str | None) -> None:
    """Run one stage: a function of its own name, in the module of its name."""
    reporter = TerminalReporter(quiet=quiet)
    run_stage = getattr(import_module(f"mergekit_lite.distillation.{name}"), name)
    run_stage(_at_work(recipe, reporter), reporter, **options)


def _at_work(path: Path, reporter: TerminalReporter) -> Recipe:
    """Return the recipe in a file, or that of the round at work, which the first process of a launch tells."""
    from mergekit_lite.distillation.recipe.loading import load
    from mergekit_lite.distillation.reporter import Reporter
    from mergekit_lite.distillation.rounds import current

    return current(load(path), reporter if os.environ.get("RANK", "0") == "0" else Reporter())


def _show_plan(path: Path, reporter: TerminalReporter, as_json: bool) -> None:
    from mergekit_lite.distillation import prompts
    from mergekit_lite.distillation.dry_run import TOKENS, dry_run
    from mergekit_lite.distillation.recipe.loading import load
    from mergekit_lite.distillation.train import check
    from mergekit_lite.errors import counted, listing

    recipe = load(path)
    check(recipe)  # what training would refuse hours later
    plan = dry_run(recipe, [] if recipe.rows is not None else prompts.read(recipe, reporter, plan=True))
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=1))
        return
    heading = "domain", ">prompts", "rule", ">SFT rows ≤", ">preference rows ≤"
    domains = [(d.domain or "–", f"{d.prompts:,}", d.rule, f"{d.sft:,}", f"{d.preference:,}") for d in plan.domains]
    if recipe.train.reads_rows:
        reporter.table(heading, domains)
    else:  # on-policy training has prompts alone
        reporter.table(heading[:2], [row[:2] for row in domains])
    reporter.line("")
    sources = [(s.name, s.model, s.where, f"{s.requests:,}", f"{s.done:,}", f"{s.cut:,}") for s in plan.sources]
    if sources:
        reporter.table(("source", "model", "asked", ">answers", ">done", ">cut"), sources)
        reporter.line(f"\nscored by {', '.join(plan.scorers) or 'nothing'}\n")
    if plan.teachers:
        taught = [
            (
                t.name,
                t.model,
                t.where,
                t.of,
                f"{t.rows:,}",
                f"{t.done:,}",
                f"{t.bytes / 1e9:,.2f} GB",
                _exaflops(t.exaflops),
            )
            for t in plan.teachers
        ]
        reporter.table(("teacher", "model", "asked", "scores", ">rows ≤", ">done", ">files ≈", ">EFLOP ≈"), taught)
        reporter.line(f"sizes and costs of teaching are at {TOKENS} tokens a response, where it may have as many\n")
    if plan.rounds:
        rounds = [(f"{r.round}", f"{r.prompts:,}", f"{r.replayed:,}", "yes" if r.done else "no") for r in plan.rounds]
        reporter.table((">round", ">prompts", ">replayed ≤", "done"), rounds)
        reporter.line("")
    stages = [(stage.stage, f"{stage.rows:,}", f"{stage.steps:,}") for stage in plan.training]
    reporter.table(("training", ">rows ≤", ">steps ≤"), stages)
    reporter.line(f"\neverything lies in {recipe.folder}")
    for missing in plan.missing_models:
        reporter.warn(missing)
    for problem in filter(None, (training.problem for training in plan.training)):
        reporter.warn(f"this run will be refused: {problem}")
    if plan.left_out:
        reporter.warn(listing(f"{counted(len(plan.left_out), 'row')} of the data left out", plan.left_out, 5))


def _exaflops(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
