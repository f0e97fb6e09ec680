"""The command line: one module for each command, imported only when it is needed."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

from mergekit_lite._version import __version__
from mergekit_lite.commands import streams
from mergekit_lite.commands.limits import limit_reached
from mergekit_lite.errors import MergekitLiteError, nearest
from mergekit_lite.object_stores import without_secrets
from mergekit_lite.plain_text import plain

COMMANDS = {  # with what help says of each in a line
    "extrapolate": "Go past an aligned model: ExPO on two checkpoints.",
    "merge": "Merge models as a recipe says.",
    "plan": "Print what a recipe would do.",
    "verify": "Check an output against its manifest.",
    "methods": "List the merge methods, or describe one.",
    "statistics": "Gather what merges with activations need.",
    "inspect": "Show what a model is made of.",
    "compare": "Show what models changed in their base.",
    "upcycle": "Make a mixture of experts of a dense model.",
    "vector": "Extract, apply and combine task vectors.",
    "tokenizer": "Give a model another one's tokenizer.",
    "moe": "Build a mixture of experts from dense models.",
    "answer": "Answer prompts by several models together.",
    "distill": "Teach a small model by preferences.",
    "boost": "Choose alpha or recipe numbers by measuring.",
    "preview": "Hear what an alpha would answer.",
    "estimate": "Tell a benchmark's score by a hundred items.",
    "push": "Put an output on the Hugging Face hub.",
    "app": "Open a local page for all of it.",
}
RESUMED = {  # commands that go on by themselves where they stopped, with what an interrupted user should know
    "answer": "What was replied is kept: the same command goes on.",
    "distill": "What was finished is kept: the same command goes on.",
    "boost": "What was measured is kept: the same command goes on.",
    "push": "What was uploaded is kept: the same command goes on.",
    "statistics": "What was finished is kept: the same command goes on.",
}
# Commands that have failed if nobody could read them.
ONLY_PRINT = ("plan", "methods", "inspect", "compare", "preview", "estimate")
LEFT_AT_ONCE = (
    "extrapolate", "merge", "upcycle", "plan", "verify", "methods", "inspect", "compare", "vector", "tokenizer", "moe",
    "statistics",
)  # fmt: skip


class CommandGroup(click.Group):
    """A group of commands that names the nearest one where an unknown one is asked for."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name. Raises click.UsageError."""
        name, known = arguments[0], self.list_commands(context)
        if name not in known and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}.{nearest(name, known)}", context)
        return super().resolve_command(context, arguments)


class Commands(CommandGroup):
    """Finds a command in the module of its name, and turns the package's errors into messages and exit codes."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands, in the order in which help shows them."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"mergekit_lite.commands.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse what stands before the name of a command."""
        with _plain_messages():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        """Run the command; an error of this package is a message, not a traceback."""
        try:
            quiet = bool({"-q", "--quiet", "--json"} & {*context.args})
            _count_anew()
            try:
                with _plain_messages():
                    return super().invoke(context)
            finally:
                _say_what_was_fetched(quiet)
        except MergekitLiteError as error:
            _fail(str(error), error.exit_code)
        except (ImportError, MemoryError, OSError) as error:
            message = limit_reached(error)
            if message is None:
                raise
            _fail(message, 1)
        except KeyboardInterrupt as interruption:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
            advice = str(interruption) or RESUMED.get(context.invoked_subcommand or "", "")
            click.echo(f"\nInterrupted. {advice}".rstrip(), err=True)
            sys.exit(1)


def _count_anew() -> None:
    """Forget what an earlier command of this process fetched."""
    if (ranges := sys.modules.get("mergekit_lite.checkpoint.stores.ranges")) is not None:
        ranges.TRAFFIC.taken()


def _say_what_was_fetched(quiet: bool) -> None:
    """Print a line on what was fetched, if anything was."""
    ranges = sys.modules.get("mergekit_lite.checkpoint.stores.ranges")
    if ranges is not None and ranges.TRAFFIC.requests and not quiet:
        from mergekit_lite.commands.screen import size

        traffic = ranges.TRAFFIC
        repeated = f", {traffic.repeated:,} of them once more" if traffic.repeated else ""
        click.echo(f"fetched {size(traffic.nbytes)} in {traffic.requests:,} requests{repeated}", err=True)


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Replace in click's messages what a terminal would obey: they repeat what was typed, or pasted."""
    try:
        yield
    except click.ClickException as error:
        error.message = plain(without_secrets(error.message))  # type: ignore[misc]
        raise


def _fail(message: str, exit_code: int) -> NoReturn:
    click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(plain(without_secrets(message)), err=True)
    sys.exit(exit_code)


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
    """Run the command line as a process of its own.

    Garbage is searched for less often than usual: nearly all that importing torch makes stays, and the search took a
    tenth of the import. Tearing down the interpreter takes 0.3 s once torch is loaded: commands that run nothing but
    this package leave without it. Others may have to end what they started, such as a log that is uploaded.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on it is said how to go on
    gc.set_threshold(50_000, 20, 20)
    out, err = streams.guarded()
    code: object = 0
    try:
        main(prog_name="mergekit-lite")
    except SystemExit as leaving:
        code = leaving.code
    out.flush()
    err.flush()
    status = code if isinstance(code, int) else 0 if code is None else 1
    if out.failure is not None:
        if not isinstance(out.failure, BrokenPipeError):  # a reader that has seen enough, as head does
            print(f"Warning: what was to be printed got lost: {out.failure.strerror}.", file=err)
        if len(sys.argv) > 1 and sys.argv[1] in ONLY_PRINT:
            status = status or 1
    if len(sys.argv) > 1 and sys.argv[1] in LEFT_AT_ONCE:
        os._exit(status)
    sys.exit(status)
