"""The report as a list of blocks, and its two forms: Markdown and an HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.traits import HEADS
from mergekit_lite.distillation.recipe.schema import Rounds
from mergekit_lite.distillation.reporting.curves import Picture, ends, name_of
from mergekit_lite.distillation.reporting.findings import CAN_NOT_TELL, Findings, RoundFigures, model_name, with_ends
from mergekit_lite.distillation.reporting.held_out import CUT, LENGTH, UNTRAINED, HeldOutComparison
from mergekit_lite.errors import counted, shortened
from mergekit_lite.pages import html
from mergekit_lite.pages.drawing import svg
from mergekit_lite.pages.html import Cell, Markup, Text, element
from mergekit_lite.pages.markdown import block as lines_of
from mergekit_lite.pages.markdown import text as escaped

SHOWN = 4000  # characters of a text; the rest is cut


class Heading(NamedTuple):
    """A heading of a section (level 2), or of a part of one (3)."""

    text: str
    level: int = 2


class Bullets(NamedTuple):
    """A list of sentences."""

    items: Sequence[str]


class TableBlock(NamedTuple):
    """A table; without column headings, a list of names and values."""

    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Text]]


class Verbatim(NamedTuple):
    """A labelled text of a user or a model, shown as it is."""

    label: str
    text: str


Block = Heading | str | Bullets | TableBlock | Verbatim | Picture  # a str is a paragraph


def title(findings: Findings) -> str:
    """Return the report's title."""
    recipe = findings.recipe
    teachers = f" and {counted(len(recipe.teachers), 'teacher')}" if recipe.teachers else ""
    sources = counted(len(recipe.sources), "source") if recipe.sources else "its own answers"
    return f"What {recipe.target} learnt from {sources}{teachers}"


def blocks(findings: Findings) -> Iterator[Block]:
    """Yield the blocks of the report: conclusions, comparison, training, data, examples."""
    yield TableBlock("The distillation", ["", ""], _about(findings))
    yield Heading("What this says")
    yield Bullets(findings.conclusions)
    yield Heading("What it can’t tell")
    yield Bullets(CAN_NOT_TELL)
    pictures = {picture.name: picture for picture in findings.pictures}
    if findings.comparison is not None:
        yield from _held_out(findings.comparison, pictures["held-out.png"])
        if findings.rounds:
            yield from _over_rounds(findings.rounds, findings.comparison, pictures["rounds.png"])
    for stage in findings.logs:
        yield Heading(name_of(stage))
        if f"{stage}.png" in pictures:
            yield pictures[f"{stage}.png"]
        yield from _log(findings, stage)
    yield from _data(findings)
    if findings.comparison is not None:
        yield from _examples(findings, findings.comparison)


def _about(findings: Findings) -> list[Sequence[Text]]:
    recipe = findings.recipe
    rows = [["target", recipe.target], ["sources", ", ".join(source.name for source in recipe.sources) or "none"]]
    rows += [["rule", recipe.pairs.rule]]
    if recipe.rounds is not None:
        rows += [["rounds", _rounds_of(recipe.rounds)]]
    if recipe.train.preference is not None:
        options = ", ".join(f"{key} {value}" for key, value in recipe.train.preference.options.items())
        rows += [["objective", f"{recipe.train.preference.objective}, {options}".rstrip(", ")]]
    if recipe.teachers:
        rows += [["teachers", ", ".join(teacher.name for teacher in recipe.teachers)]]
    if recipe.train.fuse is not None:
        fuse = recipe.train.fuse
        merged = f", students merged by {fuse.pairwise.merge_method}" if fuse.pairwise else ""
        rows += [["fused by", f"{fuse.objective}, {fuse.combine}, {fuse.clm:g} of plain SFT{merged}"]]
    return [*rows, ["seed", str(recipe.seed)]]


