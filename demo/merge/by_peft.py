"""``python -m demo.merge.by_peft``: adapters added by peft's own ``add_weighted_adapter``, and merged into the base."""

from pathlib import Path

import click

from demo.merge.plan import DENSITY


@click.command()
@click.argument("base", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--kind", required=True, help="peft's combination_type.")
@click.option("--density", default=DENSITY, show_default=True, help="Of ties.")
def main(base: Path, output: Path, adapters: tuple[Path, ...], kind: str, density: float) -> None:
    """Add ADAPTERS with weights of 1, and write the model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, *others = adapters
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, adapter_name=first.name)
    for adapter in others:
        model.load_adapter(adapter, adapter_name=adapter.name)
    names = [adapter.name for adapter in adapters]
    model.add_weighted_adapter(
        names, [1.0] * len(names), "sum", kind, **({"density": density} if kind == "ties" else {})
    )
    model.set_adapter("sum")
    partial = output.with_name(f"{output.name}.partial")
    model.merge_and_unload(adapter_names=["sum"]).save_pretrained(partial)
    AutoTokenizer.from_pretrained(base).save_pretrained(partial)
    partial.rename(output)  # what has its name is complete


if __name__ == "__main__":
    main()
