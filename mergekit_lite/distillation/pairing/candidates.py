"""Answers with their scores, read from the ledgers in two passes.

60,000 prompts with 50 answers each are some 6 GB of text, of which a few answers a prompt become rows. So the first
pass keeps numbers and a digest of each text, and the second reads only the texts that rules have chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import pstdev
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from mergekit_lite.answers.rows import ANSWER, VERDICT, Key, Prompt, read_rows
from mergekit_lite.answers.thoughts import as_trained, is_cut, parts_of
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.counts import CUT, VETOED, AnswerCounts
from mergekit_lite.distillation.recipe.choosing import Combined
from mergekit_lite.distillation.recipe.schema import Pairing, RecipeScorer, RecipeSource
from mergekit_lite.distillation.rules import Candidate

UNLIKE = 5  # ratio of standard deviations of scores that rank together


@dataclass
class Inventory:
    """What reading the ledgers has shown, as messages and counts."""

    missing: list[str] = field(default_factory=list)  # files that don't exist yet
    absent: list[str] = field(default_factory=list)  # rows that existing files don't have yet
    problems: list[str] = field(default_factory=list)  # malformed rows, with file and line
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # answers by domain, there by what became of them
    sources: dict[str, AnswerCounts] = field(default_factory=dict)  # by source
    combined: dict[str, list[float]] = field(default_factory=dict)  # scores that rank together, by scorer

    def count(self, domain: str, what: str, number: int = 1) -> None:
        """Count answers to prompts of a domain."""
        self.counts.setdefault(domain, Counter())[what] += number


def candidates(
    folder: Folder,
    source: RecipeSource,
    prompts: Mapping[str, Prompt],
    pairings: Mapping[str, Pairing],
    inventory: Inventory,
    own: bool = False,
) -> dict[str, list[Candidate]]:
    """Return one source's usable answers to each prompt, ordered by index: not blank, with all scores they need.

    Answers to other prompts are ignored. ``prompts`` are by id, ``pairings`` by domain. The inventory takes what is
    missing or lost; ``own`` says that the source is the target itself.
    """
    wanted = {prompt.id for prompt in prompts.values() if source.answers_to(prompt.domain)}
    if not wanted:
        return {}
    path = folder.samples(source.name)
    if not path.exists():
        inventory.missing.append(f"no answers of {source.name}: {path}")
        return {}
    names = {name for prompt in wanted for name in pairings[prompts[prompt].domain].scorers}
    scores = {name: verdicts(folder, name, source.name, inventory) for name in sorted(names)}
    usable: dict[str, list[Candidate]] = {}
    answers: Counter[str] = Counter()  # by prompt
    losses: Counter[str] = Counter()  # by reason
    for row in (line.row for line in read_rows(path, inventory.problems, ANSWER)):
        if row["prompt"] not in wanted:
            continue
        prompt = prompts[row["prompt"]]
        answers[prompt.id] += 1
        inventory.count(prompt.domain, "answers")
        inventory.sources.setdefault(source.name, AnswerCounts()).add(row)
        candidate = _candidate(row, source, own, pairings[prompt.domain], scores)
        if isinstance(candidate, str):
            losses[candidate] += 1
            inventory.count(prompt.domain, candidate)
        else:
            usable.setdefault(prompt.id, []).append(candidate)
            if not candidate.whole:
                inventory.count(prompt.domain, CUT)
            if candidate.vetoed:
                inventory.count(prompt.domain, VETOED)
            _keep_combined(pairings[prompt.domain], Key(prompt.id, candidate.index), scores, inventory)
    lacking = {prompt: max(source.answers_to(prompts[prompt].domain) - answers[prompt], 0) for prompt in wanted}
    for prompt_id, number in lacking.items():
        inventory.count(prompts[prompt_id].domain, "not there", number)
    if (absent := sum(lacking.values())) and not source.answers:  # given ones are all there are
        inventory.absent.append(f"{absent:,} answers of {source.name}: {path} has {answers.total():,}")
    for name in scores:
        unjudged = losses[_unjudged(name)]
        if unjudged and folder.scores(name, source.name).exists():
            inventory.absent.append(f"{unjudged:,} scores of {source.name}'s answers by {name}")
    return {prompt: sorted(each, key=lambda answer: answer.index) for prompt, each in usable.items()}


def _candidate(
    row: Mapping[str, Any],
    source: RecipeSource,
    own: bool,
    pairing: Pairing,
    scores: Mapping[str, Mapping[Key, float | None]],
) -> Candidate | str:
    key, parts, text = Key(row["prompt"], row["index"]), parts_of(row), as_trained(row, source.thoughts)
    if not text.strip():
        return "blank"
    if source.thoughts == "only" and not parts.has_thoughts:
        return "without thoughts"
    given: dict[str, float] = {}
    for name in pairing.scorers:
        if key not in scores[name]:
            return _unjudged(name)
        value = scores[name][key]
        if value is None:
            return f"no score by {name}"
        given[name] = value
    score = pairing.score_of(given) or 0.0  # as_is may do without
    correct = given[pairing.correct] >= 1 if pairing.correct in given else None
    vetoed = any(given[name] < least for name, least in pairing.veto.items())
    digest = xxh3_64_intdigest(text.encode())
    whole = pairing.cut == "keep" or not is_cut(row)
    return Candidate(source.name, key.number, score, correct, len(parts.answer), digest, own, whole, vetoed)


def _keep_combined(
    pairing: Pairing, key: Key, scores: Mapping[str, Mapping[Key, float | None]], inventory: Inventory
) -> None:
    """Keep the scores that rank an answer together, to compare the scorers' scales."""
    for name in pairing.ranking if isinstance(pairing.score, Combined) else ():
        value = scores.get(name, {}).get(key)
        if value is not None:
            inventory.combined.setdefault(name, []).append(value)