def _rounds_of(rounds: Rounds) -> str:
    parts = [
        f"{rounds.number}",
        "each with its own part of the prompts" if rounds.prompts == "split" else "all prompts",
    ]
    parts += [f"reference: the {'start of the round' if rounds.reference == 'start' else 'first model'}"]
    parts += [f"momentum {rounds.momentum:g}"] if rounds.momentum else []
    parts += [f"replay {', '.join(f'{share:g}' for share in rounds.replay)}"] if rounds.replay else []
    return "; ".join(parts)


def _over_rounds(rounds: Sequence[RoundFigures], comparison: HeldOutComparison, picture: Picture) -> Iterator[Block]:
    yield Heading("Over the rounds")
    metrics = (*comparison.scorers, LENGTH)
    rows: list[Sequence[Text]] = [
        ["0", *[Cell("–", None)] * 3, *(_figure(comparison.mean(UNTRAINED, each)) for each in metrics)]
    ]
    for each in rounds:
        counts = [Cell(f"{number:,}", number) for number in (each.prompts, each.rows, each.steps)]
        means = [_figure(comparison.mean(f"round-{each.round}", metric)) for metric in metrics]
        rows.append([str(each.round), *counts, *means])
    yield TableBlock("Rounds", ["round", "prompts", "rows", "steps", *metrics], rows)
    yield "Rows are those of the round's last training, with what it replays. Round 0 is the target as it was."
    yield picture


def _held_out(comparison: HeldOutComparison, picture: Picture) -> Iterator[Block]:
    yield Heading("Before and after")
    yield (
        f"{len(comparison.prompts):,} prompts that are not in the training data, the same for all models; "
        "means with 95 % intervals over the prompts."
    )
    heads = ["", *comparison.scorers, LENGTH, "cut off"]
    yield TableBlock("Means", heads, [_of_model(comparison, model, None) for model in comparison.answers])
    yield "Differences are taken prompt by prompt, so what makes a prompt hard for all drops out."
    columns = ["", "figure", "difference", "prompts", "beyond noise"]
    yield TableBlock("Differences", columns, list(_differences(comparison)))
    yield picture
    yield from _reasons(comparison)
    if len(comparison.domains) > 1:
        rows = [
            [domain or "–", *_of_model(comparison, model, domain)]
            for domain in comparison.domains
            for model in comparison.answers
        ]
        yield TableBlock("By domain", ["domain", "model", *heads[1:]], rows)


def _reasons(comparison: HeldOutComparison) -> Iterator[Block]:
    *_, last = comparison.answers
    for scorer, why in comparison.reasons.items():
        yield Heading(f"What goes with a higher {scorer} of {model_name(last)}", 3)
        yield why.told
        rows: list[Sequence[Text]] = [[trait, *(Cell(*cell) for cell in cells)] for trait, cells in why.table]
        yield TableBlock(f"Traits, {scorer}", HEADS, rows)


def _of_model(comparison: HeldOutComparison, model: str, domain: str | None) -> list[Text]:
    means = [comparison.mean(model, metric, domain) for metric in (*comparison.scorers, LENGTH)]
    cut = comparison.mean(model, CUT, domain).mean
    share = Cell("–" if math.isnan(cut) else f"{100 * cut:.1f} %", None if math.isnan(cut) else cut)
    return [model_name(model), *(_figure(mean) for mean in means), share]


def _figure(interval: Interval) -> Cell:
    return Cell(with_ends(interval), interval.mean if math.isfinite(interval.mean) else None)


def _differences(comparison: HeldOutComparison) -> Iterator[Sequence[Text]]:
    for difference in comparison.differences:
        interval = difference.interval
        if interval.items:
            yield [
                f"{model_name(difference.after)} − {model_name(difference.before)}",
                difference.metric,
                Cell(with_ends(interval, signed=True), interval.mean),
                Cell(f"{interval.items:,}", interval.items),
                "yes" if difference.beyond_noise else "no",
            ]


def _log(findings: Findings, stage: str) -> Iterator[Block]:
    if choice := findings.choices.get(stage):
        yield f"Of the last checkpoints, {choice}: it is published."
    rows: list[Sequence[Text]] = [
        [key, *(Cell(f"{value:.4g}", value) for value in values)]
        for key, values in ends(findings.logs[stage]).items()
        if key not in ("step", "epoch")
    ]
    yield TableBlock(name_of(stage), ["", "first", "last"], rows)


