"""``mergekit-lite compare``: what models changed in their common base."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import json_output, running, values
from mergekit_lite.engine.ray_cluster import workers_of

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.comparison.comparison import Comparison, DeltaFigures

SHOWN = 10
WRITABLE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    name="compare",
    epilog="""\b
Examples:
  mergekit-lite compare ./base ./math ./code
  mergekit-lite compare org/base org/math --stream   (read by range, nothing stored)
  mergekit-lite compare ./sft ./dpo --alpha 0.1,0.3 --dtype bfloat16 --plot changes.png
  mergekit-lite compare ./base ./math ./code --html report.html --csv figures.csv
  mergekit-lite compare ./base ./math ./code --ray auto
  mergekit-lite compare ./base './run/step-*' --run --html run.html   (the path of a training run)
""",
)
@click.argument("base")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--run", is_flag=True, help="MODELS are checkpoints of one training run, the folder that holds them, or a pattern."
)
@click.option(
    "--steps",
    metavar="N,M[,…]",
    callback=values.numbers,
    help="With it, their steps; by default those in their names.",
)
@click.option("--top-k", default=0.2, show_default=True, help="Share of the weights in a mask of the largest changes.")
@click.option(
    "-a",
    "--alpha",
    "alphas",
    metavar="A[,B…]",
    callback=values.numbers,
    default="0.1,0.3,0.5",
    show_default=True,
    help="Alphas whose effect after rounding is computed.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("bfloat16", "float16"),
    show_default=True,
    help="To round to; may be repeated.",
)
@click.option("--select-topk", default=1.0, show_default=True, help="SCE's share of the weights to select.")
@click.option("--csv", "csv_path", type=WRITABLE, help="Write all figures as a table of plain text.")
@click.option("--plot", type=WRITABLE, help="Draw a .png, .svg or .pdf: layers × modules, cosines, sizes.")
@click.option("--html", "html_path", type=WRITABLE, help="Write one page with plots, tables that sort, and a summary.")
@click.option("--threads", type=click.IntRange(min=1), help="Workers; one for each core by default.")
@running.takes_stream
@running.takes_ray
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")
def command(
    base: str,
    models: tuple[str, ...],
    csv_path: Path | None,
    plot: Path | None,
    html_path: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    ray: str | None,
    **options: Any,
) -> None:
    """Show what MODELS, all tuned from BASE, changed in it, where, and whether they agree. Each is read once.

    For each tensor, each layer and overall: size of the delta, share of changed weights, cosines, signs, overlap of the
    largest changes, the coefficients VaRM and SCE would find, alpha after rounding, stable rank.

    With --run, the path of a training run that began with BASE: over the steps, how far it went, the cosine of each
    update with the one before, and the share of the checkpoints' variance that one line explains (RELEX).
    """
    from mergekit_lite.commands.screen import Screen, made
    from mergekit_lite.comparison import export, plots
    from mergekit_lite.comparison.comparison import compare
    from mergekit_lite.pages.drawing import check_drawable
    from mergekit_lite.pages.whole_files import written_whole

    if plot is not None or html_path is not None:
        check_drawable(plot)
    for path in (csv_path, plot, html_path):
        values.check_folder(path)
    screen = Screen(quiet=quiet or as_json, verbose=verbose)
    with workers_of(ray, workers=options["threads"]) as crew, screen.progress("comparing", crew) as progress:
        named = models[0] if options["run"] and len(models) == 1 else models
        comparison = compare(base, named, progress=progress, processes=running.PROCESSES, ray=crew, **options)
    if csv_path is not None:
        with written_whole(csv_path) as partial, partial.open("w", encoding="utf-8", newline="") as table:
            export.write_csv(comparison, table)
    if plot is not None:
        plots.save(comparison, plot)
    if html_path is not None:
        from mergekit_lite.comparison.html_report import page

        with written_whole(html_path) as partial:
            partial.write_text(page(comparison), encoding="utf-8", newline="\n")
    if as_json:
        click.echo(
            json.dumps(json_output.with_fetched(export.as_data(comparison) | json_output.of_nodes(crew)), indent=1)
        )
    elif not quiet:
        _show(screen, comparison)
    for name in comparison.nonfinite:
        screen.warn(f"{name} has NaN or infinity; it is left out of layers and totals.")
    screen.nodes(crew)
    if not screen.quiet:
        for written in filter(None, (csv_path, plot, html_path)):
            screen.err.print(made(written))


def _show(screen: Screen, comparison: Comparison) -> None:
    from mergekit_lite.commands.screen import table
    from mergekit_lite.comparison.comparison import letter
    from mergekit_lite.comparison.suggestions import suggestions

    letters = [letter(number) for number in range(len(comparison.models))]
    rows = zip(["base", *letters], [comparison.base, *comparison.models], strict=True)
    screen.out.print(table(("", "model"), list(rows)))
    for overview in _overall(comparison, letters):
        screen.out.print("", overview, sep="\n")
    screen.out.print("", _units("layer", comparison, comparison.layers.items()), sep="\n")
    shown = comparison.tensors if screen.verbose else comparison.most_changed[:SHOWN]
    title = "tensor" if screen.verbose else "tensors that changed most"
    tensors = [(one.tensor.name, comparison.figures(one)) for one in shown]
    screen.out.print("", _units(title, comparison, tensors), sep="\n")
    if len(comparison.tensors) > len(shown):
        screen.out.print(f"… and {len(comparison.tensors) - len(shown):,} more (-v shows all)")
    screen.out.print()
    for suggestion in suggestions(comparison):
        screen.out.print(f"• {suggestion}")
    screen.lines([f"not compared: {one.name} of {one.model}: {one.why}" for one in comparison.unmatched])


def _overall(comparison: Comparison, letters: list[str]) -> list[Any]:
    from mergekit_lite.commands.screen import table
    from mergekit_lite.comparison.comparison import looks_like
    from mergekit_lite.comparison.suggestions import figure, percent

    all_of, settings = comparison.overall, comparison.settings
    of_models = [
        (
            name,
            figure(all_of.rms[n], ".1e"),
            figure(all_of.norm[n], ".3g"),
            percent(all_of.changed[n]),
            figure(all_of.varm[n], ".3f"),
            figure(all_of.sce[n], ".3f"),
            figure(all_of.stable_rank[n], ".1f"),
            looks_like(all_of.rms[n]),
        )
        for n, name in enumerate(letters)
    ]
    heads = ("", ">RMS(delta)", ">norm", ">changed", ">VaRM", ">SCE", ">rank", "looks (by size)")
    tables = [table(heads, of_models)]
    if comparison.steps:
        tables += _path(comparison)
    elif len(letters) > 1:
        pairs = [
            (
                f"{letters[i]} {letters[j]}",
                figure(all_of.cosine[i][j], ".3f"),
                *(percent(of[i][j]) for of in (all_of.both, all_of.agree, all_of.conflict, all_of.overlap)),
            )
            for i, j in combinations(range(len(letters)), 2)
        ]
        overlap = f">top {100 * settings.top_k:g} % shared"
        tables.append(table(("", ">cosine", ">both changed", ">same sign", ">opposite", overlap), pairs))
    alphas = [
        (dtype, f"{alpha:g}", *(figure(row[number], ".4f") for number in comparison.shown))
        for dtype, of_dtype in zip(settings.dtypes, all_of.effective, strict=True)
        for alpha, row in zip(settings.alphas, of_dtype, strict=True)
    ]
    return [*tables, table(("rounded to", ">alpha", *(f">{letters[number]}" for number in comparison.shown)), alphas)]


def _path(comparison: Comparison) -> list[Any]:
    """Return the tables of a run's path, and of what one line explains of each kind of tensor, the least first."""
    from mergekit_lite.commands.screen import table
    from mergekit_lite.comparison.comparison import letter
    from mergekit_lite.comparison.run_path import by_module, path_of
    from mergekit_lite.comparison.suggestions import figure, percent

    of = path_of(comparison)
    rows = [
        (
            letter(number),
            f"{step:g}",
            *(figure(length[number], ".3g") for length in (of.norm, of.moved)),
            *(figure(cosine[number], ".3f") for cosine in (of.turn, of.toward)),
            *(percent(share[number]) for share in (of.explained, of.bound)),
        )
        for number, step in enumerate(of.steps)
    ]
    heads = ("", ">step", ">norm", ">moved", ">cosine with update before", ">with last", ">one line", ">to follow it")
    shares = {name: path.explained[-1] for name, path in by_module(comparison).items()}
    least = sorted(((share, name) for name, share in shares.items() if share is not None))[:SHOWN]
    modules = [(name, percent(share)) for share, name in least]
    return [table(heads, rows), table(("least explained by one line", ">share"), modules)]


def _units(title: str, comparison: Comparison, units: Iterable[tuple[str, DeltaFigures]]) -> Any:
    from mergekit_lite.commands.screen import table
    from mergekit_lite.comparison.comparison import letter
    from mergekit_lite.comparison.suggestions import figure, percent

    letters = [letter(number) for number in comparison.shown]
    several = len(comparison.models) > 1
    rows = [
        (
            name,
            *(figure(figures.rms[number], ".1e") for number in comparison.shown),
            *([figure(figures.cosine[0][1], ".2f")] if len(letters) == 2 else []),
            percent(figures.split) if several else percent(figures.changed[0]),
        )
        for name, figures in units
    ]
    heads = [title, *(f">RMS {name}" for name in letters)]
    heads += [">cosine"] if len(letters) == 2 else []
    return table([*heads, ">signs split" if several else ">changed"], rows)
