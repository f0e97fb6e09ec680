"""From settings to a scorer, whose module is imported when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

from pydantic import ValidationError

from mergekit_lite.answers import scorers
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.scoring.scorer import SCORERS, Judged, Score, Scorer, ScorerKind, ScorerSettings, Wrong
from mergekit_lite.errors import UsageError, listing, nearest

ALWAYS = ("name", "kind", "options")


def kind_of(name: str) -> ScorerKind:
    """Return the kind of scorer that a module of ``scorers`` registers. Its name has to be one of ``names()``."""
    import_module(f"{scorers.__name__}.{name}")
    return SCORERS[name]


def wrong_settings(settings: ScorerSettings) -> Iterator[Wrong]:
    """Yield every mistake that can be seen without opening anything."""
    kind = kind_of(settings.kind)
    for key in kind.needs:
        if not getattr(settings, key):
            why = ScorerSettings.model_fields[key].description
            yield Wrong((), f"a scorer of the kind {settings.kind!r} needs {key!r}{f' ({why})' if why else ''}")
    for key in ScorerSettings.model_fields:
        if key in settings.model_fields_set and key not in (*ALWAYS, *kind.needs, *kind.takes):
            yield Wrong((key,), f"{key!r} has no effect on a scorer of the kind {settings.kind!r}")
    yield from kind.check(settings)
    try:
        kind.options.model_validate(settings.options)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            at = tuple(map(str, problem["loc"]))
            yield Wrong(("options", *at), _about_option(kind, at, problem["type"], problem["msg"]))


class Minimised(Scorer):
    """A scorer of which lower is better, with the other sign."""

    def __init__(self, scorer: Scorer):
        self.name, self.scorer = scorer.name, scorer

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return the scores with the other sign, in order."""
        return [
            each if each.value is None else each._replace(value=0.0 - each.value) for each in self.scorer.score(judged)
        ]

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer with the other sign."""
        return self.score([judged])[0]

    def close(self) -> None:
        """Free what the scorer holds."""
        self.scorer.close()


class Facing(Scorer):
    """A scorer to which a prompt's reference is the answer to beat: where there is an opponent, that one's."""

    def __init__(self, scorer: Scorer):
        self.name, self.scorer = scorer.name, scorer

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return the scores, in order."""
        return self.scorer.score([each._replace(prompt=_facing(each.prompt)) for each in judged])

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer."""
        return self.score([judged])[0]

    def close(self) -> None:
        """Free what the scorer holds."""
        self.scorer.close()


def _facing(prompt: Prompt) -> Prompt:
    return prompt if prompt.opponent is None else replace(prompt, reference=prompt.opponent)


@contextmanager
def open_scorer(settings: ScorerSettings) -> Iterator[Scorer]:
    """Open the scorer that the settings describe, and close it with the context.

    Raises:
        UsageError: the settings are wrong; the message has every mistake.
        CheckpointError: a model can't be loaded, or is not what it should be.
        SandboxError: model-written code can't be run safely here.
    """
    problems = [f"{'.'.join(at)}: {text}" if at else text for at, text in wrong_settings(settings)]
    if problems:
        raise UsageError(listing(f"The settings of the scorer {settings.name!r} are wrong", problems))
    kind = kind_of(settings.kind)
    scorer = kind.make(settings, kind.options.model_validate(settings.options))
    if kind.opponent_as == "reference":
        scorer = Facing(scorer)
    try:
        yield Minimised(scorer) if settings.minimise else scorer
    finally:
        scorer.close()


def _about_option(kind: ScorerKind, at: tuple[str, ...], problem: str, text: str) -> str:
    known = list(kind.options.model_fields)
    if problem == "extra_forbidden":
        has = f"it has {', '.join(known)}" if known else "it has none"
        return f"a scorer of the kind {kind.name!r} has no option {at[0]!r}: {has}.{nearest(at[0], known)}"
    return text.removeprefix("Value error, ")
