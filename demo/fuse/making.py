"""``python -m demo.fuse.making``: one of the models that fusing finds ready made."""

from pathlib import Path

import click

from demo.distill.making import make
from demo.fuse.models import FAMILIES


@click.command()
@click.argument("family", type=click.Choice(list(FAMILIES)))
@click.option("--skills", "skill_names", required=True, help="The skills to learn, with commas.")
@click.option("--steps", type=int, required=True)
@click.option("--careful", default=1.0, show_default=True, help="The share of demonstrations with an ideal answer.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model's folder.")
def main(family: str, skill_names: str, steps: int, careful: float, out: Path) -> None:
    """Make one model: random weights, and STEPS of training on demonstrations."""
    make(FAMILIES[family], tuple(skill_names.split(",")), careful, steps, 0, out)


if __name__ == "__main__":
    main()
