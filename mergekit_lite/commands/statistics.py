"""``mergekit-lite statistics``: what merges with activations need to know of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from mergekit_lite.commands import values

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.gathering.gathering import Gathered

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    name="statistics",
    epilog="""\b
Examples:
  mergekit-lite statistics ./tuned --prompts maths.jsonl -o tuned-gram.safetensors
  mergekit-lite statistics ./tuned --prompts maths.jsonl --fisher -o tuned-fisher.safetensors
  mergekit-lite statistics ./tuned --prompts a.jsonl --prompts b.parquet --limit 256 --device cuda -o gram.safetensors
  mergekit-lite statistics regmean_plus.yml --plus --prompts ./math=math.jsonl --prompts ./code=code.jsonl
""",
)
@click.argument("model")
@click.option(
    "--prompts",
    multiple=True,
    required=True,
    metavar="FILE",
    help="JSON, JSONL or Parquet; may be repeated. With --plus MODEL=FILE, the model as the recipe names it.",
)
@click.option("-o", "--output", type=FILE, help="A .safetensors file; with --plus the recipe names them.")
@click.option("--fisher", is_flag=True, help="Gather Fisher information of the responses instead of Gram matrices.")
@click.option(
    "--plus",
    is_flag=True,
    help="MODEL is a recipe of regmean_plus: gather of all its models, each layer behind the merged ones before it.",
)
@click.option(
    "--response",
    default="reference",
    show_default=True,
    metavar="COLUMN",
    help="Column with the responses, which --fisher needs, and Gram matrices take where they are.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Most prompts that are read.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Prompts read at once for Gram matrices.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=values.size,
    help="Most memory for matrices, beside the model: what doesn't fit takes another pass; by default half of what is "
    "free.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 … or auto.")
@click.option("--threads", type=click.IntRange(min=1), help="Workers that read the weights.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists; drop other unfinished work on it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
def command(
    model: str,
    prompts: tuple[str, ...],
    output: Path | None,
    plus: bool,
    fisher: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Let MODEL read prompts, and write what merge_method: regmean or fisher needs to know of it.

    Gram matrices of the inputs of its linear layers, for regmean; with --fisher how sure it is of each weight. A recipe
    names the file by 'statistics' of the model; --plus gathers all files that a recipe of regmean_plus names. A killed
    command goes on where it stopped, when it is given again.
    """
    from mergekit_lite.commands.screen import Screen

    screen = Screen(quiet=quiet or as_json, verbose=False)
    if plus and (fisher or output is not None):
        raise click.UsageError("--plus gathers Gram matrices in the files that the recipe names: no --fisher, no -o.")
    if not plus and output is None:
        raise click.UsageError("Name the file of statistics: -o tuned-gram.safetensors.")
    with screen.progress("reading prompts", unit="tokens") as progress:
        options["progress"] = progress
        if plus:
            from mergekit_lite.gathering.prefixed import gather_statistics_plus

            files = gather_statistics_plus(model, _of_models(prompts), **options)
        else:
            from mergekit_lite.gathering.gathering import gather_statistics

            files = (gather_statistics(model, prompts, cast(Path, output), fisher=fisher, **options),)
    for gathered in files:
        for note in gathered.notes:
            screen.warn(note)
        if not as_json:
            _show(screen, gathered)
    if as_json:
        told = [gathered.to_json() for gathered in files]
        click.echo(json.dumps(told if plus else told[0], indent=1))


def _of_models(prompts: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the files of each model that MODEL=FILE names."""
    files: dict[str, list[str]] = {}
    for each in prompts:
        model, equals, file = each.partition("=")
        if not (model and equals and file):
            raise click.UsageError(f"--prompts {each}: with --plus it is MODEL=FILE, the model as the recipe names it.")
        files.setdefault(model, []).append(file)
    return files


def _show(screen: Screen, gathered: Gathered) -> None:
    from mergekit_lite.commands.screen import made, size
    from mergekit_lite.errors import counted

    read = f"{counted(gathered.tokens, 'token')} of {counted(gathered.examples, 'example')}"
    passes = "pass" if gathered.passes == 1 else "passes"
    what = {"gram": "Gram matrices", "fisher": "tensors of Fisher information"}[gathered.kind]
    screen.note(f"{gathered.matrices:,} {what} ({size(gathered.nbytes)}) of {read}, in {gathered.passes:,} {passes}")
    if not screen.quiet:
        screen.out.print(made(gathered.path))
