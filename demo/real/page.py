"""The page: what DPO and extrapolation did to a released model, with intervals, costs, a student, times and samples.

Its parts stand between ``<!-- demo-real: NAME -->`` and ``<!-- end -->`` in a page that people write, and are replaced
there.
"""

import json
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from demo.real import pictures, results
from demo.real.instructions import KINDS
from demo.real.plan import ASKED, LEFT_OUT, OWN, PARTS, STUDENT, Out
from demo.real.results import Candidate, Rounding
from mergekit_lite.answers.intervals import Interval
from mergekit_lite.pages import markdown

if TYPE_CHECKING:
    from rich.console import Console

SAMPLES = 3
SHOWN = 400  # characters of an answer
PART = re.compile(r"(<!-- demo-real: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Took(NamedTuple):
    """What a stage took, all times that it was run together."""

    stage: str
    seconds: float
    processor: float  # seconds, of all its processes


class Measured(NamedTuple):
    """All that the page is made of."""

    test: list[Candidate]
    costs: list[Candidate]
    student: list[Candidate]  # before and after its lessons, as alpha -1 and 0
    chosen: float | None  # by ``boost`` on dev
    verdict: list[str]  # its sentences
    rounding: Rounding
    asked: dict[str, str]  # the test's instructions by id
    pairs: int
    lessons: int
    times: list[Took]


def read(out: Out) -> Measured:
    """Return what the commands left in the demo's folder."""
    asked = {row["id"]: row["prompt"] for part in PARTS for row in _lines(out.prompts(part))}
    boost = json.loads(out.figures("dev").read_text())
    rows = {each: json.loads((out.folder(each) / "pairs" / "table.json").read_text())["all"] for each in (OWN, STUDENT)}
    students = [f"student-{part}" for part in PARTS]
    test, costs, student = (
        results.common(results.candidates(out, *names)) for names in (PARTS, ("costs",), tuple(students))
    )
    return Measured(
        test,
        costs,
        student,
        boost["chosen"]["alpha"] if boost["chosen"] else None,
        boost["verdict"],
        results.rounding(out),
        asked,
        rows[OWN]["preference"],
        rows[STUDENT]["sft"],
        times(out),
    )


def times(out: Out) -> list[Took]:
    """Return what each stage took; a stage that was stopped and went on has several lines."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for line in _lines(out.times):
        sums[line["stage"]][0] += line["seconds"]
        sums[line["stage"]][1] += line["processor"]
    return [Took(stage, *both) for stage, both in sums.items()]


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(out: Out, console: "Console", into: Path | None = None) -> None:
    """Make the page of everything that was measured, and replace its parts in another one."""
    found = read(out)
    out.report.mkdir(exist_ok=True)
    pictures.curve(found.test, found.chosen, out.report / "real.png")
    pictures.costs(found.costs, results.at(-1)(found.costs), out.report / "real-costs.png")
    pictures.effective(found.rounding, out.report / "real-rounding.png")
    made = parts(found)
    text = "\n\n".join(f"<!-- demo-real: {name} -->\n{part}\n<!-- end -->" for name, part in made.items()) + "\n"
    (out.report / "report.md").write_text(text)
    console.print(text, soft_wrap=True, markup=False)
    if into:
        into.write_text(filled(into.read_text(), made))
        for picture in out.report.glob("*.png"):
            shutil.copy(picture, into.parent / "images")


def filled(text: str, made: dict[str, str]) -> str:
    """Return a page with its marked parts replaced."""
    return PART.sub(lambda found: f"{found[1]}{made[found[2]]}\n{found[3]}", text)


def parts(found: Measured) -> dict[str, str]:
    """Return the parts of the page as Markdown, by their names."""
    return {
        "summary": summary(found),
        "test": test(found),
        "boost": quoted(found.verdict),
        "kinds": kinds(found),
        "costs": costs(found),
        "rounding": rounding(found),
        "student": student(found),
        "times": took(found),
        "samples": "\n\n".join(samples(found)),
    }


def summary(found: Measured) -> str:
    """Return what was gained and what it cost, a line each."""
    released, trained = results.at(-1)(found.test), results.at(0)(found.test)
    before, after = results.at(-1)(found.costs), results.at(0)(found.costs)
    best = max((each for each in found.test if each.alpha > 0), key=lambda each: each.mean("followed").mean)
    first, taught = found.student
    chosen = "none, as it isn't sure that any helps" if found.chosen is None else f"alpha {found.chosen:g}"
    used = sum(each.processor for each in found.times) / 60
    longer = 100 * (trained.characters / released.characters - 1)
    return table(
        ("", f"on {len(released.rows):,} instructions"),
        [
            ("the released model follows", f"{percent(released.mean('followed'))} %"),
            (
                f"DPO on {found.pairs:,} pairs of its own answers adds",
                f"{points(trained.gain(released, 'followed'))} points",
            ),
            (
                f"the best alpha above 0 that was tried, {best.alpha:g}, adds to that",
                f"{points(best.gain(trained, 'followed'))} points",
            ),
            ("`boost`, on other instructions, chose", chosen),
            (
                f"a student with {100 * (1 - size(left_out()) / size(0)):.0f} % less weights follows",
                f"{percent(first.mean('followed'))} % before its lessons, {percent(taught.mean('followed'))} % after",
            ),
            (
                "what DPO cost: length of answers",
                f"{signed(longer, '+.0f')} %; "
                f"{100 * trained.cut:.1f} % are cut at the limit, {100 * released.cut:.1f} % were",
            ),
            (
                "what DPO cost elsewhere",
                f"sums {points(after.gain(before, 'sums'))} points; a text's log-probability "
                f"{plain(after.gain(before, 'nll'), 4)} nats a token",
            ),
            ("time on two cores", f"{used / 2:.0f} minutes, if they do nothing else"),
        ],
    )


def test(found: Measured) -> str:
    released, trained = results.at(-1)(found.test), results.at(0)(found.test)
    heads = ("alpha", "followed, %", "over DPO, points", "over the released model", "characters", "cut, %")
    rows = [
        (
            name(each.alpha),
            percent(each.mean("followed")),
            "" if each is trained else points(each.gain(trained, "followed")),
            "" if each is released else points(each.gain(released, "followed")),
            *written(each),
        )
        for each in found.test
    ]
    return table(heads, rows)


def written(each: Candidate) -> tuple[str, str]:
    """Return the length of answers and the share of cut ones."""
    return f"{each.characters:.0f}", f"{100 * each.cut:.1f}"


def quoted(verdict: list[str]) -> str:
    return "\n".join(f"- {line}" for line in verdict)


def kinds(found: Measured) -> str:
    """Return the table by kind of instruction, those with the highest gain by DPO first."""
    released, trained = results.at(-1)(found.test), results.at(0)(found.test)
    order = sorted(KINDS, key=lambda kind: released.share(kind, "followed") - trained.share(kind, "followed"))
    return table(
        ("kind, %", *(name(each.alpha) for each in found.test)),
        [(kind, *(f"{100 * each.share(kind, 'followed'):.0f}" for each in found.test)) for kind in order],
    )


def costs(found: Measured) -> str:
    released = results.at(-1)(found.costs)
    heads = ("alpha", "right sums, %", "change, points", "log-probability, change in nats a token")
    rows = [
        (
            name(each.alpha),
            percent(each.mean("sums")),
            "" if each is released else points(each.gain(released, "sums")),
            "" if each is released else plain(each.gain(released, "nll"), 4),
        )
        for each in found.costs
    ]
    return table(heads, rows)


def rounding(found: Measured) -> str:
    rows = [
        (signed(asked, "g"), *(signed(values[place], ".3f") for values in found.rounding.effective.values()))
        for place, asked in enumerate(ASKED)
    ]
    return f"RMS(delta) is {found.rounding.rms:.1e}.\n\n" + table(("asked", *found.rounding.effective), rows)


def left_out() -> int:
    return len(LEFT_OUT)


def size(layers_less: int) -> float:
    """Return the millions of weights of SmolLM2-135M without some of its 30 layers."""
    hidden, inner, keys, words, layers = 576, 1536, 192, 49152, 30
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * inner + 2 * hidden
    return (words * hidden + hidden + (layers - layers_less) * layer) / 1e6


def student(found: Measured) -> str:
    first, taught = found.student
    models = [
        ("the released model", size(0), results.at(-1)(found.test)),
        ("its teacher: that after DPO", size(0), results.at(0)(found.test)),
        ("the student before its lessons", size(left_out()), first),
        ("the student after its lessons", size(left_out()), taught),
    ]
    heads = ("model", "millions of weights", "followed, %", "over the student before, points", "characters", "cut, %")
    rows = [
        (
            what,
            f"{millions:.1f}",
            percent(each.mean("followed")),
            "" if each is first else points(each.gain(first, "followed")),
            *written(each),
        )
        for what, millions, each in models
    ]
    return table(heads, rows)


def took(found: Measured) -> str:
    """Return the table of times: two cores with nothing else to do share the processor time."""
    rows = [(each.stage, minutes(each.seconds), minutes(each.processor)) for each in found.times if each.seconds >= 1]
    total = [sum(column) for column in ([e.seconds for e in found.times], [e.processor for e in found.times])]
    rows.append(("all", *map(minutes, total)))
    return table(("stage", "minutes that passed", "minutes of processor time"), rows)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def samples(found: Measured) -> list[str]:
    """Return some instructions with the answers of the released, the trained, the furthest and the student model."""
    released, trained, furthest = results.at(-1)(found.test), results.at(0)(found.test), found.test[-1]
    shown = {
        "released": released, "DPO": trained, f"alpha {furthest.alpha:g}": furthest, "student": found.student[-1],
    }  # fmt: skip
    items = sorted(set.intersection(*(set(each.rows) for each in shown.values())))
    texts = []
    for item in random.Random(0).sample(items, min(SAMPLES, len(items))):
        lines = [f"> {markdown.text(found.asked[item])}", ""]
        for model, each in shown.items():
            verdict = "followed" if each.values("followed").get(item) else "not followed"
            text = " ⏎ ".join(each.rows[item]["text"].split("\n"))
            text = text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
            lines.append(f"- {model} ({verdict}): {markdown.text(text)}")
        texts.append("\n".join(lines))
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
    return f"{of.mean:+.{digits}f} [{of.low:+.{digits}f}, {of.high:+.{digits}f}]".replace("-", "−")
