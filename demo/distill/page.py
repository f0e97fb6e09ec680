"""The page: which road won, by how much, and how sure that is. Markdown, HTML, PNG and the numbers as JSON."""

import base64
import json
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from demo.distill import pictures
from demo.distill.comparison import gain, interval
from demo.distill.plan import MERGES, ROADS, Out
from demo.distill.results import Measured, Results, all_measured
from demo.distill.skills import SKILLS
from demo.report import Interval
from mergekit_lite.pages import html

if TYPE_CHECKING:
    from rich.console import Console

NAMES = {"dpo": "SFT → DPO", "wrpo": "SFT → WRPO", "fusechat3": "FuseChat-3.0: SFT → dpo_norm"}
TITLE = "Three sources, one target, three roads"


class Difference(NamedTuple):
    """One model's right answers less another's, in points."""

    better: str
    than: str
    points: Interval
    greedy: Interval

    @property
    def sure(self) -> bool:
        """The interval leaves out zero."""
        return self.points.low > 0 or self.points.high < 0


class Table(NamedTuple):
    """Headings and rows of text; all columns but the first are flush right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(out: Out, alphas: dict[str, float], console: "Console") -> None:
    """Make the page of everything that was measured."""
    judged, choosing = Results(out, "held-out"), Results(out, "choosing")
    models = {model.key: model for model in all_measured(judged, alphas)}
    differences = compared(models)
    finding = verdict(models)
    folder = out.root / "report"
    folder.mkdir(exist_ok=True)
    pictures.models(list(models.values()), judged.domains, folder / "models.png")
    pictures.alphas(choosing, alphas, folder / "alphas.png")
    parts: list[str | Table] = [
        f"# {TITLE}",
        f"**{finding}**",
        about(out, judged),
        "![Right answers by model and skill](models.png)",
        models_table(list(models.values()), judged.domains),
        "## Differences",
        "Points of right answers, paired by question and by seed.",
        differences_table(differences),
        "## Past the end",
        "Right answers over alpha, on the questions that choose alpha; the tables above are from others.",
        "![Right answers over alpha](alphas.png)",
        "## What the roads were trained on",
        rows_table(out),
        "The stages' own reports: " + ", ".join(f"`runs/{out.seeds[0]}-{road}/report/report.md`" for road in ROADS),
    ]
    (folder / "report.md").write_text("\n\n".join(map(markdown, parts)) + "\n")
    (folder / "report.html").write_text(as_html(TITLE, parts, {p.name: p.read_bytes() for p in folder.glob("*.png")}))
    data = {
        "finding": finding,
        "seeds": len(out.seeds),
        "prompts": len(judged.domains),
        "alphas": alphas,
        "models": [as_data(model, judged.domains) for model in models.values()],
        "differences": [difference_data(difference) for difference in differences],
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"\n{markdown(models_table(list(models.values()), judged.domains))}", soft_wrap=True)
    console.print(f"\n{markdown(differences_table(differences))}", soft_wrap=True)
    console.print(f"\n{finding}", style="bold", soft_wrap=True)


def verdict(models: dict[str, Measured]) -> str:
    """Which road won, in a sentence or two."""
    first, second, third = sorted(ROADS, key=lambda road: -models[road].share())
    ahead = difference(models, first, second)
    names = [f"{NAMES[road]} {100 * models[road].share():.1f} %" for road in (first, second, third)]
    gap = f"{ahead.points.value:.1f} points [{ahead.points.low:.1f}, {ahead.points.high:.1f}]"
    ranking = f"Right answers: {names[0]}, {names[1]}, {names[2]}."
    if ahead.sure:
        return f"{ranking} {NAMES[first]} wins: it is ahead of the second by {gap}, beyond noise."
    last = difference(models, first, third)
    worse = "but it beats the third beyond noise" if last.sure else "nor from the third"
    return f"{ranking} No winner: the first can't be told from the second, the gap is {gap}; {worse}."


def difference(models: dict[str, Measured], better: str, than: str) -> Difference:
    ours, theirs = models[better], models[than]
    found = (gain(ours.right, theirs.right), gain(ours.greedy, theirs.greedy))
    return Difference(ours.name, theirs.name, *(Interval(*(100 * bound for bound in each)) for each in found))


def compared(models: dict[str, Measured]) -> list[Difference]:
    """Return the differences that answer a question."""
    best = max(ROADS, key=lambda road: models[road].share())
    pairs = [
        ("sft", "target"),
        ("fusechat3-sft", "target"),
        ("dpo", "sft"),
        ("wrpo", "sft"),
        ("fusechat3", "fusechat3-sft"),
        ("wrpo", "dpo"),
        ("fusechat3", "dpo"),
        ("fusechat3", "wrpo"),
        *((f"expo-{road}", road) for road in ROADS),
        *((f"merged-{method}", best) for method in MERGES),
    ]
    return [difference(models, better, than) for better, than in pairs]


def about(out: Out, judged: Results) -> str:
    """Return paragraphs on how to read the numbers."""
    return (
        f"{len(judged.domains):,} questions that no model has learnt from; {len(out.seeds)} seeds. Answers are drawn "
        "at temperature 1, so a share of right ones is the probability that a model gives them; greedy answers beside. "
        "Each seed draws the sources' answers, splits the prompts, trains and draws the target's answers anew; the "
        "sources and the target before training are the same for all seeds. In brackets: 95 % intervals over other "
        "seeds and other questions (the variances of both added, Student's t). Beyond noise means that the interval of "
        "the difference leaves out zero; no correction is made for how many differences are looked at."
    )


def models_table(models: Sequence[Measured], domains: Sequence[str]) -> Table:
    def row(model: Measured) -> list[str]:
        cells = [percent(interval(model.right)), percent(interval(model.greedy))]
        cells += [f"{100 * fmean(map(fmean, model.on(columns(domains, skill)))):.1f}" for skill in SKILLS]
        return [model.name, *cells, f"{fmean(map(fmean, model.length)):.1f}"]

    headings = ("model", "right, %", "greedy, %", *(f"{skill}, %" for skill in SKILLS), "characters")
    return Table(headings, [row(model) for model in models])


def differences_table(differences: Sequence[Difference]) -> Table:
    rows = [
        [
            f"{d.better}, over {d.than}",
            signed(d.points),
            "yes" if d.sure else "no",
            signed(d.greedy),
        ]
        for d in differences
    ]
    return Table(("difference", "points", "beyond noise", "greedy"), rows)


def rows_table(out: Out) -> Table:
    """Rows of SFT and preferences, the mean over seeds."""

    def count(road: str, name: str) -> float:
        paths = [out.run(seed, road) / "pairs" / f"{name}.jsonl" for seed in out.seeds]
        return fmean(len(path.read_text().splitlines()) for path in paths)

    names = ("sft", "preference", "dropped")
    rows = [[NAMES[road], *(f"{count(road, name):,.0f}" for name in names)] for road in ROADS]
    return Table(("road", "SFT rows", "preference rows", "dropped"), rows)


def columns(domains: Sequence[str], skill: str) -> list[int]:
    """Return the prompts of one skill."""
    return [number for number, domain in enumerate(domains) if domain == skill]


def signed(of: Interval) -> str:
    return f"{of.value:+.1f} [{of.low:+.1f}, {of.high:+.1f}]"


def percent(of: Interval) -> str:
    """Return a share with its interval, held to [0, 1]."""
    return f"{100 * of.value:.1f} [{100 * max(of.low, 0):.1f}, {100 * min(of.high, 1):.1f}]"


def as_data(model: Measured, domains: Sequence[str]) -> dict[str, object]:
    return {
        "model": model.name,
        "right": interval(model.right)._asdict(),
        "greedy": interval(model.greedy)._asdict(),
        "by_seed": [fmean(row) for row in model.right],
        **{skill: fmean(map(fmean, model.on(columns(domains, skill)))) for skill in SKILLS},
        "characters": fmean(map(fmean, model.length)),
    }


def difference_data(of: Difference) -> dict[str, object]:
    points, greedy = of.points._asdict(), of.greedy._asdict()
    return {"of": of.better, "over": of.than, **points, "sure": of.sure, "greedy": greedy}


def markdown(part: str | Table) -> str:
    if isinstance(part, str):
        return part
    lines = [part.headings, ["---", *("---:" for _ in part.headings[1:])], *part.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_html(title: str, parts: Sequence[str | Table], images: dict[str, bytes]) -> str:
    """One file: the pictures are in it."""
    return html.document(title, [as_element(part, images) for part in parts])


def as_element(part: str | Table, images: dict[str, bytes]) -> html.Markup:
    """Return a part of the page as HTML."""
    if isinstance(part, Table):
        rows = [[first, *(html.Cell(text, None) for text in rest)] for first, *rest in part.rows]
        return html.table(part.headings[0], part.headings, rows)
    if part.startswith("!["):
        text, _, name = part.removeprefix("![").removesuffix(")").partition("](")
        source = f"data:image/png;base64,{base64.b64encode(images[name]).decode()}"
        return html.element("img", alt=text, src=source, style="max-width: 100%")
    if part.startswith("#"):
        level = len(part) - len(part.lstrip("#"))
        return html.element(f"h{level}", part.lstrip("# "))
    if part.startswith("**"):
        return html.element("p", html.element("b", part.strip("*")))
    return html.element("p", part.replace("`", ""))
