"""``mergekit-lite tokenizer``: models with another tokenizer, and two tokenizers side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import CommandGroup, running
from mergekit_lite.engine.run import RunOptions, check_outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.distillation.alignment.report import AlignmentReport, Side
    from mergekit_lite.transplanting.leave_out import Trial


@click.group(name="tokenizer", cls=CommandGroup)
def command() -> None:
    """Give a model another model's tokenizer, or align the two.

    \b
    Examples:
      mergekit-lite tokenizer transplant ./model ./donor -o ./transplanted
      mergekit-lite tokenizer align ./student ./teacher
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
    are made of its rows of them. First it is told how well known tokens are rebuilt when they are left out.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.transplanting.leave_out import leave_out
    from mergekit_lite.transplanting.planning import plan_transplant

    plan = plan_transplant(model, donor, output, **options)
    check_outputs(plan, resume=run_options["resume"], force=run_options["force"])
    trials = [] if run_options["resume"] else leave_out(plan)
    _show(trials, Screen(quiet=view.quiet or view.as_json, verbose=view.verbose))
    more = {"leave_out": [trial.to_json() for trial in trials]}
    running.carry_out(plan, run_options, view, more=more if trials else {})


def _show(trials: Sequence[Trial], screen: Screen) -> None:
    from mergekit_lite.commands.screen import table

    if screen.quiet or not trials:
        return
    rows = [
        (each.tensor, each.method, f"{each.tokens:,}", f"{each.cosine:.3f}", f"{each.error:.3f}") for each in trials
    ]
    screen.out.print("known tokens, left out and rebuilt from the others:")
    screen.out.print(table(("tensor", "method", ">tokens", ">cosine", ">error"), rows))
    screen.out.print()


@command.command(
    name="align",
    short_help="Tell how the tokens of two models meet.",
    epilog="""\b
Examples:
  mergekit-lite tokenizer align ./student ./teacher
  mergekit-lite tokenizer align org/student org/teacher pairs/sft.jsonl
  mergekit-lite tokenizer align ./student ./teacher book.txt --json
""",
)
@click.argument("model")
@click.argument("other")
@click.argument("texts", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def align(model: str, other: str, texts: Path | None, as_json: bool) -> None:
    """Cut texts where the tokens of MODEL and OTHER have consumed the same bytes, and tell what lies between.

    Distilling across tokenizers compares the two there. TEXTS are rows as for training (.jsonl, .json, .parquet), rows
    with a "text", or plain text (.txt, .md); by default a few texts of many kinds.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.distillation.alignment.report import align as compare

    report = compare(model, other, texts)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1, allow_nan=False))
    else:
        _show_alignment(Screen(quiet=False, verbose=False), report)


def _show_alignment(screen: Screen, report: AlignmentReport) -> None:
    from mergekit_lite.commands.screen import table
    from mergekit_lite.errors import counted

    sides = (("MODEL", report.student), ("OTHER", report.teacher))
    rows = [(label, *_facts(side)) for label, side in sides]
    screen.out.print(table(("", "", "alphabet", ">tokens", ">in the other", ">digits in one"), rows))
    screen.out.print(
        f"\n{counted(report.aligned, 'text')} of {report.texts:,} aligned, {counted(report.bytes, 'byte')}; tokens of "
        "MODEL to tokens of OTHER between two cuts:"
    )
    total = [sum(getattr(share, name) for share in report.shares.values()) for name in ("groups", "student", "teacher")]
    shares = [
        (kind, *(f"{part / max(whole, 1):.1%}" for part, whole in zip(vars(share).values(), total, strict=True)))
        for kind, share in report.shares.items()
    ]
    counts = ("", *(f"{number:,}" for number in total))
    screen.out.print(table(("", ">groups", ">tokens of MODEL", ">tokens of OTHER"), [*shares, counts]))
    for label, side in sides:
        for reason, number in side.refused.items():
            screen.warn(f"{label}: {counted(number, 'text')} left out: {reason}")
    if report.student.digits != report.teacher.digits:
        screen.warn("numbers are cut otherwise: methods that need the same tokens teach little of them")


def _facts(side: Side) -> tuple[str, ...]:
    share = side.shared / max(side.tokens, 1)
    return (side.name, side.alphabet, f"{side.tokens:,}", f"{side.shared:,} ({share:.1%})", str(side.digits))
