"""The command line: one module for each command, imported only when it is needed."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module

import click

from mergekit_lite._version import __version__
from mergekit_lite.errors import MergekitLiteError

COMMANDS = ("extrapolate", "merge", "plan", "verify", "methods", "inspect", "compare", "vector", "distill", "boost")

KEPT = {  # what goes on by itself where it stopped; others tell more by their own interruption
    "distill": "What was finished is kept: the same command goes on.",
    "boost": "What was measured is kept: the same command goes on.",
}


class Commands(click.Group):
    """Finds a command in the module of its name, and turns the package's errors into messages and exit codes."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of all commands."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"mergekit_lite.commands.{name}").command
        return command

    def invoke(self, context: click.Context) -> object:
        """Run the command; an error of this package is a message, not a traceback."""
        try:
            return super().invoke(context)
        except MergekitLiteError as error:
            click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
            click.echo(str(error), err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as interruption:
            kept = str(interruption) or KEPT.get(context.invoked_subcommand or "", "")
            click.echo(f"\nInterrupted. {kept}".rstrip(), err=True)
            sys.exit(1)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-lite")
def main() -> None:
    """Arithmetic on the weights of language models, at the speed of a file copy.

    \b
    Examples:
      mergekit-lite extrapolate ./model-sft ./model-dpo --alpha 0.3 -o ./model-expo
      mergekit-lite merge recipe.yml -o ./merged
      mergekit-lite compare ./base ./math ./code
    """


def start() -> None:
    """The process's entry point.

    Leaves without tearing down the interpreter, which takes 0.3 s once torch is loaded. Garbage is searched for less
    often than usual: nearly all that importing torch makes stays, and the search took a tenth of the import.
    """
    gc.set_threshold(50_000, 20, 20)
    code: object = 0
    try:
        main(prog_name="mergekit-lite")
    except SystemExit as leaving:
        code = leaving.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
