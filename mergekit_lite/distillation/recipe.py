"""The recipe of a distillation. Every key is here, with its default; anything else is an error with line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.scoring.scorer import ScorerSettings

TARGET = "target"  # the source that stands for the trained SFT model, which answers for itself

Share = Annotated[float, Field(ge=0, le=1)]
Rule = Literal["fusechat3", "wrpo", "best_worst", "sweet_spot", "simplemix", "as_is"]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Strict(BaseModel):
    """Unknown keys are errors; a recipe doesn't change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """A model that answers: served, or loaded into this process."""

    name: Name
    model: str  # a folder or org/name; for a server, the name it is served under
    server: str | None = None  # http://host:port/v1 of an OpenAI-compatible server
    api_key_variable: str = "OPENAI_API_KEY"  # the environment variable with the server's key
    concurrency: Positive = 32  # open requests
    timeout: Annotated[float, Field(gt=0)] = 600  # seconds that a request may take
    retries: Annotated[int, Field(ge=0)] = 8  # of a request that failed
    batch_size: Positive = 16  # in process
    device: str | None = None  # cpu, cuda, cuda:1 …; a GPU where there is one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # in process; the model's own by default
    samples: Positive = 5  # answers to each prompt
    samples_for: dict[str, Positive] = {}  # of a domain, where it differs
    domains: tuple[str, ...] | None = None  # only prompts of these
    sampling: Sampling = Sampling()
    system: str | None = None  # a system prompt put before the messages

    def answers_to(self, domain: str) -> int:
        """How many answers it gives to a prompt of a domain."""
        return self.samples_for.get(domain, self.samples) if self.domains is None or domain in self.domains else 0


class Scorer(ScorerSettings):
    """What judges answers; for which domains."""

    domains: tuple[str, ...] | None = None  # only answers to prompts of these


class Protocol(Strict):
    """How prompts become rows."""

    score: str | None = None  # the scorer that ranks; only as_is does without
    correct: str | None = None  # the scorer that tells right (1) from wrong (less): only right ones are chosen
    answers: Literal["sources", "target", "all"] = "sources"  # whose answers best_worst and sweet_spot pair
    gap: tuple[float | None, float | None] = (None, None)  # least and most difference of scores in a pair
    gap_quantiles: tuple[Share, Share] | None = None  # the same as quantiles of all gaps of the domain
    split: Literal["share", "availability"] = "share"  # availability: whatever has a pair is preference, the rest SFT
    sft_share: Share = 0.4  # where split is share: of the prompts, rounded down to whole ones
    rip: dict[Literal["rejected_score", "rejected_length", "gap"], float] = {}  # RIP's three thresholds
    options: dict[str, float] = {}  # of the rule


class DomainProtocol(Protocol):
    """How those of one domain do; what is not set holds as in the recipe's ``pairs``."""

    rule: Rule | None = None


class Pairs(Protocol):
    """From scores to training rows."""

    rule: Rule
    domains: dict[str, DomainProtocol] = {}

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers without whose verdict an answer is of no use."""
        return () if self.rule == "as_is" else tuple(filter(None, (self.score, self.correct)))

    def of(self, domain: str) -> Pairs:
        """What holds for one domain. Another rule starts without options, other bounds of gaps replace both kinds."""
        own = self.domains.get(domain, DomainProtocol())
        given = {name: getattr(own, name) for name in own.model_fields_set}
        if given.get("rule") is None:
            given["rule"] = self.rule
        elif given["rule"] != self.rule:
            given.setdefault("options", {})
        if "gap" in given or "gap_quantiles" in given:
            given = {"gap": (None, None), "gap_quantiles": None, **given}
        return self.model_copy(update={**given, "domains": {}})


class Lora(Strict):
    """Train an adapter."""

    rank: Positive = 16
    alpha: float = 32
    dropout: Share = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Training(Strict):
    """What both stages of training have. ``trainer`` passes any other argument of transformers' TrainingArguments."""

    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)] = 1
    batch_size: Positive = 128  # rows for each optimiser step, over all processes
    per_device_batch_size: Positive = 2
    warmup_ratio: Share = 0.1
    scheduler: str = "cosine"
    max_length: Positive = 2048  # tokens of prompt and response
    max_prompt_length: Positive | None = None
    too_long: Literal["drop", "cut"] = "drop"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    save_steps: Positive = 100
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    trainer: dict[str, Any] = {}


class Preference(Training):
    """Preference training; ``options`` are the objective's own numbers."""

    objective: str
    options: dict[str, Any] = {}  # beta, alpha, schedule, smoothing … as the objective's signature has them


class Train(Strict):
    """SFT first, where it is given, then preference training."""

    sft: Training | None = None
    preference: Preference | None = None


class Report(Strict):
    """What the models are compared on: the target as it was, after SFT, and after preference training."""

    prompts: tuple[Prompts, ...] = ()  # held out; must share no prompt with the training data
    samples: Positive = 1
    sampling: Sampling = Sampling(temperature=0)
    scores: tuple[str, ...] | None = None  # names of scorers; all by default
    servers: dict[Literal["untrained", "sft", "preference"], str] = {}  # where a model is served, under this name
    examples: Positive = 4  # answers side by side


class Recipe(Strict):
    """One distillation."""

    folder: Path  # of everything it makes
    seed: int = 0
    target: str  # the model to train
    prompts: tuple[Prompts, ...]
    sources: tuple[Source, ...]
    target_source: Source | None = None  # how the SFT model answers for itself; its model is set by the stage
    scorers: tuple[Scorer, ...]
    pairs: Pairs
    train: Train
    report: Report = Report()
