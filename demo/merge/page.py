"""The page: which way to one model is better than a plain average, by how much, and what is no more than noise."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from demo.distill.comparison import gain, interval
from demo.distill.page import Table, as_data, as_html, columns, markdown, percent, signed
from demo.distill.results import Measured, Results
from demo.distill.skills import SKILLS
from demo.merge import pictures
from demo.merge.plan import BOOSTED, BY_PEFT, COMBINED, DENSITY, LEFT_OUT, Files, merges
from demo.report import Interval
from mergekit_lite.methods import METHODS

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "Three fine-tunes of one model, made one model"
AVERAGE, ADAPTERS_AVERAGE = "linear", "core-linear"
BY_SKILL = "three models, each for its skill"


def write(out: Files, console: "Console") -> None:
    """Make the page of everything that was measured."""
    judged = Results(out, "held-out")
    groups = all_measured(judged)
    measured = [model for group in groups.values() for model in group]
    models = {model.key: model for model in measured}
    finding = verdict(models)
    folder = out.root / "report"
    folder.mkdir(exist_ok=True)
    over = {key: gained for key in models if (gained := over_average(models, key)) is not None}
    pictures.ways(groups, over, folder / "ways.png")
    table = ways_table(groups, models, judged.domains)
    parts: list[str | Table] = [
        f"# {TITLE}",
        f"**{finding}**",
        about(out, judged),
        "![Right answers of every way to one model, and the difference from a plain average](ways.png)",
        "Green: beyond noise above the plain average of its group. Orange: beyond noise below it. Blue: neither. Grey: "
        "nothing to compare with.",
        table,
        "## Numbers by boost",
        numbers_table(out),
        f"Not measured: {'; '.join(f'{name} {why}' for name, why in LEFT_OUT.items() if name in METHODS)}; and "
        "methods that don't take three models.",
    ]
    (folder / "report.md").write_text("\n\n".join(map(markdown, parts)) + "\n")
    (folder / "report.html").write_text(as_html(TITLE, parts, {p.name: p.read_bytes() for p in folder.glob("*.png")}))
    data = {
        "finding": finding,
        "seeds": len(out.seeds),
        "prompts": len(judged.domains),
        "models": {model.key: as_data(model, judged.domains) for model in measured},
        "over_average": {key: gained._asdict() for key, gained in over.items()},
        "boost": {f"{seed}-{method}": out.found(seed, method) for seed in out.seeds for method in BOOSTED},
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"\n{markdown(table)}", soft_wrap=True)
    console.print(f"\n{finding}", style="bold", soft_wrap=True)


def all_measured(judged: Results) -> dict[str, list[Measured]]:
    """Every kind of model by groups; merges from the best to the worst."""
    out = judged.out
    assert isinstance(out, Files)

    def merged(key: str, name: str) -> Measured:
        return judged.by_seed(key, name, lambda seed: out.merged(seed, key))

    def boosted(method: str) -> Measured:
        found = sum(out.found(seed, method) is not None for seed in out.seeds)
        name = f"{method}, by boost ({found} of {len(out.seeds)} searches sure)"
        return judged.by_seed(f"boosted-{method}", name, lambda seed: out.boosted_or_merged(seed, method))

    def tuned(folder: str, skill: str) -> Measured:
        return judged.by_seed(f"{folder}-{skill}", f"{folder} on {skill}", lambda seed: out.one(folder, seed, skill))

    fine_tunes, adapters = ([tuned(folder, skill) for skill in SKILLS] for folder in ("fine-tune", "adapter"))
    ways = [*(merged(name, name) for name in merges()), *map(boosted, BOOSTED)]
    of_adapters = [merged(f"{space}-{m}", f"{m}, {space}") for space, methods in COMBINED.items() for m in methods]
    of_adapters += [merged(f"peft-{kind}", f"peft's own {kind}") for kind in BY_PEFT]
    return {
        "No merge": [
            judged.by_seed("base", "base", out.base),
            *fine_tunes,
            by_skill("by-skill", f"fine-tunes: {BY_SKILL}", fine_tunes, judged.domains),
            by_skill("adapters-by-skill", f"adapters: {BY_SKILL}", adapters, judged.domains),
            judged.by_seed("joint", "one tuned on all skills", out.joint),
        ],
        "Fine-tunes merged": sorted(ways, key=lambda model: -model.share()),
        "Adapters merged": sorted(of_adapters, key=lambda model: -model.share()),
    }


def by_skill(key: str, name: str, tuned: Sequence[Measured], domains: Sequence[str]) -> Measured:
    """Return what the models would get together, if each were asked what it was tuned on."""
    whose = [list(SKILLS).index(domain) for domain in domains]
    tables = (
        [[rows[model][prompt] for prompt, model in enumerate(whose)] for rows in zip(*of, strict=True)]
        for of in ([getattr(model, figure) for model in tuned] for figure in ("right", "greedy", "length"))
    )
    return Measured(key, name, *tables)


def average_of(key: str) -> str | None:
    """Return the plain average that a way is compared with; None for what is no merge, or is that average."""
    if key in (AVERAGE, ADAPTERS_AVERAGE):
        return None
    if key.startswith((*(f"{space}-" for space in COMBINED), "peft-")):
        return ADAPTERS_AVERAGE
    return AVERAGE if key.removeprefix("boosted-") in merges() else None


def over_average(models: dict[str, Measured], key: str) -> Interval | None:
    """Return a way's gain over the plain average in points."""
    average = average_of(key)
    if average is None:
        return None
    return Interval(*(100 * bound for bound in gain(models[key].right, models[average].right)))


