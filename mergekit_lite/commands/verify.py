"""``mergekit-lite verify``: whether an output is what its manifest says."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import running, values
from mergekit_lite.errors import UsageError, counted, listing
from mergekit_lite.plain_text import plain, plain_line

if TYPE_CHECKING:
    from mergekit_lite.verification import Verification

SHOWN = 20


@click.command(
    name="verify",
    epilog="""\b
Examples:
  mergekit-lite verify ./merged
  mergekit-lite verify ./merged --all
  mergekit-lite verify s3://models/merged   (read by range)
  mergekit-lite verify ./merged --input ./base=/models/base
  mergekit-lite verify boosted.safetensors --samples 0   (the output alone)
""",
)
@click.argument("out")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    help="How many tensors to make again from the inputs; 8 by default, 0 leaves the inputs alone.",
)
@click.option("--all", "everything", is_flag=True, help="Make all tensors again.")
@click.option("--seed", type=int, help="Chooses the tensors; another one each time by default.")
@click.option(
    "--input",
    "inputs",
    metavar="OLD=NEW",
    callback=values.moved,
    multiple=True,
    help="Where an input is now; OLD is its reference in the manifest.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Workers; one for each core by default.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …, cuda:all or auto.")
@running.takes_stream
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print only what is wrong.")
@click.option("-v", "--verbose", is_flag=True, help="Print everything that is wrong, and the tensors made again.")
def command(
    out: str,
    samples: int | None,
    everything: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Check OUT, which extrapolate or merge made, against its manifest: every byte of it by digest.

    Then make some of its tensors again, from the inputs, and compare. Exit code 0: sound; 1: not; 2: wrong usage.
    """
    if everything and samples is not None:
        raise UsageError("--all and --samples exclude each other.")
    from mergekit_lite.commands import json_output
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.verification import verify

    screen = Screen(quiet=quiet or as_json, verbose=verbose)
    with screen.progress("verifying") as progress:
        options |= {"progress": progress, "processes": running.PROCESSES}
        verdict = verify(out, samples="all" if everything else samples, **options)
    if as_json:
        click.echo(json.dumps(json_output.with_fetched(verdict.to_json()), indent=1))
    else:
        _show(verdict, quiet, verbose)
    sys.exit(0 if verdict.sound else 1)


def _show(verdict: Verification, quiet: bool, verbose: bool) -> None:
    shown = sys.maxsize if verbose else SHOWN
    lines: list[str] = []
    if not quiet:
        lines.append(f"{counted(verdict.tensors, 'tensor')} of the output compared with their digests")
        if verdict.recomputed:
            tensors = counted(len(verdict.recomputed), "tensor")
            lines.append(f"{tensors} made again from the inputs (--seed {verdict.seed})")
            lines += [f"  {name}" for name in verdict.recomputed[:shown]]
            if len(verdict.recomputed) > shown:
                lines.append(f"  … and {len(verdict.recomputed) - shown:,} more")
        lines += [f"note: {plain_line(note)}" for note in verdict.notes]
    lines += [f"not checked: {what}" for what in verdict.unchecked if not quiet]
    if verdict.findings:
        title = f"{verdict.output} is not sound, {counted(len(verdict.findings), 'finding')}"
        lines.append(listing(title, [plain_line(str(finding)) for finding in verdict.findings], shown))
    elif not quiet:
        lines.append(f"{verdict.output} is sound" + (" as far as it was checked" if verdict.unchecked else ""))
    for line in lines:
        click.echo(plain(line))
