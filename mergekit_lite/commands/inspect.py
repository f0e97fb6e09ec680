"""``mergekit-lite inspect``: what a model is made of, and what looks wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import running

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.comparison.inspection import Inspection


@click.command(
    name="inspect",
    epilog="""\b
Examples:
  mergekit-lite inspect ./model
  mergekit-lite inspect ./model --stats -v
  mergekit-lite inspect org/name --json
  mergekit-lite inspect out/teach/NAME   (what a teacher said)
  mergekit-lite inspect gram.safetensors   (what statistics were gathered)
  mergekit-lite inspect hf://org/name --stats   (read by range, nothing stored; s3://, gs://, az://, https:// too)
""",
)
@click.argument("model")
@click.option("--stats", is_flag=True, help="Read the weights too: NaN, infinity, dead rows, mean, RMS, largest.")
@click.option("--threads", type=click.IntRange(min=1), help="Workers for --stats; one for each core by default.")
@running.takes_stream
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")
def command(model: str, stats: bool, threads: int | None, as_json: bool, verbose: bool) -> None:
    """Show what MODEL is made of, and what looks wrong with it: from headers alone, unless --stats is given.

    MODEL is a folder, a .safetensors, .gguf or torch file, or a hub repository. What looks wrong is a hint, no
    error: the exit code is 0. It may be a folder of what a teacher said, or a file of statistics, too.
    """
    from mergekit_lite.checkpoint.statistics_file import is_statistics, open_statistics
    from mergekit_lite.commands import json_output
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.comparison.inspection import inspect
    from mergekit_lite.distillation.teaching.files import TaughtFile, is_taught

    screen = Screen(quiet=as_json, verbose=verbose)
    if is_taught(Path(model)):
        _show_facts(screen, TaughtFile(model).facts(), as_json)
        return
    if is_statistics(Path(model)):
        _show_facts(screen, open_statistics(model).facts(), as_json)
        return
    with screen.progress("reading") as progress:
        inspection = inspect(model, stats=stats, threads=threads, progress=progress, processes=running.PROCESSES)
    if as_json:
        click.echo(json.dumps(json_output.with_fetched(inspection.to_json()), indent=1, allow_nan=False))
    else:
        _show(screen, inspection)


def _show_facts(screen: Screen, facts: Mapping[str, Any], as_json: bool) -> None:
    from mergekit_lite.commands.screen import table
    from mergekit_lite.plain_text import plain_line

    if as_json:
        click.echo(json.dumps(facts, indent=1, allow_nan=False))
        return
    shown = [(key.replace("_", " "), _shown(value)) for key, value in facts.items() if value is not None]
    screen.out.print(table(("", ""), [(plain_line(key), plain_line(value)) for key, value in shown]))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _show(screen: Screen, inspection: Inspection) -> None:
    from mergekit_lite.commands.screen import shape_text, size, table
    from mergekit_lite.errors import counted

    checkpoint, parameters = inspection.checkpoint, max(inspection.parameters, 1)
    stacks = [f"{length} of {stack or 'the model'}" for stack, length in inspection.stacks.items()]
    facts = {
        "model": checkpoint.reference + (f" at {checkpoint.revision}" if checkpoint.revision else ""),
        "weights": f"{counted(inspection.parameters, 'parameter')} in {counted(len(checkpoint.tensors), 'tensor')}, "
        f"{size(inspection.nbytes)} in {counted(len(checkpoint.files), 'file')}",
        "dtypes": ", ".join(f"{dtype} {count / parameters:.1%}" for dtype, count in inspection.dtypes.items()),
        "layers": ", ".join(stacks) or "none",
        "head tied": inspection.tied,
        "quantised": inspection.quantised,
        **{key.replace("_", " "): json.dumps(value, ensure_ascii=False) for key, value in inspection.config.items()},
        **{f"tokenizer {key}" if key != "chat template" else key: value for key, value in inspection.tokenizer.items()},
    }
    screen.out.print(table(("", ""), list(facts.items())))
    rows = [
        (group.name, str(group.tensors), shape_text(group.shape), group.dtype, size(group.nbytes))
        for group in inspection.groups
    ]
    screen.out.print(table(("tensors (* is a number)", ">count", ">shape", "dtype", ">size"), rows))
    if inspection.weights is not None:
        _show_weights(screen, inspection)
    screen.lines([f"left out: {name}: {why}" for name, why in checkpoint.left_out.items()])
    for doubt in inspection.doubts:
        screen.warn(doubt)
    if not inspection.doubts:
        screen.out.print(f"nothing looks wrong{'' if inspection.weights is not None else ' in the headers'}")


def _show_weights(screen: Screen, inspection: Inspection) -> None:
    from mergekit_lite.commands.screen import table

    weights = sorted(inspection.weights or (), key=lambda one: -one.largest)
    shown = weights if screen.verbose else weights[:10]
    rows = [(one.name, f"{one.mean:.1e}", f"{one.rms:.1e}", f"{one.largest:.3g}", one.doubt) for one in shown]
    title = "tensor" if screen.verbose else "tensors with the largest weights"
    screen.out.print("", table((title, ">mean", ">RMS", ">largest", "looks wrong"), rows), sep="\n")
    if len(weights) > len(shown):
        screen.out.print(f"… and {len(weights) - len(shown):,} more (-v shows all)")