def unlike_scales(inventory: Inventory) -> Iterator[str]:
    """Yield a warning where scores that rank together spread so unlike that one scorer decides nearly alone."""
    spreads = {name: pstdev(scores) for name, scores in inventory.combined.items()}
    told = {name: spread for name, spread in spreads.items() if spread > 0}
    if told and max(told.values()) > UNLIKE * min(told.values()):
        listed = ", ".join(f"{name} by {spread:.3g}" for name, spread in told.items())
        yield (
            f"scores that rank together spread unlike (standard deviations: {listed}), and are combined as they are: "
            "bring them to one scale, or give one of them a `veto` instead"
        )


def _unjudged(scorer: str) -> str:
    return f"no verdict of {scorer}"


def verdicts(folder: Folder, scorer: str, source: str, inventory: Inventory) -> dict[Key, float | None]:
    """Return one scorer's scores of the answers of one source; None for an answer that it can't judge."""
    path = folder.scores(scorer, source)
    if not path.exists():
        inventory.missing.append(f"no scores of {source}'s answers by {scorer}: {path}")
        return {}
    rows = (line.row for line in read_rows(path, inventory.problems, VERDICT))
    return {Key(row["prompt"], row["index"]): row["score"] for row in rows}


class Text(NamedTuple):
    """An answer as it is trained."""

    text: str  # with its thoughts, where they are kept
    cut: bool


def texts(folder: Folder, source: RecipeSource, wanted: Collection[Key]) -> dict[Key, Text]:
    """Return the texts of some answers of one source."""
    rows = (line.row for line in read_rows(folder.samples(source.name), [], ANSWER))
    keyed = ((Key(row["prompt"], row["index"]), row) for row in rows)
    return {key: Text(as_trained(row, source.thoughts), is_cut(row)) for key, row in keyed if key in wanted}


def all_scores(
    folder: Folder, scorers: Collection[RecipeScorer], source: str, wanted: Collection[Key]
) -> dict[Key, dict[str, float | None]]:
    """Return the scores that every scorer gave to some answers of one source, by answer and scorer."""
    scores: dict[Key, dict[str, float | None]] = {key: {} for key in wanted}
    for scorer in scorers:
        path = folder.scores(scorer.name, source)
        if path.exists():
            for line in read_rows(path, [], VERDICT):
                key = Key(line.row["prompt"], line.row["index"])
                if key in scores:
                    scores[key][scorer.name] = line.row["score"]
    return scores