def verdict(models: dict[str, Measured]) -> str:
    """Say which ways are beyond noise better than a plain average, and what that average is worth."""
    said = []
    for average, whose in ((AVERAGE, "fine-tunes"), (ADAPTERS_AVERAGE, "adapters")):
        found = {key: over for key in models if average_of(key) == average and (over := over_average(models, key))}
        better = sorted((key for key in found if found[key].low > 0), key=lambda key: -found[key].value)
        worse = sum(over.high < 0 for over in found.values())
        over_base = Interval(*(100 * b for b in gain(models[average].right, models["base"].right)))
        said.append(f"The plain average of the {whose} is {signed(over_base)} points over the base.")
        if better:
            names = ", ".join(f"{models[key].name} {signed(found[key])}" for key in better)
            said.append(f"Beyond noise better than it: {names}.")
        else:
            said.append(f"No way of {len(found)} is better beyond noise.")
        said.append(f"{worse} of {len(found)} are worse beyond noise.")
    return " ".join(said)


def about(out: Files, judged: Results) -> str:
    """Return a paragraph on how to read the numbers."""
    return (
        f"{len(judged.domains):,} questions that no model has learnt from; {len(out.seeds)} seeds, each with a base, "
        "fine-tunes and adapters of its own. Answers are drawn at temperature 1, so a share of right ones is the "
        "probability that a model gives them; greedy answers beside. All methods have their defaults, weights of 1 "
        f"where they ask for weights, and a density of {DENSITY:g} where by default they keep everything. boost chose "
        "by other questions; where it was sure of nothing the merge by defaults stands. In brackets: 95 % intervals "
        "over other seeds and other questions (variances of both added, Student's t). Differences are paired by "
        "question and seed; a star marks those beyond noise. No correction is made for how many are looked at: of "
        "forty that are nothing, two have a star."
    )


def ways_table(groups: dict[str, list[Measured]], models: dict[str, Measured], domains: Sequence[str]) -> Table:
    def row(model: Measured) -> list[str]:
        over = over_average(models, model.key)
        star = "" if over is None or over.low <= 0 <= over.high else "*"
        by_skill = [f"{100 * fmean(map(fmean, model.on(columns(domains, skill)))):.1f}" for skill in SKILLS]
        gained = "" if over is None else f"{signed(over)}{star}"
        return [model.name, percent(interval(model.right)), gained, percent(interval(model.greedy)), *by_skill]

    headings = ("way", "right, %", "over the average, points", "greedy, %", *(f"{skill}, %" for skill in SKILLS))
    rows: list[list[str]] = []
    for name, group in groups.items():
        rows += [[name, *[""] * (len(headings) - 1)], *map(row, group)]
    return Table(headings, rows)


def numbers_table(out: Files) -> Table:
    """Return what boost chose, search by search."""

    def said(seed: int, method: str) -> str:
        found = out.found(seed, method)
        if found is None:
            return "not sure"
        return ", ".join(f"{name.removeprefix('parameters.')} {value:.2f}" for name, value in found.items())

    rows = [[method, *(said(seed, method) for seed in out.seeds)] for method in BOOSTED]
    return Table(("method", *(f"seed {seed}" for seed in out.seeds)), rows)
