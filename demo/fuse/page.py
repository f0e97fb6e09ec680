"""The page: which road gains over SFT alone, by how much, and what is no more than noise."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from demo.distill import pictures
from demo.distill.comparison import gain
from demo.distill.page import (
    Difference,
    Table,
    as_data,
    as_html,
    columns,
    difference,
    difference_data,
    differences_table,
    markdown,
    models_table,
    signed,
)
from demo.distill.results import Measured, Results
from demo.distill.skills import SKILLS
from demo.fuse.plan import ROADS, TEACHERS, TITLES, Files
from demo.report import BLUE, GREEN, ORANGE, Interval

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "Three teachers of other tokenizers, one student, seven roads"


def write(out: Files, console: "Console") -> None:
    """Make the page of everything that was measured."""
    judged = Results(out, "held-out")
    measured = all_measured(judged)
    models = {model.key: model for model in measured}
    found = compared(models)
    finding = verdict(models)
    folder = out.root / "report"
    folder.mkdir(exist_ok=True)
    pictures.models(measured, judged.domains, folder / "models.png", colours(models))
    parts: list[str | Table] = [
        f"# {TITLE}",
        f"**{finding}**",
        about(out, judged),
        "![Right answers by model and skill](models.png)",
        "Green: beyond noise above SFT alone. Orange: beyond noise below it. Blue: neither.",
        models_table(measured, judged.domains),
        "## Differences",
        "Points of right answers, paired by question and by seed.",
        differences_table(found),
        "## By skill",
        "Gains over SFT alone, in points; a star marks those beyond noise.",
        skills_table(models, judged.domains),
        "## What the roads were trained on",
        "Tokens of responses in the loss, of all epochs, rounds and students together: means over seeds.",
        tokens_table(out),
    ]
    (folder / "report.md").write_text("\n\n".join(map(markdown, parts)) + "\n")
    (folder / "report.html").write_text(as_html(TITLE, parts, {p.name: p.read_bytes() for p in folder.glob("*.png")}))
    data = {
        "finding": finding,
        "seeds": len(out.seeds),
        "prompts": len(judged.domains),
        "models": [as_data(model, judged.domains) for model in measured],
        "differences": [difference_data(each) for each in found],
        "tokens": {road: tokens(out, road) for road in ROADS},
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    for part in (models_table(measured, judged.domains), differences_table(found), tokens_table(out)):
        console.print(f"\n{markdown(part)}", soft_wrap=True)
    console.print(f"\n{finding}", style="bold", soft_wrap=True)


def all_measured(judged: Results) -> list[Measured]:
    """Every kind of model, in the order of the page."""
    out = judged.out
    assert isinstance(out, Files)

    def pairwise(teacher: str) -> Measured:
        name = f"FuseChat's student of {teacher}, before the merge"
        return judged.by_seed(f"one-{teacher}", name, lambda seed: out.pairwise(seed, teacher))

    def end(road: str) -> Measured:
        return judged.by_seed(road, TITLES[road], lambda seed: out.end(seed, road))

    return [
        *(judged.once(f"teacher-{name}", f"teacher {name}", out.model(name)) for name in TEACHERS),
        judged.once("student", "student", out.model("student")),
        *map(end, ROADS),
        *map(pairwise, TEACHERS),
    ]


def others() -> Iterable[str]:
    """Yield the roads that learn from teachers."""
    return (road for road in ROADS if road != "sft")


def verdict(models: dict[str, Measured]) -> str:
    """Say which roads gain over SFT alone beyond noise, and whether the best of them is beyond noise the best."""
    differences = {road: difference(models, road, "sft") for road in others()}
    ranked = sorted(differences, key=lambda road: -differences[road].points.value)
    groups = {
        "Beyond noise over SFT alone": [road for road in ranked if differences[road].points.low > 0],
        "No gain beyond noise": [road for road in ranked if not differences[road].sure],
        "Beyond noise below SFT alone": [road for road in ranked if differences[road].points.high < 0],
    }
    said = [
        f"{what}: {', '.join(f'{TITLES[road]} {signed(differences[road].points)}' for road in roads)}."
        for what, roads in groups.items()
        if roads
    ]
    if not groups["Beyond noise over SFT alone"]:
        said.insert(0, "No road gains over SFT alone beyond noise.")
    first, second = ranked[:2]
    ahead = difference(models, first, second)
    if ahead.points.low > 0:
        said.append(
            f"{TITLES[first]} is ahead of {TITLES[second]}, the second, by {signed(ahead.points)}, beyond noise."
        )
    else:
        said.append(f"The first can't be told from the second: {signed(ahead.points)}.")
    return " ".join(said)


def colours(models: dict[str, Measured]) -> dict[str, str]:
    """Return each road's colour by what can be said of it."""
    found = {road: difference(models, road, "sft").points for road in others()}
    return {road: GREEN if of.low > 0 else ORANGE if of.high < 0 else BLUE for road, of in found.items()}


def compared(models: dict[str, Measured]) -> list[Difference]:
    """Return the differences that answer a question."""
    best = max((f"one-{teacher}" for teacher in TEACHERS), key=lambda key: models[key].share())
    pairs = [("sft", "student"), *((road, "sft") for road in others()), ("fusechat", "mince"), ("fusechat", best)]
    return [difference(models, better, than) for better, than in pairs]


def about(out: Files, judged: Results) -> str:
    """Return a paragraph on how to read the numbers."""
    return (
        f"{len(judged.domains):,} questions that no model has learnt from; {len(out.seeds)} seeds. Answers are drawn "
        "at temperature 1, so a share of right ones is the probability that a model gives them; greedy answers beside. "
        "Each seed has rows of its own, mixes and trains anew; teachers and the student before training are the same "
        "for all seeds. All roads are planned for as many tokens of responses; the last table has those of all steps "
        "of a road, of FuseChat's three students together, and of the student's own answers, which are as long as they "
        "come. In brackets: 95 % intervals over other seeds and other questions (variances of both added, Student's "
        "t). Beyond noise means that the interval of the difference leaves out zero; no correction is made for how "
        "many differences are looked at."
    )


def skills_table(models: dict[str, Measured], domains: list[str]) -> Table:
    """Return each road's gain over SFT alone, skill by skill."""

    def cell(road: str, skill: str) -> str:
        chosen = columns(domains, skill)
        of = gain(models[road].on(chosen), models["sft"].on(chosen))
        points = Interval(*(100 * bound for bound in of))
        return signed(points) + ("*" if points.low > 0 or points.high < 0 else "")

    return Table(("road", *SKILLS), [[TITLES[road], *(cell(road, skill) for skill in SKILLS)] for road in others()])


def tokens_table(out: Files) -> Table:
    """Return the response tokens that each road was trained on."""
    return Table(("road", "tokens"), [[TITLES[road], f"{tokens(out, road):,.0f}"] for road in ROADS])


def tokens(out: Files, road: str) -> float:
    """Return the tokens of responses in all steps of all trainings of a road, the mean over seeds."""
    folders = [out.run(seed, road) / "train" for seed in out.seeds]
    return fmean(sum(map(trained_tokens, folder.glob("*/log.jsonl"))) for folder in folders)


def trained_tokens(log: Path) -> float:
    """Return the tokens of responses in all steps that a log tells of; its rows have means since the row before."""
    batch = json.loads((log.parent / "training.json").read_text())["settings"]["batch_size"]
    total, last = 0.0, 0
    for row in map(json.loads, log.read_text().splitlines()):
        if "length/response" in row:
            total += row["length/response"] * batch * (row["step"] - last)
            last = row["step"]
    return total
