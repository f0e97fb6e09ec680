"""``mergekit-lite tokenizer``: models with another tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import CommandGroup, running
from mergekit_lite.engine.run import RunOptions, check_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.transplanting.leave_out import Trial


@click.group(name="tokenizer", cls=CommandGroup)
def command() -> None:
    """Give a model another model's tokenizer.

    \b
    Examples:
      mergekit-lite tokenizer transplant ./model ./donor -o ./transplanted
    """


@command.command(
    name="transplant",
    short_help="Give a model another one's tokenizer.",
    epilog="""\b
Examples:
  mergekit-lite tokenizer transplant ./llama ./qwen -o ./llama-speaks-qwen
  mergekit-lite tokenizer transplant ./llama ./qwen -o ./out --dry-run     (how well known tokens are rebuilt)
  mergekit-lite tokenizer transplant ./llama ./qwen -o ./out --method subword
  mergekit-lite tokenizer transplant ./llama ./qwen -o ./out -k 32 --pad-to-multiple-of 64
""",
)
@click.argument("model")
@click.argument("donor")
@click.option("-o", "--output", required=True, help="A folder.")
@click.option(
    "--method",
    type=click.Choice(["omp", "nearest", "subword", "mean"]),
    default="omp",
    show_default=True,
    help="How rows are made that MODEL lacks: sums found by matching pursuit, nearest rows, pieces, or the mean.",
)
@click.option("-k", type=click.IntRange(min=1), default=64, show_default=True, help="omp, nearest: rows in a sum.")
@click.option("--pad-to-multiple-of", type=click.IntRange(min=1), help="Of rows; by default as many as DONOR has.")
@running.takes_shard_size
@running.takes_copy_code
@running.takes_run_options
def transplant(
    model: str, donor: str, output: str, run_options: RunOptions, view: running.View, **options: Any
) -> None:
    """Make MODEL with the tokenizer of DONOR, another model.

    Rows of tokens that both have are MODEL's. Those that it lacks are made of the rows of shared tokens, as DONOR's own
    are made of its rows of them. First it is told how well known tokens are rebuilt when they are left out, and on the
    output's card.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.transplanting.leave_out import tried
    from mergekit_lite.transplanting.planning import plan_transplant

    plan = plan_transplant(model, donor, output, **options)
    check_outputs(plan, resume=run_options["resume"], force=run_options["force"])
    plan, trials = tried(plan)
    _show(trials, Screen(quiet=view.quiet or view.as_json, verbose=view.verbose))
    more = {"leave_out": [trial.to_json() for trial in trials]}
    running.carry_out(plan, run_options, view, more=more if trials else {})


def _show(trials: Sequence[Trial], screen: Screen) -> None:
    from mergekit_lite.commands.screen import table
    from mergekit_lite.transplanting.leave_out import COLUMNS

    if screen.quiet or not trials:
        return
    *texts, tokens, cosine, error = COLUMNS
    screen.out.print("known tokens, left out and rebuilt from the others:")
    screen.out.print(table((*texts, f">{tokens}", f">{cosine}", f">{error}"), [each.row for each in trials]))
    screen.out.print()
