"""``mergekit-lite estimate``: a whole benchmark's score from a hundred of its items."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergekit_lite.errors import UsageError, listing
from mergekit_lite.input_files import read_text


@click.group(name="estimate", no_args_is_help=True)
def command() -> None:
    """Estimate a whole benchmark's score from a hundred of its items (tinyBenchmarks, arXiv 2402.14992).

    \b
    Examples:
      mergekit-lite estimate convert tinyBenchmarks.pkl tiny.npz
      mergekit-lite estimate scores tiny.npz mmlu results.txt
    """


@command.command(
    epilog="""\b
Examples:
  mergekit-lite estimate convert tinyBenchmarks.pkl tiny.npz
""",
)
@click.argument("pickled", type=click.Path(path_type=Path))
@click.argument("parameters", type=click.Path(path_type=Path))
def convert(pickled: Path, parameters: Path) -> None:
    """Convert the authors' parameters, PICKLED, to PARAMETERS, an .npz that holds arrays alone.

    The pickle is read as arrays and plain containers; one that asks for anything else is refused.
    """
    from mergekit_lite.answers.tiny_benchmarks import convert as converted

    click.echo(f"{parameters} has {', '.join(converted(pickled, parameters))}")


@command.command(
    epilog="""\b
Examples:
  mergekit-lite estimate scores tiny.npz mmlu results.txt
  mergekit-lite estimate scores tiny.npz mmlu results.txt --json
""",
)
@click.argument("parameters", type=click.Path(path_type=Path))
@click.argument("benchmark")
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--as-released", is_flag=True, help="Balance parts of a scenario as the authors' function does.")
@click.option("--json", "as_json", is_flag=True, help="Print the estimates as JSON.")
def scores(parameters: Path, benchmark: str, results: Path, as_released: bool, as_json: bool) -> None:
    """Print the estimates of each scenario of BENCHMARK, from 0 to 1.

    RESULTS has a line with a number from 0 to 1 for each item that is asked, in the order of the published tiny data
    sets. The authors give errors of about 0.02: use the estimates to rank, and measure the whole benchmark before you
    claim a score.
    """
    from mergekit_lite.answers.tiny_benchmarks import Benchmark

    known = Benchmark.read(parameters, benchmark)
    found = known.estimates(_numbers(results), as_released)
    if as_json:
        click.echo(json.dumps({name: each._asdict() for name, each in found.items()}))
        return
    width = max(len("scenario"), *map(len, found))
    click.echo(f"{'scenario':<{width}}  gp-IRT   p-IRT     IRT")
    for name, each in found.items():
        click.echo(f"{name:<{width}}  {each.gp_irt:6.4f}  {each.p_irt:6.4f}  {each.irt:6.4f}")


def _numbers(path: Path) -> list[float]:
    numbers, problems = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            numbers.append(float(line))
        except ValueError:
            problems.append(f"{path}:{number}: {line[:40]!r} is no number")
    if problems:
        raise UsageError(listing("Results that can't be read", problems, shown=5))
    return numbers