def _data(findings: Findings) -> Iterator[Block]:
    tables = {str(each.round): each.pairs for each in findings.rounds} or {"": findings.table}
    told = {number: table for number, table in tables.items() if table and table["domains"]}  # else the rows were given
    if not told:
        return
    yield Heading("Data")
    of_round = ["round"] if findings.rounds else []
    names = ("prompts", "total", "sft", "preference")
    rows: list[Sequence[Text]] = [
        [*[number] * len(of_round), name or "–", *(Cell(f"{row[key]:,}", row[key]) for key in names), _share(row)]
        for number, table in told.items()
        for name, row in {**table["domains"], "all": table["all"]}.items()
    ]
    heads = [*of_round, "domain", "prompts", "rows", "SFT", "preference", "SFT share"]
    yield TableBlock("Rows by domain", heads, rows)
    losses: list[Sequence[Text]] = [
        [*[round_number] * len(of_round), why, Cell(f"{number:,}", number)]
        for round_number, table in told.items()
        for why, number in [*table["all"]["dropped"].items(), *table["all"]["answers"].items()]
    ]
    if losses:
        yield TableBlock("Losses", [*of_round, "what", "number"], losses)


def _share(row: Mapping[str, Any]) -> Cell:
    return Cell(row["share"], None)


def _examples(findings: Findings, comparison: HeldOutComparison) -> Iterator[Block]:
    recipe = findings.recipe
    yield Heading("Answers side by side")
    yield f"Drawn by chance with the seed {recipe.seed}; nobody chose them."
    for number, prompt in enumerate(comparison.examples(recipe.report.examples, recipe.seed), 1):
        yield Heading(f"Prompt {number}", 3)
        yield Verbatim("asked", _conversation(prompt))
        if prompt.reference is not None:
            yield Verbatim("right answer", prompt.reference)
        for model, answers in comparison.answers.items():
            scores = [
                f"{scorer} {value:.4g}"
                for scorer in comparison.scorers
                if (value := answers.metrics[scorer].get(prompt.id)) is not None
            ]
            label = ": ".join([model_name(model), *([", ".join(scores)] if scores else [])])
            yield Verbatim(label, shortened(answers.texts.get(prompt.id, ""), SHOWN))


def _conversation(prompt: Prompt) -> str:
    if len(prompt.messages) == 1:
        return shortened(prompt.messages[0]["content"], SHOWN)
    return "\n\n".join(f"{message['role']}: {shortened(message['content'], SHOWN)}" for message in prompt.messages)


def markdown(findings: Findings) -> str:
    """Return the report as Markdown; it refers to the pictures as files in its folder."""
    return "\n\n".join([f"# {escaped(title(findings))}", *map(_as_markdown, blocks(findings))]) + "\n"


def _as_markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, str):
        return block
    if isinstance(block, Bullets):
        return "\n".join(f"- {escaped(item)}" for item in block.items)
    if isinstance(block, Verbatim):
        return f"**{escaped(block.label)}**\n\n{lines_of(block.text, 'text')}"
    if isinstance(block, Picture):
        return f"![{block.title}]({block.name})"
    rule = ["---", *("---:" if _is_figure(block, column) else "---" for column in range(1, len(block.heads)))]
    rows = [[cell.text if isinstance(cell, Cell) else cell for cell in row] for row in block.rows]
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in (block.heads, rule, *rows))


def _is_figure(table: TableBlock, column: int) -> bool:
    return all(isinstance(row[column], Cell) for row in table.rows)


def page(findings: Findings) -> str:
    """Return the report as one HTML page without external files."""
    heading = element("h1", title(findings))
    return html.document(title(findings), [heading, *map(_as_html, blocks(findings))])


def _as_html(block: Block) -> Markup:
    if isinstance(block, Heading):
        return element(f"h{block.level}", block.text)
    if isinstance(block, str):
        return element("p", block, class_="soft")
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
