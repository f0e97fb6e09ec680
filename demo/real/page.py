"""The page: what DPO and extrapolation did to a released model, with intervals, costs and samples."""

import json
import random
from typing import TYPE_CHECKING, NamedTuple

from demo.real import pictures, results
from demo.real.instructions import KINDS
from demo.real.plan import ASKED, Out
from demo.real.results import Candidate, Rounding
from mergekit_lite.answers.intervals import Interval

if TYPE_CHECKING:
    from rich.console import Console

SAMPLES = 4


class Measured(NamedTuple):
    """All that the page is made of."""

    test: list[Candidate]
    costs: list[Candidate]
    chosen: float | None  # by ``boost`` on dev
    verdict: list[str]  # its sentences
    rounding: Rounding
    asked: dict[str, str]  # the test's instructions by id
    pairs: int


def read(out: Out) -> Measured:
    """Return what the commands left in the demo's folder."""
    asked = {row["id"]: row["prompt"] for row in map(json.loads, out.prompts("test").read_text().splitlines())}
    boost = json.loads(out.figures("dev").read_text())
    pairs = json.loads((out.made / "pairs" / "table.json").read_text())["all"]["preference"]
    test, costs = (results.common(results.candidates(out, name)) for name in ("test", "costs"))
    chosen = boost["chosen"]["alpha"] if boost["chosen"] else None
    return Measured(test, costs, chosen, boost["verdict"], results.rounding(out), asked, pairs)


def write(out: Out, console: "Console") -> None:
    """Make the page of everything that was measured."""
    found = read(out)
    out.report.mkdir(exist_ok=True)
    pictures.curve(found.test, found.chosen, out.report / "real.png")
    pictures.costs(found.costs, results.at(-1)(found.costs), out.report / "real-costs.png")
    pictures.effective(found.rounding, out.report / "real-rounding.png")
    text = page(found)
    (out.report / "report.md").write_text(text)
    console.print(text, soft_wrap=True, markup=False)


def page(found: Measured) -> str:
    """Return the page as Markdown."""
    released, trained = results.at(-1)(found.test), results.at(0)(found.test)
    parts = [
        "# A released model",
        f"{found.pairs:,} pairs of its own answers; RMS(delta) {found.rounding.rms:.1e}. Test: "
        f"{len(trained.rows):,} instructions. In brackets are 95 % intervals, differences are paired by instruction.",
        f"boost on dev: {' '.join(found.verdict)}",
        "![Instructions followed over alpha](real.png)",
        table(
            ("alpha", "followed, %", "over DPO, points", "over the released model", "characters", "cut, %"),
            [
                (
                    name(each.alpha),
                    percent(each.mean("followed")),
                    points(each.gain(trained, "followed")),
                    points(each.gain(released, "followed")),
                    f"{each.characters:.0f}",
                    f"{100 * each.cut:.1f}",
                )
                for each in found.test
            ],
        ),
        "## By kind of instruction, %",
        table(
            ("kind", *(name(each.alpha) for each in found.test)),
            [(kind, *(f"{100 * each.share(kind, 'followed'):.0f}" for each in found.test)) for kind in KINDS],
        ),
        "## Costs",
        "![Sums and a text over alpha](real-costs.png)",
        table(
            ("alpha", "right sums, %", "over the released model, points", "log-probability, nats a token", "change"),
            [
                (
                    name(each.alpha),
                    percent(each.mean("sums")),
                    points(each.gain(results.at(-1)(found.costs), "sums")),
                    plain(each.mean("nll"), 3),
                    plain(each.gain(results.at(-1)(found.costs), "nll"), 4),
                )
                for each in found.costs
            ],
        ),
        "## What rounding leaves of alpha",
        "![Effective alpha over alpha by dtype](real-rounding.png)",
        table(
            ("asked", *found.rounding.effective),
            [
                (signed(asked, "g"), *(signed(values[place], ".3f") for values in found.rounding.effective.values()))
                for place, asked in enumerate(ASKED)
            ],
        ),
        "## Samples, drawn at random",
        *samples(found),
    ]
    return "\n\n".join(parts) + "\n"


def samples(found: Measured) -> list[str]:
    """Return some instructions with the answers of the released, the trained and the furthest model."""
    shown = [results.at(-1)(found.test), results.at(0)(found.test), found.test[-1]]
    texts = []
    for item in random.Random(0).sample(sorted(shown[0].rows), min(SAMPLES, len(shown[0].rows))):
        lines = [f"> {found.asked[item]}"]
        for each in shown:
            verdict = "followed" if each.values("followed").get(item) else "not followed"
            lines.append(
                f"- alpha {name(each.alpha)} ({verdict}): {' ⏎ '.join(each.rows[item]['text'].split(chr(10)))}"
            )
        texts.append("\n".join([lines[0], "", *lines[1:]]))
    return texts


def name(alpha: float) -> str:
    """Return an alpha as the page calls it."""
    return {-1.0: "−1, released", 0.0: "0, DPO"}.get(alpha, signed(alpha, "g"))


def signed(number: float, form: str) -> str:
    return format(number, form).replace("-", "−")


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---", *("---:" for _ in heads[1:])), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(of: Interval) -> str:
    return f"{100 * of.mean:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"


def points(of: Interval) -> str:
    return f"{100 * of.mean:+.1f} [{100 * of.low:+.1f}, {100 * of.high:+.1f}]".replace("-", "−")


def plain(of: Interval, digits: int) -> str:
    return f"{of.mean:.{digits}f} [{of.low:.{digits}f}, {of.high:.{digits}f}]".replace("-", "−")
