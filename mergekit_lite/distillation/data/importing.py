"""Data in the place of a stage: answers for ``sample``, their scores for ``score``, rows for ``pair``.

The stages after it read the same files as ever. They are written anew each time, so that they are what the data are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.prompts import LoadedPrompts, as_row
from mergekit_lite.answers.rows import ANSWER, Key, Prompt, write_rows
from mergekit_lite.answers.thoughts import parted
from mergekit_lite.distillation.data.examples import Example, Given
from mergekit_lite.distillation.data.given import GivenAnswer, Left, examples, given_answers, keys_given
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.counts import AnswerCounts, counts_by_role
from mergekit_lite.distillation.recipe.schema import GivenRows, RecipeSource
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rules import DIGITS
from mergekit_lite.distillation.score import digest_of
from mergekit_lite.distillation.settings import hold_settings
from mergekit_lite.errors import UsageError, counted, listing

CHUNK = 1000  # answers that are written together
EQUAL = "chosen and rejected are the same text"


def import_answers(root: Folder, source: RecipeSource, prompts: Sequence[Prompt], reporter: Reporter) -> int:
    """Write a source's answers to ``samples/``, and the scores that the data have to ``scores/``; return how many.

    Raises:
        UsageError: the data can't be read, have no answer to any prompt, or would replace answers of a model.
    """
    left, places = Left(), {prompt.id: place for place, prompt in enumerate(prompts)}
    path = root.samples(source.name)
    keys = sorted(keys_given(source, prompts), key=lambda key: (places[key.prompt], key.number))
    found = given_answers(source, prompts, left)
    if not keys:
        list(found)  # to see what is wrong
        why = [*left.problems, *(f"{number:,} answers {why}" for why, number in left.counts.items())]
        raise UsageError(listing(f"The data have no answer of {source.name}", why or ["no rows"]))
    files = (path, path.with_name(f"{source.name}.partial.jsonl"))
    _hold_given(path, exist=any(file.exists() for file in files))
    for file in files:
        file.unlink(missing_ok=True)
    ledger = Ledger(path, keys, lambda row: Key(row["prompt"], row["index"]), ANSWER)
    scores: dict[str, list[dict[str, Any]]] = {}
    while chunk := list(islice(found, CHUNK)):
        ledger.append(given.answer.as_row() for given in chunk)
        for given in chunk:
            if given.scorer is not None and given.score is not None:
                scores.setdefault(given.scorer, []).append(_verdict(prompts[places[given.answer.prompt]], given))
    left.tell(source.name, reporter)
    ledger.finish()
    for scorer, verdicts in scores.items():
        write_rows(root.scores(scorer, source.name), verdicts)
    return len(keys)


def _hold_given(path: Path, exist: bool) -> None:
    """Note that the answers are given. Raises UsageError where there are others: what a model said isn't replaced."""
    settings, refusal = path.with_suffix(".json"), f"{path} has answers that don't come from the recipe's data"
    advice = f"Give the source another name; or, to be without them, delete {path.stem}.* there."
    if exist and not settings.exists():
        raise UsageError(f"{refusal}.\n{advice}")
    hold_settings(settings, {"given": True}, "answers", refusal if exist else None, advice)


def _verdict(prompt: Prompt, given: GivenAnswer) -> dict[str, Any]:
    answer = given.answer
    judged = digest_of(prompt, parted(answer.text).answer)
    return {"prompt": answer.prompt, "index": answer.index, "score": given.score, "why": "", "judged": judged}


def import_rows(root: Folder, rows: GivenRows, reporter: Reporter, own: bool = False) -> dict[str, AnswerCounts]:
    """Write the rows that are given to ``pairs/``, and their prompts to ``prompts.jsonl``; return counts by role.

    With ``own``, preference rows without the model's own answer are left out.

    Raises:
        UsageError: data can't be read, or have no row to train on.
    """
    loaded, written = LoadedPrompts(), {}
    for name, origins in (("sft", rows.sft), ("preference", rows.preference)):
        if not origins:
            root.pairs(name).unlink(missing_ok=True)  # left by another recipe
            continue
        left = Left()
        found = list(_rows(name, origins, left, loaded, own))
        left.tell(name, reporter)
        if not found:
            why = [f"{number:,} rows: {why}" for why, number in left.counts.items()]
            raise UsageError(listing(f"The data have no row for {name}", [*left.problems, *why] or ["no rows"]))
        written[name] = found
    for name, found in written.items():
        write_rows(root.pairs(name), found)
        reporter.line(f"{name}: {counted(len(found), 'row')} in {root.pairs(name)}")
    write_rows(root.prompts, map(as_row, loaded.prompts))
    return counts_by_role(written)


def _rows(name: str, origins: Iterable[Data], left: Left, loaded: LoadedPrompts, own: bool) -> Iterator[dict[str, Any]]:
    for origin in origins:
        for example, place in examples(origin, left.problems):
            try:
                row = _sft_row(example, place) if name == "sft" else _preference_row(example, place, own)
            except ValueError as error:
                left.problems.append(f"{place}: {error}")
                continue
            if isinstance(row, str):
                left.counts[row] += 1
                continue
            loaded.add(example.prompt, place)
            yield row


def _sft_row(example: Example, place: str) -> dict[str, Any] | str:
    """Return the row of the answer, or of the first chosen one; or why there is none."""
    if not example.chosen and len(example.answers) != 1:
        raise ValueError(
            f"{len(example.answers)} answers, expected one: give them as `answers` of a source, and a rule chooses"
        )
    (answer, *_) = (*example.chosen, *example.answers)
    if not answer.text.strip():
        return "blank"
    score: dict[str, Any] = {"score": answer.score, "scores": {}}
    rest = {"source": answer.model or "given", "index": 0, **score, "rule": "given", "why": place}
    judgment = {"judgment": example.judgment} if example.judgment.strip() else {}
    return {**_question(example), "response": answer.text, **_cut(answer), **rest, **judgment}


def _preference_row(example: Example, place: str, needs_own: bool) -> dict[str, Any] | str:
    """Return the row, or why there is none. Of several chosen answers the last is the target's, as WRPO has them."""
    if not example.chosen:
        raise ValueError("no 'chosen' and 'rejected': scored answers are given as a source's `answers`, and rules pair")
    if needs_own and example.own is None:
        raise ValueError("no 'own', the model's own answer, which the objective needs")
    if any(not given.text.strip() for given in example.all):
        return "blank"
    if {given.text for given in example.chosen} & {given.text for given in example.rejected}:
        return EQUAL
    own = "target" if len(example.chosen) > 1 else "source"
    roles = [*["source"] * (len(example.chosen) - 1), own]
    best, worst = example.chosen[-1].score, example.rejected[0].score
    beside = {} if example.own is None else {"own": {"text": example.own.text, **_cut(example.own)}}
    return {
        **_question(example),
        "chosen": [_response(given, role) for given, role in zip(example.chosen, roles, strict=True)],
        "rejected": [_response(given, own) for given in example.rejected],
        "gap": None if best is None or worst is None else round(best - worst, DIGITS),
        "rule": "given",
        "why": place,
        **beside,
    }


def _response(given: Given, role: str) -> dict[str, Any]:
    rest = {"source": given.model or "given", "index": 0, "score": given.score, "scores": {}}
    return {"text": given.text, **_cut(given), **rest, "role": given.role or role}


def _cut(given: Given) -> dict[str, bool]:
    return {"cut": True} if given.cut else {}


def _question(example: Example) -> dict[str, Any]:
    prompt = example.prompt
    return {"prompt": prompt.id, "domain": prompt.domain, "messages": list(prompt.messages)}
