"""``mergekit-lite answer``: prompts answered by several models together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergekit_lite.commands.running import takes_ray

if TYPE_CHECKING:
    from mergekit_lite.answers.aggregating.answering import ToAnswer
    from mergekit_lite.commands.reporter import TerminalReporter

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    name="answer",
    epilog="""\b
Examples:
  mergekit-lite answer prompts.jsonl --recipe moa.yml -o answers.jsonl --dry-run
  mergekit-lite answer prompts.jsonl --recipe moa.yml -o answers.jsonl
  mergekit-lite answer prompts.jsonl --recipe moa.yml -o answers.jsonl --rows --skip-missing
  mergekit-lite answer prompts.jsonl --recipe moa.yml -o answers.jsonl --ray auto
""",
)
@click.argument("prompts", nargs=-1, required=True, type=FILE)
@click.option("--recipe", required=True, type=FILE, help="YAML with models and layers; docs/answer.md has the keys.")
@click.option("-o", "--output", required=True, type=FILE, help="The answers, as JSON Lines.")
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts that are answered.")
@click.option("--rows", is_flag=True, help="Write rows to learn fusing, criticising, refining from, NAME.rows.jsonl.")
@click.option("--skip-missing", is_flag=True, help="Go on without the drafts that a model fails to give.")
@takes_ray
@click.option("--dry-run", is_flag=True, help="Print calls and tokens of each model, ask nobody.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
def command(
    prompts: tuple[Path, ...],
    recipe: Path,
    output: Path,
    limit: int | None,
    rows: bool,
    skip_missing: bool,
    ray: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answer PROMPTS by several models together, layer by layer: drafts, and what is made of them.

    Mixture-of-Agents, Self-MoA, Archon and URIAL are recipes. What was replied is kept beside the answers: the same
    command goes on, and after a change of the recipe asks only for what depends on it.
    """
    from mergekit_lite.answers.aggregating.answering import carry_out, prepare
    from mergekit_lite.commands.reporter import TerminalReporter
    from mergekit_lite.errors import counted

    reporter = TerminalReporter(quiet=quiet or as_json)
    prepared = prepare(prompts, recipe, output, limit=limit, rows=rows, ray=ray)
    for note in prepared.notes:
        reporter.warn(note)
    if dry_run:
        _show_plan(prepared, reporter, as_json)
        return
    done = carry_out(prepared, reporter, rows=rows, skip_missing=skip_missing)
    if as_json:
        content = {
            "output": str(output),
            "answers": done.answers,
            "rows": done.rows,
            "asked": done.asked,
            "missing": list(done.missing),
        }
        click.echo(json.dumps(content, indent=1))
        return
    asked = counted(sum(done.asked.values()), "call")
    reporter.line(f"{counted(done.answers, 'answer')} in {output}, by {asked} in this run")
    if rows:
        reporter.line(f"{counted(done.rows, 'row')} to learn these steps from in {prepared.rows}")


def _show_plan(prepared: ToAnswer, reporter: TerminalReporter, as_json: bool) -> None:
    from mergekit_lite.answers.aggregating.dry_run import CHARACTERS
    from mergekit_lite.errors import counted

    calls = prepared.calls()
    if as_json:
        counts = {"prompts": prepared.prompts, "answers": len(prepared.tasks)}
        click.echo(json.dumps({**counts, "models": [each._asdict() for each in calls]}, indent=1))
        return
    prompts, layers = counted(prepared.prompts, "prompt"), counted(len(prepared.recipe.layers), "layer")
    reporter.line(f"{counted(len(prepared.tasks), 'answer')} to {prompts}, {layers}\n")
    headings = ("model", "named", "asked", ">calls ≤", ">done", ">reads ≤", ">writes ≤")
    reporter.table(
        headings,
        [(c.name, c.model, c.where, f"{c.calls:,}", f"{c.done:,}", f"{c.reads:,}", f"{c.writes:,}") for c in calls],
    )
    reporter.line(f"\nin tokens of {CHARACTERS} characters, of the calls to come; drafts are counted as long as may be")
