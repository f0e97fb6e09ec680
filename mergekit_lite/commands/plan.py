"""``mergekit-lite plan``: what a merge recipe would do."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_lite.commands import running


@click.command(
    name="plan",
    epilog="""\b
Examples:
  mergekit-lite plan recipe.yml
  mergekit-lite plan recipe.yml --json
""",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@running.takes_stream
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")
def command(recipe: Path, as_json: bool, verbose: bool) -> None:
    """Print what RECIPE would do: methods and numbers of all tensors, sizes, memory, what is copied or left out."""
    from mergekit_lite.commands import json_output
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.merging import plan_merge

    plan = plan_merge(recipe, "merged")
    if as_json:
        click.echo(json.dumps(json_output.with_fetched(json_output.of_plan(plan, None)), indent=1))
    else:
        Screen(quiet=False, verbose=verbose).plan(plan, None)
