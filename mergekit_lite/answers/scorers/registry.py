"""From settings to a scorer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from pydantic import ValidationError

from mergekit_lite.answers.scorers import code, exact, function, judge, log_ratio, maths, reward, sandbox
from mergekit_lite.answers.scorers.scorer import Scorer
from mergekit_lite.answers.scorers.settings import ScorerSettings, Strict
from mergekit_lite.errors import UsageError, listing, nearest


class Kind(NamedTuple):
    """What a scorer of some kind must be told, what it may be beside that, and the class of its options."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    options: type[Strict]


KINDS = {
    "reward": Kind(("model",), ("batch_size",), reward.Options),
    "maths": Kind((), (), maths.Options),
    "code": Kind(("allow_code",), ("batch_size",), code.Options),
    "judge": Kind(("model", "server"), ("api_key_variable", "concurrency"), judge.Options),
    "log_ratio": Kind(("strong", "weak"), ("batch_size",), log_ratio.Options),
    "exact": Kind((), (), exact.Options),
    "function": Kind(("model",), (), function.Options),
}
ALWAYS = ("name", "kind", "options")
WHY = {
    "allow_code": "it runs programs that a model wrote: say `allow_code: true` if that is wanted",
    "server": "the URL of an OpenAI-compatible server, as a rule with /v1 at its end",
}


class Wrong(NamedTuple):
    """What is wrong with settings, and the keys that lead to it."""

    at: tuple[str, ...]
    text: str


def wrong_settings(settings: ScorerSettings) -> Iterator[Wrong]:
    """All that can be told without opening anything."""
    kind = KINDS[settings.kind]
    for key in kind.needs:
        if not getattr(settings, key):
            why = f" ({WHY[key]})" if key in WHY else ""
            yield Wrong((), f"a scorer of the kind {settings.kind!r} needs {key!r}{why}")
    for key in ScorerSettings.model_fields:
        if key in settings.model_fields_set and key not in (*ALWAYS, *kind.needs, *kind.takes):
            yield Wrong((key,), f"{key!r} has no effect on a scorer of the kind {settings.kind!r}")
    if settings.kind == "function" and settings.model and ":" not in settings.model:
        yield Wrong(("model",), f"{settings.model!r}: a function is given as module:function")
    try:
        kind.options.model_validate(settings.options)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            at = tuple(map(str, problem["loc"]))
            yield Wrong(("options", *at), _about_option(settings, at, problem["type"], problem["msg"]))


@contextmanager
def open_scorer(settings: ScorerSettings) -> Iterator[Scorer]:
    """The scorer that the settings describe. What it holds, models above all, is freed with the context.

    Raises:
        UsageError: the settings are wrong; all that is.
        CheckpointError: a model can't be loaded, or is not what it should be.
        FenceError: model-written code can't be fenced in here.
    """
    problems = [f"{'.'.join(at)}: {text}" if at else text for at, text in wrong_settings(settings)]
    if problems:
        raise UsageError(listing(f"The settings of the scorer {settings.name!r} are wrong", problems))
    with _opened(settings, KINDS[settings.kind].options.model_validate(settings.options)) as scorer:
        yield scorer


def _opened(settings: ScorerSettings, options: Strict) -> AbstractContextManager[Scorer]:
    match options:
        case reward.Options():
            return reward.rewarding(settings, options)
        case maths.Options():
            return maths.comparing(settings.name, options)
        case code.Options():
            sandbox.check_fence(options)
            return nullcontext(code.Code(settings.name, options, settings.batch_size))
        case judge.Options():
            return nullcontext(judge.Judge(settings, options))
        case log_ratio.Options():
            return log_ratio.comparing(settings, options)
        case exact.Options():
            return nullcontext(exact.Exact(settings.name, options))
        case _:
            assert settings.model is not None
            return nullcontext(function.Function(settings.name, function.function_named(settings.model)))


def _about_option(settings: ScorerSettings, at: tuple[str, ...], kind: str, text: str) -> str:
    known = list(KINDS[settings.kind].options.model_fields)
    if kind == "extra_forbidden":
        there = f"it has {', '.join(known)}" if known else "it has none"
        return f"a scorer of the kind {settings.kind!r} has no option {at[0]!r}: {there}.{nearest(at[0], known)}"
    return text.removeprefix("Value error, ")
