"""What a GPU makes, beside what the CPU makes: bytes of every method, verification both ways, and speed.

    python -m benchmarks.gpu [--device cuda] [--folder DIR] [--hidden 512] [--repeats 100] [--size 2e9]

Takes about three minutes. What must be the same on every device is marked as wrong where it is not; what depends on
sums of floats may differ in last bits. Speed is that of the engine without the disk: read from the page cache, moved,
computed, moved back and digested, beside the least time in which copies alone can do that through pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergekit_lite
from benchmarks import pinned_copies
from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.tables import Table, publish
from mergekit_lite import rounding
from mergekit_lite.engine.devices import chosen_device
from mergekit_lite.engine.pool import Workers
from mergekit_lite.engine.run import workers_and_block
from mergekit_lite.engine.schedule import Schedule
from mergekit_lite.engine.sink import Records
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.extrapolation import plan_extrapolation
from mergekit_lite.merging import plan_merge
from mergekit_lite.planning import Plan

RECIPES = Path(__file__).parents[1] / "recipes" / "methods"
DTYPES = (torch.bfloat16, torch.float32)
LAYERS = 6
AIM_SHARE = 0.8  # of the speed at which pinned memory is copied
PASSES = {"expo": 1, "linear": 1, "ties": 2}  # how often each input goes to the device


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent / "out")
@click.option("--hidden", default=512, show_default=True, help="Width of the models whose bytes are compared.")
@click.option("--repeats", default=100, show_default=True, help="Runs that have to give one digest.")
@click.option("--size", "parameters", type=float, default=2e9, show_default=True, help="Parameters, for speed.")
def main(device: str, folder: Path, hidden: int, repeats: int, parameters: float) -> None:
    """Compare a GPU with the CPU, and its speed with that of copies through pinned memory."""
    try:
        place = chosen_device(device)
    except MergekitLiteError as error:
        raise click.ClickException(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    tables, wrong = measured(folder, place, hidden, repeats, parameters, sorted(RECIPES.glob("*.yml")))
    publish(folder, "gpu", str(this_machine()), tables, wrong or ["Nothing is wrong."], {"wrong": wrong})
    raise SystemExit(1 if wrong else 0)


def measured(
    folder: Path, device: str, hidden: int, repeats: int, parameters: float, recipes: Sequence[Path]
) -> tuple[list[Table], list[str]]:
    """Return the tables, and what is wrong on this device."""
    wrong: list[str] = []
    bytes_ = [row for dtype in DTYPES for row in _compared(folder, device, hidden, dtype, recipes, wrong)]
    tables = [
        Table(f"Bytes of {device} beside the CPU's", ("recipe", "dtype", "elements that differ", "verified"), bytes_),
        Table(
            "The same every time, and at every exponent", ("what", "result"), _repeated(folder, device, repeats, wrong)
        ),
        Table(
            f"Speed, aim {AIM_SHARE:.0%} of the copies'",
            ("method", "copies alone, s", "engine, s", "share"),
            list(_speed(folder, device, parameters)),
        ),
    ]
    return tables, wrong


# --- bytes ------------------------------------------------------------------------------------------------------------


def _compared(
    folder: Path, device: str, hidden: int, dtype: torch.dtype, recipes: Sequence[Path], wrong: list[str]
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each recipe: made by both, compared, and verified each by the other."""
    models = _write_models(folder / "models", hidden, dtype)
    kind = str(dtype).removeprefix("torch.")
    for file in recipes:
        recipe = folder / "recipe.yml"
        recipe.write_text(yaml.safe_dump(_with_models(yaml.safe_load(file.read_text()), models)))
        plan = plan_merge(recipe, folder / "by-cpu")
        outputs = {"cpu": folder / "by-cpu", device: folder / "by-gpu"}
        for place, output in outputs.items():
            mergekit_lite.merge(recipe, output, device=place, force=True)
        ours, theirs = (load_file(output / "model.safetensors") for output in outputs.values())
        differ = sum(int((ours[name].view(torch.uint8) != theirs[name].view(torch.uint8)).sum() > 0) for name in ours)
        elements = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
        if differ and not any(record.device for record in _made(plan, device).made.values()):
            wrong.append(f"{file.stem}, {kind}: {elements:,} elements differ, which must not depend on the device")
        verdicts = [
            mergekit_lite.verify(output, samples="all", device=place)
            for output, place in zip(outputs.values(), reversed(outputs), strict=True)
        ]
        wrong += [f"{file.stem}, {kind}: {finding}" for verdict in verdicts for finding in verdict.findings]
        share = f"{elements:,} of {sum(tensor.numel() for tensor in ours.values()):,}" if differ else "none"
        yield file.stem, kind, share, "sound" if all(verdict.sound for verdict in verdicts) else "NOT SOUND"


