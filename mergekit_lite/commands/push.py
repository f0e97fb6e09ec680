"""``mergekit-lite push``: a finished output on the Hugging Face hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from mergekit_lite.errors import counted

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.pushing import Pushed

takes_public = click.option(
    "--public",
    is_flag=True,
    help="Let everybody see what is pushed; else a repository is created as a private one, and a public one refused.",
)


@click.command(
    name="push",
    epilog="""\b
Examples:
  mergekit-lite push ./merged org/name               (a private repository)
  mergekit-lite push ./merged org/name --public
  mergekit-lite push ./merged org/name --dry-run
""",
)
@click.argument("output", metavar="OUT")
@click.argument("repository", metavar="ORG/NAME")
@takes_public
@click.option("--force", is_flag=True, help="Replace what the repository has; its history keeps it.")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
def command(output: str, repository: str, public: bool, force: bool, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Put OUT, a folder that merge or extrapolate made, on the Hugging Face hub: with its card, private at first.

    Every byte is held to the manifest before. The commit is made when all is uploaded: complete or absent. The same
    command goes on with an upload that was stopped. The token is that of hf auth login, or HF_TOKEN.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.pushing import push

    screen = Screen(quiet=quiet or as_json, verbose=False)
    with screen.progress("uploading") as progress:
        pushed = push(output, repository, public=public, force=force, dry_run=dry_run, progress=progress)
    if as_json:
        click.echo(json.dumps(pushed.to_json(), indent=1))
    show(pushed, screen)


def show(pushed: Pushed, screen: Screen) -> None:
    """Print what was pushed, or would be, and the licences it comes with."""
    from mergekit_lite.commands.screen import size

    what = f"{counted(len(pushed.files), 'file')}, {size(sum(pushed.files.values()))}"
    if not screen.quiet:
        verb = "would push" if pushed.commit is None else "pushed"
        seen_by = "private" if pushed.private else "public: everybody sees it"
        screen.out.print(f"{verb} {what} to {pushed.url} ({seen_by})", markup=False)
        for reference, licence in pushed.licences.items():
            screen.out.print(f"  made of {reference}: {licence or 'no licence is known'}", markup=False)
        screen.out.print(f"  the card says: {pushed.licence or 'no licence'}", markup=False)
        screen.lines([f"removed: {name}" for name in pushed.removed])
    if pushed.left:
        screen.warn(f"not pushed, as the output's manifest doesn't know it: {', '.join(pushed.left)}")
    if pushed.licence is None:
        screen.warn("the card names no licence: write one into README.md (license: …), or onto the model's page")
