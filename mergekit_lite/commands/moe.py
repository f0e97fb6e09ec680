"""``mergekit-lite moe``: mixtures of experts, built from dense models; and ``moe …`` for what is done with mixtures."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_lite.commands import CommandGroup, running
from mergekit_lite.commands.moe_experts import merge_experts, prune, split
from mergekit_lite.engine.run import RunOptions, check_outputs
from mergekit_lite.errors import UsageError, nearest

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
      mergekit-lite moe split ./mixture --experts 3 -o ./dense
      mergekit-lite moe prune ./mixture --keep 6 --by weights -o ./smaller
    """


@command.command(
    name=BUILD,
    short_help="Build a mixture; what is meant where no command is named.",
    epilog="""\b
Examples:
  mergekit-lite moe recipe.yml -o ./mixture
  mergekit-lite moe recipe.yml -o ./mixture --dry-run
  mergekit-lite moe recipe.yml -o ./mixture --device cuda      (gate_mode: hidden runs the base model)
""",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", required=False)
@click.option(
    "-o", "--output", help="A folder, or a .safetensors or .pt file, here or s3://, gs://, az://; the same as OUT."
)
@running.takes_shard_size
@click.option(
    "--i-understand-this-is-not-useful-without-training",
    "equal_experts",
    is_flag=True,
    help="Accept experts that are all the same model.",
)
@running.takes_push
@running.takes_run_options
def build(
    recipe: Path,
    out: str | None,
    output: str | None,
    shard_size: int | None,
    equal_experts: bool,
    run_options: RunOptions,
    view: running.View,
    push: str | None,
    public: bool,
) -> None:
    """Build a mixture of experts from dense models, as RECIPE says: a YAML file of mergekit-moe.

    Attention, norms, embedding and head are the base model's, the experts are the MLPs of others. All is checked before
    a weight is read. Where prompts make the routers, the base model runs on them first.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.engine.devices import chosen_devices
    from mergekit_lite.mixtures.building.building import plan_moe, with_routers

    output = output or out
    if output is None or (out is not None and output != out):
        raise UsageError("Name one output: mergekit-lite moe recipe.yml -o ./mixture.")
    if not recipe.is_file():
        hint = nearest(str(recipe), [name for name in command.commands if name != BUILD])
        raise UsageError(f"{recipe}: there is no such recipe, and no such command of moe.{hint}")
    planned = plan_moe(recipe, output, shard_size=shard_size, equal_experts=equal_experts)
    plan = planned.plan
    if planned.needs_rows and not view.dry_run:
        check_outputs(plan, resume=run_options["resume"], force=run_options["force"])
        device = chosen_devices(run_options["device"])[0]
        plan, warning = with_routers(planned, device, run_options["threads"])
        Screen(quiet=view.quiet or view.as_json, verbose=view.verbose).warn(warning)
    running.carry_out(plan, run_options, view, push, public)


for subcommand in (split, prune, merge_experts):
    command.add_command(subcommand)
