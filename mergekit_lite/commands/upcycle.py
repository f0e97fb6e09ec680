"""``mergekit-lite upcycle``: a dense model as the start of a mixture of experts."""

from __future__ import annotations

from typing import Any

import click

from mergekit_lite.commands import running
from mergekit_lite.engine.run import RunOptions


@click.command(
    name="upcycle",
    epilog="""\b
Examples:
  mergekit-lite upcycle ./dense --experts 8 -o ./mixture
  mergekit-lite upcycle ./dense --experts 8 --noise 0.001 --seed 1 -o ./mixture
  mergekit-lite upcycle ./llama --family deepseek --experts 16 --experts-per-token 4 -o ./mixture
""",
)
@click.argument("model")
@click.option("-o", "--output", required=True, help="A folder.")
@click.option("--experts", type=click.IntRange(min=1), default=8, show_default=True, help="In each layer.")
@click.option(
    "--experts-per-token",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many a token goes through.",
)
@click.option(
    "--family",
    help="mixtral, qwen2_moe, qwen3_moe, flex_olmo or deepseek, or how one begins; by default that of MODEL's kind.",
)
@click.option(
    "--noise",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Standard deviation of what is added to each weight of the experts, so that they differ.",
)
@click.option("--dtype", help="float32, bfloat16, float16 or float64; that of MODEL by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of routers and noise.")
@running.takes_shard_size
@running.takes_push
@running.takes_run_options
def command(
    model: str,
    output: str,
    run_options: RunOptions,
    view: running.View,
    push: str | None,
    public: bool,
    **options: Any,
) -> None:
    """Make a mixture of experts of one dense MODEL, to be trained further: every expert is a copy of its MLPs.

    Routers are random. Without noise the mixture answers as MODEL does, whatever they choose.
    """
    from mergekit_lite.mixtures.building.upcycling import plan_upcycle

    running.carry_out(plan_upcycle(model, output, **options), run_options, view, push, public)