def _write_models(folder: Path, hidden: int, dtype: torch.dtype) -> list[Path]:
    """Write a base and two models tuned from it."""
    shapes = {"model.embed_tokens.weight": (16 * hidden, hidden), "model.norm.weight": (hidden,)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (3 * hidden, hidden)
    normal = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=normal) * 0.02 for name, shape in shapes.items()}
    paths: list[Path] = []
    for name in ("base", "one", "two"):
        step = 0.0 if name == "base" else 1e-3
        state = {
            key: (tensor + step * torch.randn(tensor.shape, generator=normal)).to(dtype) for key, tensor in base.items()
        }
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(f'{{"model_type": "llama", "num_hidden_layers": {LAYERS}}}')
        paths.append(folder / name)
    return paths


def _with_models(recipe: dict[str, Any], models: Sequence[Path]) -> dict[str, Any]:
    """Return a recipe on other models, of whole models where it had slices."""
    base, *tuned = map(str, models)
    listed = recipe.get("models") or recipe.pop("slices")[0]["sources"]
    names = dict.fromkeys(source["model"] for source in listed)
    names.pop(recipe.get("base_model"), None)
    known = dict(zip(names, tuned, strict=False)) | {recipe.get("base_model"): base}
    kept = [source for source in listed if source["model"] in known]  # no method needs more than two
    parts = [{key: value for key, value in source.items() if key != "layer_range"} for source in kept]
    on_models = [{**source, "model": known[source["model"]]} for source in parts]
    return {**recipe, "models": on_models} | ({"base_model": base} if "base_model" in recipe else {})


# --- what is the same every time --------------------------------------------------------------------------------------


def _repeated(folder: Path, device: str, repeats: int, wrong: list[str]) -> list[tuple[str, str]]:
    models = [
        {"model": str(folder / "models" / name), "parameters": {"weight": 0.5, "density": 0.5}}
        for name in ("one", "two")
    ]
    recipe = {"merge_method": "dare_ties", "base_model": str(folder / "models" / "base"), "models": models}
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe | {"rounding": "stochastic"}))
    plan = plan_merge(folder / "recipe.yml", folder / "by-gpu")
    results = {str(sorted(_made(plan, device).made.items())) for _ in range(repeats)}
    if len(results) > 1:
        wrong.append(f"dare_ties with stochastic rounding gave {len(results)} results in {repeats} runs")
    exponents = torch.arange(-1074, 1024, dtype=torch.float64)
    values = torch.ldexp(torch.ones((), dtype=torch.float64), exponents).repeat(8) * torch.rand(8 * len(exponents)).add(
        1
    )
    rows = [("dare_ties, stochastic rounding", f"{len(results)} result of {repeats} runs")]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        here, there = (rounding.stochastic(values.to(place), dtype, 1, 0).cpu() for place in ("cpu", device))
        differ = int((here != there).sum())
        if differ:
            wrong.append(f"stochastic rounding to {dtype}: {differ} of {len(values)} values differ")
        rows.append((f"stochastic rounding to {dtype}", f"{differ} of {len(values):,} differ"))
    return rows


# --- speed ------------------------------------------------------------------------------------------------------------


def _speed(folder: Path, device: str, parameters: float) -> Iterator[tuple[str, ...]]:
    family = Family(folder / "family", ("base", "one", "two"), step=SFT_RMS, size=parameters, kind="tensor")
    if not family.is_made():
        family.make()
    base, one, two = map(str, family.models)
    both = {"models": [{"model": path, "parameters": {"weight": 0.5}} for path in (one, two)]}
    linear = {"merge_method": "linear", **both}
    ties = {"merge_method": "ties", "base_model": base, **both, "parameters": {"density": 0.5}}
    plans = {"expo": plan_extrapolation(base, one, folder / "by-gpu.safetensors", 0.3)}
    for name, recipe in (("linear", linear), ("ties", ties)):
        (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
        plans[name] = plan_merge(folder / "recipe.yml", folder / "by-gpu.safetensors")
    for name, plan in plans.items():
        _made(plan, device)  # the inputs are in the page cache from now on, the kernels loaded
        started = time.perf_counter()
        _made(plan, device)
        took = time.perf_counter() - started
        limit = pinned_copies.seconds(family.nbytes, plan.most_inputs * PASSES[name])
        yield name, f"{limit:.2f}", f"{took:.2f}", f"{limit / took:.0%}"


def _made(plan: Plan, device: str) -> Records:
    records = Records()
    workers, block = workers_and_block((device,))
    Schedule(plan, {0: records}, Workers(workers, (device,), block), None).run()
    return records


if __name__ == "__main__":
    main()
