"""The contract of a scorer, and the decorator that registers one.

    @scorer("exact")                                              # the name of its module in ``answers/scorers/``
    class Exact(Scorer):
        def __init__(self, settings: ScorerSettings, options: Options): ...
        def score_one(self, judged: Judged) -> Score: ...

The options, their bounds and defaults follow from the annotation of ``options``; where a constructor is shared, from
that of the class's attribute of this name.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mergekit_lite.answers import scorers
from mergekit_lite.answers.rows import Prompt

Positive = Annotated[int, Field(ge=1)]


class Judged(NamedTuple):
    """One answer to judge, the prompt it answers, and what else was answered, for scorers that compare with that."""

    prompt: Prompt
    answer: str
    rivals: tuple[str, ...] = ()


class Score(NamedTuple):
    """A scorer's verdict on an answer: ``value`` is None where it can't be judged, and ``why`` says the reason."""

    value: float | None
    why: str = ""


class ScorerOptions(BaseModel):
    """The options of one kind of scorer. Unknown ones are errors; this base has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def names() -> list[str]:
    """Return the kinds of scorers. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(scorers.__path__))


def _known(kind: str) -> str:
    *most, last = map(repr, names())
    if repr(kind) not in (*most, last):
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(most)} or {last}"}
        )
    return kind


class ScorerSettings(BaseModel):
    """One scorer, as a recipe or a command gives it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    kind: Annotated[str, AfterValidator(_known)]
    model: str | None = None  # a reward model, a judge, or a function as module:function
    strong: str | None = None  # of log_ratio
    weak: str | None = None
    server: str | tuple[str, ...] | None = Field(
        None, description="the URL of an OpenAI-compatible server, as a rule with /v1 at its end; or several URLs"
    )
    api_key_variable: str = "OPENAI_API_KEY"  # the environment variable with the server's key
    concurrency: Positive = 32  # open requests, to each URL
    batch_size: Positive = 8  # answers that a model reads, or programs that run, at once
    minimise: bool = False  # lower is better: scores are kept with the other sign
    allow_code: bool = Field(
        False, description="it runs programs that a model wrote: say `allow_code: true` if that is wanted"
    )
    options: dict[str, Any] = {}  # of this kind


class Scorer(Protocol):
    """Judges answers: higher is better, once it is opened by ``open_scorer``.

    A score depends on its prompt, its answer and that one's rivals alone, not on what else is judged with them.
    """

    name: str

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return a score for each answer, in order. By default they are scored one by one."""
        return [self.score_one(each) for each in judged]

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer; for scorers that don't override ``score``."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the scorer holds: a model, a process. By default there is nothing to free."""


class Wrong(NamedTuple):
    """A mistake in settings, and the keys that lead to it."""

    at: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class ScorerKind:
    """A kind of scorer by its name in recipes and in ``--score``."""

    name: str  # of the kind
    make: Callable[[ScorerSettings, Any], Scorer]  # the class, which raises MergekitLiteError where it can't be opened
    needs: Mapping[str, str] = field(default_factory=dict)  # required settings, each with a word for its value: MODEL
    takes: tuple[str, ...] = ()  # the optional settings that have an effect
    judges: bool = True  # False: it says nothing of a new answer: scores come with the data, or are of the prompt
    sees_form: bool = False  # whether it gets prompts as the data have them, a text or messages
    read_together: bool = False  # whether the answers of one batch change each other's scores in the last bits
    opponent_as: Literal["reference", "column"] | None = None  # how it sees the answer that others are compared with
    check: Callable[[ScorerSettings], Iterable[Wrong]] = lambda settings: ()  # yields more mistakes, opening nothing

    @property
    def options(self) -> type[ScorerOptions]:
        """The class of its options, as the class says, or else its constructor."""
        says = self.make if "options" in inspect.get_annotations(self.make) else self.make.__init__
        options: type[ScorerOptions] = get_type_hints(says)["options"]
        return options

    def at_once(self, settings: ScorerSettings) -> int:
        """Return how many answers such a scorer judges at the same time."""
        return settings.concurrency if "concurrency" in self.takes else settings.batch_size


SCORERS: dict[str, ScorerKind] = {}  # those whose modules are imported; ``registry.kind_of`` imports
S = TypeVar("S", bound=Scorer)


def scorer(name: str, **how: Any) -> Callable[[type[S]], type[S]]:
    """Register a class as a kind of scorer; ``how`` are the attributes of ``ScorerKind`` from ``needs`` on."""

    def register(scorer_class: type[S]) -> type[S]:
        SCORERS[name] = ScorerKind(name, scorer_class, **how)
        return scorer_class

    return register


def finite(value: float) -> Score:
    """Return the value as a score, or none where it is NaN or infinite."""
    return Score(value) if math.isfinite(value) else Score(None, f"the score is {value}")
