"""``mergekit-lite plan``: what a merge recipe would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mergekit_lite.commands import running
from mergekit_lite.commands.prediction import predicted, takes_cluster


@click.command(
    name="plan",
    epilog="""\b
Examples:
  mergekit-lite plan recipe.yml
  mergekit-lite plan recipe.yml --json
  mergekit-lite plan recipe.yml --nodes 4 --cores 16 --disk 2,1   (a shared disk that gives each node 2 GB/s)
  mergekit-lite plan recipe.yml --nodes 16 --net 1.25   (an object store, nodes with 10 Gbit/s)
""",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@takes_cluster
@running.takes_shard_size
@running.takes_stream
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")
def command(
    recipe: Path, as_json: bool, verbose: bool, shard_size: int | None, cluster_options: dict[str, Any]
) -> None:
    """Print what RECIPE would do: methods and numbers of all tensors, sizes, memory, what is copied or left out.

    And how long it would take, on this machine or on others: computing is measured here, with made-up weights; without
    --disk and --net this machine's disk is, too. Only headers of the models are read.
    """
    from mergekit_lite.commands import documents as several
    from mergekit_lite.commands import json_output
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.merging import plan_merge
    from mergekit_lite.multimerge import plan_documents
    from mergekit_lite.recipe import text_of
    from mergekit_lite.recipe.documents import final, parse_documents

    screen = Screen(quiet=False, verbose=verbose)
    documents = parse_documents(text_of(recipe), str(recipe))
    if len(documents) > 1:
        output = "merged-{name}" if len(final(documents)) > 1 else "merged"
        steps = plan_documents(documents, output, shard_size=shard_size)
        several.show_plans(steps, screen, as_json=as_json, **cluster_options)
        return
    plan = plan_merge(recipe, "merged", shard_size=shard_size)
    prediction = predicted(plan, **cluster_options)
    threads = prediction.workers if prediction is not None else None
    if as_json:
        told = json_output.of_plan(plan, threads, prediction=prediction)
        click.echo(json.dumps(json_output.with_fetched(told), indent=1))
    else:
        screen.plan(plan, threads, prediction=prediction)
