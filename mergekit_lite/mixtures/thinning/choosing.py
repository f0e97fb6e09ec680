"""The choice of experts: which ones a smaller mixture keeps, or which ones it merges, and by what.

    prune by usage      keeps those that are chosen most often
    prune by weights    drops, of the two that are most alike, the one that is more like the others, again and again
    prune by router     the same, by the experts' rows in the router
    merge by weights    makes one of the two groups that are most alike, again and again
    merge by router     the same, by the experts' rows in the router
    merge by usage      keeps those chosen most often apart; each other one joins the one whose row in the router is
                        most like its own

How alike: cosines (``similarity``). How often chosen: what the model's routers do on prompts (``usage``). Where the
router chooses among groups of experts (DeepSeek's ``n_group``), the same is done in each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.optional_tensors import layers_promised
from mergekit_lite.deferred import np
from mergekit_lite.errors import PlanError, UsageError, nearest, shortened
from mergekit_lite.mixtures.layers import ExpertLayer, expert_layers
from mergekit_lite.mixtures.remade import opened_mixture
from mergekit_lite.mixtures.thinning import grouping
from mergekit_lite.mixtures.thinning.fewer import Groups, Weights, routing_groups, unfit
from mergekit_lite.mixtures.thinning.grouping import Group
from mergekit_lite.mixtures.thinning.similarity import similarities
from mergekit_lite.mixtures.thinning.usage import Usage, described
from mergekit_lite.pages import markdown

if TYPE_CHECKING:
    from mergekit_lite.mixtures.thinning.grouping import Similarities

By = Literal["usage", "weights", "router"]
BY: tuple[By, ...] = ("usage", "weights", "router")
Progress = Callable[[int, int], None]
ALIKE = {"weights": "cosine of all their weights", "router": "cosine of their rows in the router"}


@dataclass(frozen=True)
class Choice:
    """What was chosen in each layer, and what speaks for it.

    Attributes:
        groups: for each layer the experts that go into each expert of the output.
        weights: what each expert counts in a mean, where that isn't the same.
        how: the criterion, in words.
        columns: the headings of a table with a row for each layer.
        rows: that table.
    """

    groups: Groups
    weights: Weights | None
    how: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def card(self) -> tuple[str, ...]:
        """The criterion and the table, as paragraphs of a card."""
        return f"Experts: {markdown.text(self.how)}.", markdown.table(self.columns, self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the choice as plain data."""
        return {
            "chosen": self.how,
            "experts": {str(layer): [list(group) for group in groups] for layer, groups in self.groups.items()},
            "layers": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
        }


def checked(model: str, number: int, by: By, has_prompts: bool, method: str) -> tuple[Checkpoint, list[ExpertLayer]]:
    """Return a mixture and its layers, of which ``number`` experts are to be left in each.

    Raises:
        UsageError: there is no such criterion, or it needs prompts and there are none.
        CheckpointError: the model can't be opened, or is no mixture.
        PlanError: it can't have that many experts; every problem is named.
    """
    if by not in BY:
        raise UsageError(f"{method}: by should be one of {', '.join(BY)}, got {by!r}.{nearest(by, BY)}")
    if by == "usage" and not has_prompts:
        raise UsageError(f"{method} --by usage counts on texts which experts are chosen: name some, --prompts FILE.")
    mixture = opened_mixture(model)
    layers = expert_layers(mixture)
    last = layers_promised(mixture.config)
    if by == "usage" and last and (beyond := [layer.number for layer in layers if layer.number >= last]):
        raise UsageError(
            f"{model}: layer {beyond[0]} predicts tokens further ahead, and transformers doesn't run it, so how its "
            "experts are used can't be counted. Choose by weights or router."
        )
    if problems := [*unfit(mixture, layers, number)]:
        raise PlanError(problems)
    return mixture, layers


