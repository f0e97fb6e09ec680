"""``mergekit-lite merge``: run a merge recipe."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lite.commands import running
from mergekit_lite.engine.run import RunOptions
from mergekit_lite.errors import UsageError


@click.command(
    name="merge",
    epilog="""\b
Examples:
  mergekit-lite merge recipe.yml -o ./merged
  mergekit-lite merge recipe.yml -o ./merged --dry-run
  mergekit-lite merge recipe.yml -o ./merged --stream --fetch-cache 20GB   (hub models read by range)
  mergekit-lite merge recipe.yml -o merged.safetensors --threads 4
  mergekit-lite merge several-documents.yml -o ./merged --keep
  mergekit-lite merge recipe.yml -o /shared/merged --ray auto     (all machines of a Ray cluster)
  mergekit-lite merge recipe.yml -o s3://bucket/merged       (into an object store)
  mergekit-lite merge recipe.yml -o ./merged --push org/name (and on the hub)
""",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("out", required=False)
@click.option(
    "-o", "--output", help="A folder, or a .safetensors or .pt file, here or s3://, gs://, az://; the same as OUT."
)
@running.takes_shard_size
@running.takes_copy_code
@click.option("--keep", is_flag=True, help="Keep what lies between several documents for the next run.")
@running.takes_push
@running.takes_run_options
def command(
    recipe: Path,
    out: str | None,
    output: str | None,
    shard_size: int | None,
    copy_code: bool,
    keep: bool,
    run_options: RunOptions,
    view: running.View,
    push: str | None,
    public: bool,
) -> None:
    """Merge models as RECIPE says, a YAML file in mergekit's language.

    Everything is checked before a weight is read: the recipe, the models' names, shapes and dtypes, the room on the
    disk. The command methods lists the methods. A file of several documents is planned whole, and merged one document
    after the other.
    """
    from mergekit_lite.commands import documents as several
    from mergekit_lite.merging import plan_merge
    from mergekit_lite.multimerge import plan_documents
    from mergekit_lite.recipe import text_of
    from mergekit_lite.recipe.documents import parse_documents

    output = output or out
    if output is None or (out is not None and output != out):
        raise UsageError("Name one output: mergekit-lite merge recipe.yml -o ./merged.")
    documents = parse_documents(text_of(recipe), str(recipe))
    if len(documents) > 1:
        if push is not None:
            raise UsageError(f"--push takes a recipe of one document: push the result: mergekit-lite push OUT {push}.")
        resume = run_options["resume"]
        steps = plan_documents(documents, output, shard_size=shard_size, copy_code=copy_code, keep=keep, resume=resume)
        several.carry_out(steps, run_options, view, keep=keep)
        return
    if keep:
        raise UsageError("--keep is for recipes of several documents: this one has nothing in between.")
    plan = plan_merge(recipe, output, shard_size=shard_size, copy_code=copy_code)
    running.carry_out(plan, run_options, view, push, public)
