"""Answers with their scores, read from the ledgers twice: first what rules look at, then the texts they chose.

60,000 prompts with 50 answers each are some 6 GB of text, of which a few answers a prompt become rows. So the first
reading keeps numbers, and a digest of each text.
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
from mergekit_lite.distillation.recipe import Pairs, Scorer, Source
from mergekit_lite.distillation.rules import Candidate


class Verdict(NamedTuple):
    """What a scorer said of an answer."""

    value: float | None
    why: str


@dataclass
class Reading:
    """What was found on the way.

    Attributes:
        missing: files that are not there yet, in words.
        absent: rows that are not in files that are there.
        problems: malformed rows, with file and line.
        counts: of answers, by domain and what became of them.
    """

    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, domain: str, what: str) -> None:
        """One more."""
        self.counts.setdefault(domain, Counter())[what] += 1


def candidates(
    folder: Folder,
    source: Source,
    prompts: Mapping[str, Prompt],
    protocols: Mapping[str, Pairs],
    reading: Reading,
    own: bool = False,
) -> dict[str, list[Candidate]]:
    """The answers of one source to each prompt that can be used, by index: not blank, with a score.

    Args:
        folder: of the recipe.
        source: whose answers.
        prompts: by id; answers to others are passed over.
        protocols: by domain.
        reading: takes what is missing or lost.
        own: the source is the target itself.
    """
    wanted = {prompt.id for prompt in prompts.values() if source.answers_to(prompt.domain)}
    if not wanted:
        return {}
    path = folder.samples(source.name)
    if not path.exists():
        reading.missing.append(f"no answers of {source.name}: {path}")
        return {}
    names = {name for one in wanted for name in protocols[prompts[one].domain].scorers}
    scores = {name: verdicts(folder, name, source.name, reading) for name in sorted(names)}
    found: dict[str, list[Candidate]] = {}
    seen: Counter[str] = Counter()
    unjudged: Counter[str] = Counter()
    for row in _rows(path, ("prompt", "index", "text"), reading.problems):
        if row["prompt"] not in wanted:
            continue
        prompt = prompts[row["prompt"]]
        seen[prompt.id] += 1
        candidate = _candidate(row, source.name, own, prompt, protocols[prompt.domain], scores, unjudged, reading)
        if candidate is not None:
            found.setdefault(prompt.id, []).append(candidate)
    absent = 0
    for prompt in (prompts[one] for one in wanted):
        lacking = max(source.answers_to(prompt.domain) - seen[prompt.id], 0)
        reading.counts.setdefault(prompt.domain, Counter())["not there"] += lacking
        absent += lacking
    if absent:
        reading.absent.append(f"{absent:,} answers of {source.name}: {path} has {sum(seen.values()):,}")
    for name, count in unjudged.items():
        if folder.scores(name, source.name).exists():
            reading.absent.append(f"{count:,} scores of {source.name}'s answers by {name}")
    return {prompt: sorted(answers, key=lambda one: one.index) for prompt, answers in found.items()}


def _candidate(
    row: Mapping[str, Any],
    source: str,
    own: bool,
    prompt: Prompt,
    protocol: Pairs,
    scores: Mapping[str, Mapping[Key, Verdict]],
    unjudged: Counter[str],
    reading: Reading,
) -> Candidate | None:
    """An answer, where it can be used."""
    text, key = row["text"], Key(prompt.id, row["index"])
    reading.count(prompt.domain, "answers")
    if not text.strip():
        reading.count(prompt.domain, "blank")
        return None
    score, correct = 0.0, None
    for name in protocol.scorers:
        verdict = scores[name].get(key)
        if verdict is None:
            unjudged[name] += 1
            reading.count(prompt.domain, f"no verdict of {name}")
            return None
        if verdict.value is None:
            reading.count(prompt.domain, f"no score by {name}")
            return None
        if name == protocol.score:
            score = verdict.value
        if name == protocol.correct:
            correct = verdict.value >= 1
    return Candidate(source, key.number, score, correct, len(text), xxh3_64_intdigest(text.encode()), own)


def verdicts(folder: Folder, scorer: str, source: str, reading: Reading) -> dict[Key, Verdict]:
    """All of one scorer on one source."""
    path = folder.scores(scorer, source)
    if not path.exists():
        reading.missing.append(f"no scores of {source}'s answers by {scorer}: {path}")
        return {}
    rows = _rows(path, ("prompt", "index", "score"), reading.problems)
    return {Key(row["prompt"], row["index"]): Verdict(row["score"], row.get("why", "")) for row in rows}


def texts(folder: Folder, source: str, wanted: Collection[Key]) -> dict[Key, str]:
    """The texts of the wanted answers of one source."""
    rows = _rows(folder.samples(source), ("prompt", "index", "text"), [])
    keyed = ((Key(row["prompt"], row["index"]), row["text"]) for row in rows)
    return {key: text for key, text in keyed if key in wanted}


def all_scores(
    folder: Folder, scorers: Collection[Scorer], source: str, wanted: Collection[Key]
) -> dict[Key, dict[str, float | None]]:
    """What every scorer said of the wanted answers of one source."""
    found: dict[Key, dict[str, float | None]] = {key: {} for key in wanted}
    for scorer in scorers:
        path = folder.scores(scorer.name, source)
        if path.exists():
            for row in _rows(path, ("prompt", "index", "score"), []):
                key = Key(row["prompt"], row["index"])
                if key in found:
                    found[key][scorer.name] = row["score"]
    return found


def _rows(path: Path, keys: Collection[str], problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows that have all keys."""
    for line in read_rows(path, problems):
        absent = [key for key in keys if key not in line.row]
        if absent:
            problems.append(f"{path}:{line.number}: no {', '.join(absent)}")
        else:
            yield line.row
