"""``mergekit-lite statistics``: what merges with activations need to know of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mergekit_lite.commands import values

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    name="statistics",
    epilog="""\b
Examples:
  mergekit-lite statistics ./tuned --prompts maths.jsonl -o tuned-gram.safetensors
  mergekit-lite statistics ./tuned --prompts maths.jsonl --fisher -o tuned-fisher.safetensors
  mergekit-lite statistics ./tuned --prompts a.jsonl --prompts b.parquet --limit 256 --device cuda -o gram.safetensors
""",
)
@click.argument("model")
@click.option("--prompts", type=FILE, multiple=True, required=True, help="JSON, JSONL or Parquet; may be repeated.")
@click.option("-o", "--output", required=True, type=FILE, help="A .safetensors file.")
@click.option("--fisher", is_flag=True, help="Gather Fisher information of the responses instead of Gram matrices.")
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
    model: str, prompts: tuple[Path, ...], output: Path, as_json: bool, quiet: bool, response: str, **options: Any
) -> None:
    """Let MODEL read prompts, and write what merge_method: regmean or fisher needs to know of it.

    Gram matrices of the inputs of its linear layers, for regmean; with --fisher how sure it is of each weight. A recipe
    names the file by 'statistics' of the model. A killed command goes on where it stopped, when it is given again.
    """
    from mergekit_lite.commands.screen import Screen, made, size
    from mergekit_lite.errors import counted
    from mergekit_lite.gathering.examples import prompts_in
    from mergekit_lite.gathering.gathering import gather_statistics

    screen = Screen(quiet=quiet or as_json, verbose=False)
    loaded = prompts_in(prompts, response)
    with screen.progress("reading prompts", unit="tokens") as progress:
        gathered = gather_statistics(model, loaded, output, progress=progress, **options)
    for note in gathered.notes:
        screen.warn(note)
    if as_json:
        click.echo(json.dumps(gathered.to_json(), indent=1))
        return
    read = f"{counted(gathered.tokens, 'token')} of {counted(gathered.examples, 'example')}"
    passes = "pass" if gathered.passes == 1 else "passes"
    what = {"gram": "Gram matrices", "fisher": "tensors of Fisher information"}[gathered.kind]
    screen.note(f"{gathered.matrices:,} {what} ({size(gathered.nbytes)}) of {read}, in {gathered.passes:,} {passes}")
    if not screen.quiet:
        screen.out.print(made(gathered.path))
