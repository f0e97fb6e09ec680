"""``mergekit-lite inspect``: what a model is made of, and what looks wrong with it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import running

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.comparison.inspection import Inspection

FROM_CONFIG = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_attention_heads",
               "num_key_value_heads", "vocab_size", "max_position_embeddings")  # fmt: skip


@click.command(
    name="inspect",
    epilog="""\b
Examples:
  mergekit-lite inspect ./model
  mergekit-lite inspect ./model --stats -v
  mergekit-lite inspect org/name --json
""",
)
@click.argument("model")
@click.option("--stats", is_flag=True, help="Read the weights too: NaN, infinity, dead rows, mean, RMS, largest.")
@click.option("--threads", type=click.IntRange(min=1), help="Workers for --stats; one for each core by default.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")
def command(model: str, stats: bool, threads: int | None, as_json: bool, verbose: bool) -> None:
    """Show what MODEL is made of, and what looks wrong with it: from headers alone, unless --stats is given.

    MODEL is a folder, a .safetensors or torch file, or a hub repository. What looks wrong is a hint, no
    error: the exit code is 0.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.comparison.inspection import inspect

    screen = Screen(quiet=as_json, verbose=verbose)
    with screen.progress("reading") as progress:
        found = inspect(model, stats=stats, threads=threads, progress=progress, processes=running.PROCESSES)
    if as_json:
        click.echo(json.dumps(as_data(found), indent=1, allow_nan=False))
    else:
        _show(screen, found)


def as_data(found: Inspection) -> dict[str, Any]:
    """Everything as plain data; None where a figure has no meaning."""
    checkpoint = found.checkpoint
    weights = {one.name: asdict(one) for one in found.weights or ()}
    return {
        "model": checkpoint.reference,
        "revision": checkpoint.revision,
        "files": [{"name": file.path.name, "bytes": file.size} for file in checkpoint.files],
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "dtypes": found.dtypes,
        "stacks": dict(found.stacks),
        "tied": found.tied,
        "quantised": found.quantised,
        "config": _config(found),
        "tokenizer": dict(found.tokenizer),
        "left_out": dict(checkpoint.left_out),
        "doubts": list(found.doubts),
        "tensors": [
            {
                "name": name,
                "dtype": spec.stored_dtype,
                "shape": list(spec.shape),
                "bytes": spec.nbytes,
                **{key: _finite(value) for key, value in weights.get(name, {}).items() if key != "name"},
            }
            for name, spec in checkpoint.tensors.items()
        ],
    }


def _config(found: Inspection) -> dict[str, Any]:
    return {key: value for key, value in (found.checkpoint.config or {}).items() if key in FROM_CONFIG}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(screen: Screen, found: Inspection) -> None:
    from mergekit_lite.commands.screen import size, table
    from mergekit_lite.errors import counted

    checkpoint = found.checkpoint
    facts = {
        "model": checkpoint.reference + (f" at {checkpoint.revision}" if checkpoint.revision else ""),
        "weights": f"{counted(found.parameters, 'parameter')} in {counted(len(checkpoint.tensors), 'tensor')}, "
        f"{size(found.nbytes)} in {counted(len(checkpoint.files), 'file')}",
        "dtypes": ", ".join(f"{dtype} {count / max(found.parameters, 1):.1%}" for dtype, count in found.dtypes.items()),
        "layers": ", ".join(f"{length} of {stack or 'the model'}" for stack, length in found.stacks.items()) or "none",
        "head tied": found.tied,
        "quantised": found.quantised,
        **{key.replace("_", " "): json.dumps(value, ensure_ascii=False) for key, value in _config(found).items()},
        **{f"tokenizer {key}" if key != "chat template" else key: value for key, value in found.tokenizer.items()},
    }
    screen.out.print(table(("", ""), list(facts.items())))
    rows = [
        (group.name, str(group.tensors), _shape(group.shape), group.dtype, size(group.nbytes)) for group in found.groups
    ]
    screen.out.print(table(("tensors (* is a number)", ">count", ">shape", "dtype", ">size"), rows))
    if found.weights is not None:
        _show_weights(screen, found)
    screen.lines([f"left out: {name}: {why}" for name, why in checkpoint.left_out.items()])
    for doubt in found.doubts:
        screen.warn(doubt)
    if not found.doubts:
        screen.out.print(f"nothing looks wrong{'' if found.weights is not None else ' in the headers'}")


def _show_weights(screen: Screen, found: Inspection) -> None:
    from mergekit_lite.commands.screen import table

    weights = sorted(found.weights or (), key=lambda one: -one.largest)
    shown = weights if screen.verbose else weights[:10]
    rows = [(one.name, f"{one.mean:.1e}", f"{one.rms:.1e}", f"{one.largest:.3g}", one.doubt) for one in shown]
    title = "tensor" if screen.verbose else "tensors with the largest weights"
    screen.out.print("", table((title, ">mean", ">RMS", ">largest", "looks wrong"), rows), sep="\n")
    if len(weights) > len(shown):
        screen.out.print(f"… and {len(weights) - len(shown):,} more (-v shows all)")


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
