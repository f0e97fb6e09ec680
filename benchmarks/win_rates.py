"""Hold the win rate at equal length to AlpacaEval's published length-controlled rates, where judgements are published.

    git clone https://github.com/tatsu-lab/alpaca_eval
    python -m benchmarks.win_rates alpaca_eval

Every model whose weighted judgements by GPT-4 Turbo are in the checkout, and whose rate is on its leaderboard.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import click
import numpy as np

from mergekit_lite.boosting.search.length import Judgements, win_rates

JUDGED = "results/*/weighted_alpaca_eval_gpt4_turbo/annotations.json"
BOARD = "src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
MOST_ITEMS = range(800, 806)  # of 805: some have no judgement
BASELINE = "gpt4_1106_preview"


def judgements(path: Path) -> Judgements | None:
    """Read one model's judgements: preferences from 1, for the baseline, to 2; None for another set or baseline."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    if len(rows) not in MOST_ITEMS or rows[0]["generator_1"] != BASELINE:
        return None
    rows = [row for row in rows if row["preference"] is not None]
    preferred = [0.5 if row["preference"] == 0 else row["preference"] - 1 for row in rows]  # 0 is a tie
    lengths = [[float(len(row[key])) for row in rows] for key in ("output_2", "output_1")]
    return Judgements(np.array(preferred), *map(np.array, lengths))


@click.command()
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(checkout: Path) -> None:
    """Compare, and print."""
    with (checkout / BOARD).open(encoding="utf-8", newline="") as board:
        published = {row[""]: row["length_controlled_winrate"] for row in csv.DictReader(board)}
    found: list[tuple[str, float, float, float]] = []
    for path in sorted(checkout.glob(JUDGED)):
        name = path.parts[-3]
        if published.get(name) and (judged := judgements(path)) is not None:
            rates = win_rates(judged)
            found.append((name, float(published[name]), rates.at_equal_length, rates.raw))
    if not found:
        raise click.ClickException(f"{checkout} has no judgements in {JUDGED}, or none whose rates are published.")
    found.sort(key=lambda row: -abs(row[2] - row[1]))
    for name, of_alpaca_eval, ours, raw in found:
        click.echo(f"{name}: published {of_alpaca_eval:.1f}, at equal length {ours:.1f}, raw {raw:.1f}")
    off = np.abs([ours - of_alpaca_eval for _, of_alpaca_eval, ours, _ in found])
    click.echo(f"{len(found)} models: {off.mean():.1f} points off on average, {off.max():.1f} at most")


if __name__ == "__main__":
    main()
