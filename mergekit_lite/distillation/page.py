"""The report as text: one list of blocks, written as Markdown and as an HTML page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.distillation.curves import Picture
from mergekit_lite.distillation.findings import CAN_NOT_TELL, NAMES, STAGES, Findings, with_ends
from mergekit_lite.distillation.held_out import CUT, LENGTH, Comparison, Model
from mergekit_lite.errors import shortened
from mergekit_lite.pages import html
from mergekit_lite.pages.drawing import svg
from mergekit_lite.pages.html import Cell, Markup, Text, element

SHOWN = 4000  # characters of an answer
STAGE_NAMES = {"sft": "SFT", "preference": "Preference training"}


class Heading(NamedTuple):
    """Of a section; of a part of one where ``level`` is 3."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """Plain text."""

    text: str


class Bullets(NamedTuple):
    """A list of sentences."""

    items: Sequence[str]


class Rows(NamedTuple):
    """A table."""

    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Text]]


class Verbatim(NamedTuple):
    """What somebody else wrote, as it is."""

    label: str
    text: str


Block = Heading | Paragraph | Bullets | Rows | Verbatim | Picture


def title(findings: Findings) -> str:
    """Of the report."""
    return f"What {findings.recipe.target} learnt from {len(findings.recipe.sources)} sources"


def blocks(findings: Findings) -> Iterator[Block]:
    """The report, from what it says to what it is made of."""
    yield Rows("The distillation", ["", ""], _about(findings))
    yield Heading("What this says")
    yield Bullets(findings.said)
    yield Heading("What it can’t tell")
    yield Bullets(CAN_NOT_TELL)
    pictures = {picture.name: picture for picture in findings.pictures}
    if findings.comparison is not None:
        yield from _held_out(findings.comparison, pictures["held-out.png"])
    for stage in STAGES:
        if stage in findings.logs:
            yield Heading(STAGE_NAMES[stage])
            if f"{stage}.png" in pictures:
                yield pictures[f"{stage}.png"]
            yield from _log(findings, stage)
    yield from _data(findings)
    if findings.comparison is not None:
        yield from _examples(findings, findings.comparison)


def _about(findings: Findings) -> list[Sequence[Text]]:
    recipe = findings.recipe
    rows = [["target", recipe.target], ["sources", ", ".join(source.name for source in recipe.sources)]]
    rows += [["rule", recipe.pairs.rule]]
    if recipe.train.preference is not None:
        options = ", ".join(f"{key} {value}" for key, value in recipe.train.preference.options.items())
        rows += [["objective", f"{recipe.train.preference.objective}, {options}".rstrip(", ")]]
    return [*rows, ["seed", str(recipe.seed)]]


def _held_out(comparison: Comparison, picture: Picture) -> Iterator[Block]:
    yield Heading("Before and after")
    yield Paragraph(
        f"{len(comparison.prompts):,} prompts that are not in the training data, the same for all models; "
        "means with 95 % bootstrap intervals over the prompts."
    )
    heads = ["", *comparison.scorers, LENGTH, "cut off"]
    yield Rows("Means", heads, [_of_model(comparison, model, None) for model in comparison.answered])
    yield Paragraph("Differences are taken prompt by prompt, so what makes a prompt hard for all drops out.")
    yield Rows("Differences", ["", "figure", "difference", "prompts", "beyond noise"], list(_differences(comparison)))
    yield picture
    if len(comparison.domains) > 1:
        rows = [
            [domain or "–", NAMES[model], *_of_model(comparison, model, domain)[1:]]
            for domain in comparison.domains
            for model in comparison.answered
        ]
        yield Rows("By domain", ["domain", "model", *heads[1:]], rows)


def _of_model(comparison: Comparison, model: Model, domain: str | None) -> list[Text]:
    of = [comparison.mean(model, figure, domain) for figure in (*comparison.scorers, LENGTH)]
    cut = comparison.mean(model, CUT, domain).mean
    share = Cell("–" if math.isnan(cut) else f"{100 * cut:.1f} %", None if math.isnan(cut) else cut)
    return [NAMES[model], *(_figure(one) for one in of), share]


def _figure(of: Interval) -> Cell:
    return Cell(with_ends(of), of.mean if math.isfinite(of.mean) else None)


def _differences(comparison: Comparison) -> Iterator[Sequence[Text]]:
    for one in comparison.differences:
        if one.of.items:
            way = f"{NAMES[one.after]} − {NAMES[one.before]}"
            prompts = Cell(f"{one.of.items:,}", one.of.items)
            yield [
                way,
                one.figure,
                Cell(with_ends(one.of, signed=True), one.of.mean),
                prompts,
                "yes" if one.beyond_noise else "no",
            ]


def _log(findings: Findings, stage: str) -> Iterator[Block]:
    log = findings.logs[stage]
    columns = [key for key in log[-1] if key not in ("step", "epoch")]
    rows: list[Sequence[Text]] = [
        [key, *(Cell(f"{row[key]:.4g}", row[key]) if key in row else Cell("–", None) for row in (log[0], log[-1]))]
        for key in columns
    ]
    yield Rows(STAGE_NAMES[stage], ["", f"step {log[0]['step']:,}", f"step {log[-1]['step']:,}"], rows)


def _data(findings: Findings) -> Iterator[Block]:
    if findings.table is None:
        return
    yield Heading("Data")
    counts = {**findings.table["domains"], "all": findings.table["all"]}
    names = ("prompts", "total", "sft", "preference")
    rows: list[Sequence[Text]] = [
        [name or "–", *(Cell(f"{of[key]:,}", of[key]) for key in names), Cell(of["share"], None)]
        for name, of in counts.items()
    ]
    yield Rows("Rows by domain", ["domain", "prompts", "rows", "SFT", "preference", "SFT share"], rows)
    losses: list[Sequence[Text]] = [
        [why, Cell(f"{number:,}", number)]
        for why, number in [*counts["all"]["dropped"].items(), *counts["all"]["answers"].items()]
    ]
    if losses:
        yield Rows("Losses", ["what", "number"], losses)


def _examples(findings: Findings, comparison: Comparison) -> Iterator[Block]:
    recipe = findings.recipe
    yield Heading("Answers side by side")
    yield Paragraph(f"Drawn by chance with the seed {recipe.seed}; nobody chose them.")
    for number, prompt in enumerate(comparison.examples(recipe.report.examples, recipe.seed), 1):
        yield Heading(f"Prompt {number}", 3)
        yield Verbatim("asked", _conversation(prompt))
        if prompt.reference is not None:
            yield Verbatim("right answer", prompt.reference)
        for model, answered in comparison.answered.items():
            scores = [
                f"{scorer} {value:.4g}"
                for scorer in comparison.scorers
                if (value := answered.figures[scorer].get(prompt.id)) is not None
            ]
            label = ": ".join([NAMES[model], *([", ".join(scores)] if scores else [])])
            yield Verbatim(label, shortened(answered.texts.get(prompt.id, ""), SHOWN))


def _conversation(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return shortened(prompt.messages[0]["content"], SHOWN)
    return "\n\n".join(f"{one['role']}: {shortened(one['content'], SHOWN)}" for one in prompt.messages)


def markdown(findings: Findings) -> str:
    """The report as Markdown; pictures are files beside it."""
    return "\n\n".join([f"# {_plain(title(findings))}", *map(_as_markdown, blocks(findings))]) + "\n"


def _as_markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Bullets):
        return "\n".join(f"- {_plain(item)}" for item in block.items)
    if isinstance(block, Verbatim):
        fence = "`" * (max([2, *map(len, re.findall("`+", block.text))]) + 1)
        return f"**{_plain(block.label)}**\n\n{fence}text\n{block.text}\n{fence}"
    if isinstance(block, Picture):
        return f"![{block.title}]({block.name})"
    rule = ["---", *("---:" if _is_figure(block, column) else "---" for column in range(1, len(block.heads)))]
    lines = [
        block.heads,
        rule,
        *([cell.text if isinstance(cell, Cell) else cell for cell in row] for row in block.rows),
    ]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _is_figure(rows: Rows, column: int) -> bool:
    return all(isinstance(row[column], Cell) for row in rows.rows)


def _plain(text: str) -> str:
    """Text that Markdown doesn't take for more than that."""
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", text.replace("\n", " "))


def page(findings: Findings) -> str:
    """The report as one HTML page that needs nothing else."""
    heading = element("h1", title(findings))
    return html.document(title(findings), [heading, *map(_as_html, blocks(findings))])


def _as_html(block: Block) -> Markup:
    if isinstance(block, Heading):
        return element(f"h{block.level}", block.text)
    if isinstance(block, Paragraph):
        return element("p", block.text, class_="soft")
    if isinstance(block, Bullets):
        return element("ul", *(element("li", item) for item in block.items))
    if isinstance(block, Verbatim):
        label = element("figcaption", block.label, class_="soft")
        return element("figure", label, element("pre", block.text), class_="verbatim")
    if isinstance(block, Picture):
        return html.plot(svg(block.draw, block.height, block.title), block.title)
    if not any(block.heads):
        entries: Iterable[Markup] = (
            element(name, str(cell)) for row in block.rows for name, cell in zip(("dt", "dd"), row, strict=True)
        )
        return element("dl", *entries)
    return html.table(block.label, block.heads, block.rows)
