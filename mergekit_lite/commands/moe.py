"""``mergekit-lite moe``: mixtures of experts, built from dense models; and ``moe …`` for what is done with mixtures."""

from __future__ import annotations

import click

from mergekit_lite.commands import CommandGroup

BUILD = "build"  # the command that is meant where none is named


class RecipeOrCommand(CommandGroup):
    """A group in which ``moe RECIPE …`` is ``moe build RECIPE …``: what names no command is a recipe."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Put the command's name before arguments that don't begin with one."""
        own = {"-h", "--help"}
        if arguments and arguments[0] not in own and arguments[0] not in self.list_commands(context):
            arguments = [BUILD, *arguments]
        return super().parse_args(context, arguments)


@click.group(name="moe", cls=RecipeOrCommand, subcommand_metavar="RECIPE | COMMAND [ARGS]...")
def command() -> None:
    """Build a mixture of experts from dense models, as RECIPE says: a file of mergekit-moe.

    \b
    Examples:
      mergekit-lite moe recipe.yml -o ./mixture
      mergekit-lite moe recipe.yml -o ./mixture --dry-run
    """
