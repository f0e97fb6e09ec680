"""Answers with their scores, read from the ledgers in two passes.

60,000 prompts with 50 answers each are some 6 GB of text, of which a few answers a prompt become rows. So the first
pass keeps numbers and a digest of each text, and the second reads only the texts that rules have chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from mergekit_lite.answers.rows import Key, Prompt, read_rows
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import Pairing, RecipeScorer, Source
from mergekit_lite.distillation.rules import Candidate


class Verdict(NamedTuple):
    """A scorer's verdict on an answer: a score, or None and the reason."""

    value: float | None
    why: str


@dataclass
class Inventory:
    """What reading the ledgers has shown.

    Attributes:
        missing: files that don't exist yet, as messages.
        absent: rows that existing files don't have yet, as messages.
        problems: malformed rows, with file and line.
        counts: numbers of answers by domain, and there by what became of them.
    """

    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, domain: str, what: str, number: int = 1) -> None:
        """Count answers to prompts of a domain."""
        self.counts.setdefault(domain, Counter())[what] += number


def candidates(
    folder: Folder,
    source: Source,
    prompts: Mapping[str, Prompt],
    pairings: Mapping[str, Pairing],
    inventory: Inventory,
    own: bool = False,
) -> dict[str, list[Candidate]]:
    """Return one source's usable answers to each prompt, ordered by index: not blank, with all scores they need.

    Args:
        folder: of the recipe.
        source: the source.
        prompts: by id; answers to others are ignored.
        pairings: by domain.
        inventory: takes what is missing or lost.
        own: whether the source is the target itself.
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
    for row in _rows(path, ("prompt", "index", "text"), inventory.problems):
        if row["prompt"] not in wanted:
            continue
        prompt = prompts[row["prompt"]]
        answers[prompt.id] += 1
        inventory.count(prompt.domain, "answers")
        candidate = _candidate(row, source.name, own, pairings[prompt.domain], scores)
        if isinstance(candidate, str):
            losses[candidate] += 1
            inventory.count(prompt.domain, candidate)
        else:
            usable.setdefault(prompt.id, []).append(candidate)
    absent = 0
    for prompt_id in wanted:
        domain = prompts[prompt_id].domain
        lacking = max(source.answers_to(domain) - answers[prompt_id], 0)
        inventory.count(domain, "not there", lacking)
        absent += lacking
    if absent:
        inventory.absent.append(f"{absent:,} answers of {source.name}: {path} has {answers.total():,}")
    for name in scores:
        unjudged = losses[_unjudged(name)]
        if unjudged and folder.scores(name, source.name).exists():
            inventory.absent.append(f"{unjudged:,} scores of {source.name}'s answers by {name}")
    return {prompt: sorted(each, key=lambda answer: answer.index) for prompt, each in usable.items()}


def _candidate(
    row: Mapping[str, Any],
    source: str,
    own: bool,
    pairing: Pairing,
    scores: Mapping[str, Mapping[Key, Verdict]],
) -> Candidate | str:
    """Return an answer with its scores, or the reason why it can't be used."""
    text, key = row["text"], Key(row["prompt"], row["index"])
    if not text.strip():
        return "blank"
    score, correct = 0.0, None
    for name in pairing.scorers:
        verdict = scores[name].get(key)
        if verdict is None:
            return _unjudged(name)
        if verdict.value is None:
            return f"no score by {name}"
        if name == pairing.score:
            score = verdict.value
        if name == pairing.correct:
            correct = verdict.value >= 1
    return Candidate(source, key.number, score, correct, len(text), xxh3_64_intdigest(text.encode()), own)


def _unjudged(scorer: str) -> str:
    return f"no verdict of {scorer}"


def verdicts(folder: Folder, scorer: str, source: str, inventory: Inventory) -> dict[Key, Verdict]:
    """Return one scorer's verdicts on the answers of one source."""
    path = folder.scores(scorer, source)
    if not path.exists():
        inventory.missing.append(f"no scores of {source}'s answers by {scorer}: {path}")
        return {}
    rows = _rows(path, ("prompt", "index", "score"), inventory.problems)
    return {Key(row["prompt"], row["index"]): Verdict(row["score"], row.get("why", "")) for row in rows}


def texts(folder: Folder, source: str, wanted: Collection[Key]) -> dict[Key, str]:
    """Return the texts of some answers of one source."""
    rows = _rows(folder.samples(source), ("prompt", "index", "text"), [])
    keyed = ((Key(row["prompt"], row["index"]), row["text"]) for row in rows)
    return {key: text for key, text in keyed if key in wanted}


def all_scores(
    folder: Folder, scorers: Collection[RecipeScorer], source: str, wanted: Collection[Key]
) -> dict[Key, dict[str, float | None]]:
    """Return the scores that every scorer gave to some answers of one source, by answer and scorer."""
    scores: dict[Key, dict[str, float | None]] = {key: {} for key in wanted}
    for scorer in scorers:
        path = folder.scores(scorer.name, source)
        if path.exists():
            for row in _rows(path, ("prompt", "index", "score"), []):
                key = Key(row["prompt"], row["index"])
                if key in scores:
                    scores[key][scorer.name] = row["score"]
    return scores


def _rows(path: Path, keys: Collection[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows that have all keys; the others become problems."""
    for line in read_rows(path, problems):
        absent = [key for key in keys if key not in line.row]
        if absent:
            problems.append(f"{path}:{line.number}: no {', '.join(absent)}")
        else:
            yield line.row