def chosen_to_keep(
    mixture: Checkpoint,
    layers: Sequence[ExpertLayer],
    number: int,
    by: By,
    usage: Usage | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose the experts that are kept; errors as of ``similarities``."""
    counts = _counts(layers, usage)
    alike = similarities(layers, by, progress) if by != "usage" else None
    teams = routing_groups(mixture)

    def kept_of(at: int, team: slice) -> list[Group]:
        if alike is None:
            return [(expert,) for expert in grouping.most_used(counts[at][team], number // teams)]
        return [(expert,) for expert in grouping.least_alike(alike[at][team, team], number // teams)]

    groups, rows = _in_teams(layers, teams, kept_of), []
    for at, layer in enumerate(layers):
        kept = [expert for (expert,) in groups[layer.number]]
        dropped = sorted({*range(len(layer.experts))} - {*kept})
        row = [str(layer.number), _short(dropped)]
        if alike is not None:
            row.append(f"{np.mean([alike[at][expert, kept].max() for expert in dropped]):.3f}")
        if usage is not None:
            row.append(f"{_share(counts[at], kept):.1%}")
        rows.append(tuple(row))
    how = (
        f"the {number} chosen most often are kept"
        if by == "usage"
        else f"of the two that are most alike ({ALIKE[by]}) the one that is more like the others is dropped, until "
        f"{number} are left"
    )
    columns = ["layer", "dropped", *["most like a kept one"] * (alike is not None), *["choices kept"] * bool(usage)]
    return Choice(groups, None, how + _counted_on(usage), tuple(columns), tuple(rows))


def chosen_to_merge(
    mixture: Checkpoint,
    layers: Sequence[ExpertLayer],
    number: int,
    by: By,
    usage: Usage | None = None,
    progress: Progress | None = None,
) -> Choice:
    """Choose the groups that are merged; errors as of ``similarities``."""
    counts = _counts(layers, usage)
    alike = similarities(layers, "router" if by == "usage" else by, progress)
    teams = routing_groups(mixture)

    def merged_of(at: int, team: slice) -> list[Group]:
        few, part = number // teams, alike[at][team, team]
        return grouping.around_most_used(counts[at][team], part, few) if by == "usage" else grouping.clusters(part, few)

    groups, rows = _in_teams(layers, teams, merged_of), []
    for at, layer in enumerate(layers):
        merged = [group for group in groups[layer.number] if len(group) > 1]
        shown = "; ".join(" + ".join(map(str, group)) for group in merged)
        rows.append((str(layer.number), shortened(shown, 80), f"{_within(alike[at], merged):.3f}"))
    how = (
        f"each but the {number} chosen most often joins the one of these whose row in the router is most like its own"
        if by == "usage"
        else f"the two groups that are most alike ({ALIKE[by]}, mean over all pairs) become one, until {number} "
        "are left"
    )
    means = "weighted by how often each was chosen, plus 1" if usage is not None else "of equal weights"
    weights = {layer.number: [float(count + 1) for count in counts[at]] for at, layer in enumerate(layers)}
    return Choice(
        groups,
        weights if usage is not None else None,
        f"{how}; groups are merged to means {means}{_counted_on(usage)}",
        ("layer", "merged", "alike within groups"),
        tuple(rows),
    )


def _counts(layers: Sequence[ExpertLayer], usage: Usage | None) -> list[Sequence[int]]:
    """Return the counts of each layer; zeros for one that didn't run, as layers that predict tokens further ahead."""
    counts = usage.counts if usage is not None else {}
    return [counts.get(layer.number, (0,) * len(layer.experts)) for layer in layers]


def _in_teams(
    layers: Sequence[ExpertLayer], teams: int, choose: Callable[[int, slice], Sequence[Group]]
) -> dict[int, list[Group]]:
    """Return the groups of each layer: what is chosen of each team, among which its router chooses.

    ``choose`` is given the layer's place and the team's experts, and returns groups numbered from the team's first.
    """
    groups: dict[int, list[Group]] = {layer.number: [] for layer in layers}
    for at, layer in enumerate(layers):
        size = len(layer.experts) // teams
        for begin in range(0, len(layer.experts), size):
            found = choose(at, slice(begin, begin + size))
            groups[layer.number] += [tuple(begin + expert for expert in group) for group in found]
    return groups


def _share(counts: Sequence[int], kept: Sequence[int]) -> float:
    return sum(counts[expert] for expert in kept) / max(1, sum(counts))


def _within(alike: Similarities, groups: Sequence[Group]) -> float:
    """Return the mean similarity of experts that go into one."""
    pairs = [float(alike[one, other]) for group in groups for one in group for other in group if one < other]
    return sum(pairs) / len(pairs)


def _counted_on(usage: Usage | None) -> str:
    return f" (counted on {described(usage)})" if usage is not None else ""


def _short(experts: Sequence[int]) -> str:
    return shortened(", ".join(map(str, experts)), 80)
