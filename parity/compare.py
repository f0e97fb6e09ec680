"""Run every recipe through mergekit and through mergekit_lite, compare the outputs, write ``docs/parity.md``.

    python -m parity.compare [--only TEXT] [--out FILE]

mergekit runs each recipe twice: as it is, and with ``dtype: float64``, which shows what its formulas give when nothing
is rounded on the way. Exits with 1 where a difference has no explanation.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from parity.recipes import RANDOM, Recipe, Yaml, placed, recipes

HOME = Path(__file__).parent
ALLOWED = 1.0  # units of the last place, against float64
SAME_FLOAT32 = 8.0  # a relative difference of 1e-6
ALIKE = 0.02  # of two statistics of random methods
PROMOTED = "float32"  # what float16, bfloat16 and float32 have in common
ON_THE_WAY = "mergekit rounds to {} on the way"
HEADER = ("recipe", "method", "models", "dtype", "elements", "equal bits", "largest", "mean", "as exact", "verdict")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    cells: tuple[str, ...]
    wrong: bool = False


def compared(recipe: Recipe, dtype: str, folder: Path) -> Row:
    """One recipe on models of one dtype."""
    from mergekit_lite.merging import plan_merge
    from parity import both, models
    from parity.borders import borders
    from parity.fusechat import by_formulas
    from parity.measures import apart

    home = models.make(folder, recipe.family, dtype)
    body = {key: value for key, value in placed({"dtype": dtype} | recipe.body, home).items() if value is not None}
    kind = str(body.get("out_dtype") or body.get("dtype") or PROMOTED).removeprefix("torch.")
    rounded = getattr(torch, kind)
    try:
        ours = both.by_mergekit_lite(body)
        if recipe.formulas:
            theirs = exact = by_formulas(body)
        else:
            theirs, exact = both.by_mergekit(body), both.in_float64(body)
    except Exception as error:
        return _row(recipe, dtype, [""] * 5, f"**fails**: {str(error).splitlines()[0]}", wrong=True)
    rows = sum(len(tensor) - len(theirs[name]) for name, tensor in ours.items() if name in theirs and tensor.ndim)
    ours = _cut(ours, theirs)
    elements = sum(tensor.numel() for tensor in ours.values())
    if recipe.method in RANDOM and _draws(body):
        return _alike(recipe, dtype, elements, home, ours, theirs)
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(body))
    at = _cut(borders(plan_merge(path, folder / "none")), theirs)
    with_mergekit = apart(ours, theirs, rounded, SAME_FLOAT32 if kind == "float32" else ALLOWED, at)
    with_exact = apart(ours, exact, rounded, ALLOWED, at)
    cells = [
        f"{elements:,}",
        _share(with_mergekit.equal),
        f"{with_mergekit.most:.3g}",
        f"{with_mergekit.mean:.2g}",
        _share(with_exact.equal),
    ]
    leaks = {str(tensor.dtype).removeprefix("torch.") for tensor in theirs.values()} - {kind}
    if recipe.formulas and not with_exact.names and with_exact.unexplained == 0:
        return _row(recipe, dtype, cells, "same as FuseChat's formulas")
    leak = f"; mergekit writes {', '.join(leaks)}" if leaks else ""
    leak += "; without the rows behind the tokenizer's, which mergekit drops" if rows else ""
    if with_mergekit.names:
        return _row(recipe, dtype, cells, f"**differs**: tensors {', '.join(with_mergekit.names)}", wrong=True)
    if with_mergekit.unexplained == 0:
        border = f", but {with_mergekit.beyond} at a border" if with_mergekit.beyond else ""
        return _row(recipe, dtype, cells, f"same{border}{leak}")
    if with_exact.unexplained == 0:
        border = f"; {with_exact.beyond} at a border" if with_exact.beyond else ""
        return _row(recipe, dtype, cells, f"on purpose: {ON_THE_WAY.format(kind)}{border}{leak}")
    rest = {name: tensor for name, tensor in ours.items() if not any(part in name for part in recipe.where or ("",))}
    if recipe.reason and (not rest or apart(rest, exact, rounded, ALLOWED, at).unexplained == 0):
        return _row(recipe, dtype, cells, f"on purpose: {recipe.reason}{leak}")
    return _row(recipe, dtype, cells, f"**differs**: {with_exact.unexplained} elements{leak}", wrong=True)


def _alike(
    recipe: Recipe,
    dtype: str,
    elements: int,
    home: Path,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
) -> Row:
    from parity.both import tensors_in
    from parity.measures import statistics

    base = _cut(tensors_in(home / "base"), theirs)
    (changed, went), (changed_there, went_there) = statistics(ours, base), statistics(theirs, base)
    shares = f"{changed:.1%} of the elements change ({changed_there:.1%}), by {went:.3g} ({went_there:.3g}) on average"
    alike = abs(changed - changed_there) <= ALIKE * changed_there and abs(went - went_there) <= ALIKE * went_there
    verdict = "on purpose: other draws, same statistics" if alike else "**differs**"
    return _row(recipe, dtype, [f"{elements:,}", "", "", "", ""], f"{verdict}: {shares}", wrong=not alike)


def _cut(state: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with as many rows as those of another state: mergekit drops rows that no token has."""
    return {name: tensor[: len(like[name])] if name in like else tensor for name, tensor in state.items()}


def _draws(body: Yaml) -> bool:
    return "density:" in yaml.safe_dump(body)


def _share(share: float) -> str:
    """Never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{min(share, 0.9999):.2%}".replace("%", " %")


def _row(recipe: Recipe, dtype: str, cells: Sequence[str], verdict: str, *, wrong: bool = False) -> Row:
    return Row((recipe.name, recipe.method, recipe.family, dtype, *cells, verdict), wrong)


def page(rows: Sequence[Row]) -> str:
    """Return the page: its conclusions, then the table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *(row.cells for row in rows))]
    verdicts = [row.cells[-1] for row in rows]
    same = sum(verdict.startswith("same") for verdict in verdicts)
    meant = sum(verdict.startswith("on purpose") for verdict in verdicts)
    count = f"{len(rows)} runs: {same} same, {meant} differ on purpose, {len(rows) - same - meant} otherwise."
    about = (HOME / "about.md").read_text()
    return "\n".join([about, "## The runs", "", count, "", *lines, ""])


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="recipes with this in their name; nothing is written")
    parser.add_argument("--out", type=Path, default=HOME.parent / "docs" / "parity.md", help="the page to write")
    asked = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder = HOME / "out"
    rows = []
    for recipe in recipes():
        if asked.only not in recipe.name:
            continue
        for dtype in recipe.dtypes:
            row = compared(recipe, dtype, folder)
            print("  ".join(row.cells), flush=True)
            rows.append(row)
    if not asked.only:
        asked.out.write_text(page(rows))
    if wrong := sum(row.wrong for row in rows):
        sys.exit(f"{wrong} of {len(rows)} runs differ without an explanation.")


if __name__ == "__main__":
    main()
