"""The recipe of a distillation. Every key is here, with its default; anything else is an error with line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.scorers.settings import ScorerSettings

TARGET = "target"  # the source that stands for the trained SFT model, which answers for itself

Share = Annotated[float, Field(ge=0, le=1)]
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


class Scorer(ScorerSettings):
    """What judges answers; for which domains."""

    domains: tuple[str, ...] | None = None  # only answers to prompts of these


class DomainRule(Strict):
    """How the prompts of one domain become rows; what is not set comes from the recipe's ``pairs``."""

    rule: str | None = None
    score: str | None = None  # the scorer that ranks
    correct: str | None = None  # the scorer (0 or 1) that tells right from wrong
    gap: tuple[float | None, float | None] | None = None  # least and most difference of scores in a pair
    gap_quantiles: tuple[Share, Share] | None = None  # the same as quantiles of all gaps of the domain
    sft_share: Share | None = None
    options: dict[str, float] = {}  # of the rule


class Pairs(Strict):
    """From scores to training rows."""

    rule: Literal["fusechat3", "wrpo", "best_worst", "sweet_spot", "simplemix"]
    score: str
    correct: str | None = None
    gap: tuple[float | None, float | None] | None = None
    gap_quantiles: tuple[Share, Share] | None = None
    sft_share: Share = 0.4
    rip: dict[Literal["rejected_score", "rejected_length", "gap"], float] = {}  # RIP's three thresholds
    domains: dict[str, DomainRule] = {}
    options: dict[str, float] = {}


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
    """What the models are compared on."""

    prompts: tuple[Prompts, ...] = ()  # held out; must share no prompt with the training data
    samples: Positive = 1
    sampling: Sampling = Sampling(temperature=0)
    scores: tuple[str, ...] | None = None  # names of scorers; all by default
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
