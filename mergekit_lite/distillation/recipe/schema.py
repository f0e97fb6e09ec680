"""The keys of a recipe with their defaults and meanings. Any other key is an error with line and column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mergekit_lite.answers.aggregating.recipe import Aggregate
from mergekit_lite.answers.asked_model import AskedModel, Count, Name
from mergekit_lite.answers.asking import PolicySampling, Sampling
from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.scoring.scorer import ScorerSettings
from mergekit_lite.answers.thoughts import Thoughts
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts, Combined, Rip, Score, SftRows

TARGET = "target"  # names the source that is the target itself, after its SFT
TARGET_RULES = ("wrpo", "simplemix")  # rules that always pair the target's own answers

Share = Annotated[float, Field(ge=0, le=1)]
Rule = Literal["fusechat3", "wrpo", "best_worst", "sweet_spot", "simplemix", "crossed", "asked", "as_is"]
UNSCORED = ("crossed", "asked", "as_is")  # rules that do without scores
Attention = Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]


class Strict(BaseModel):
    """A section of the recipe: unknown keys are errors, and values don't change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GivenAnswers(Data):
    """Answers that are there already, in any form of ``data/examples.py``."""

    model: str | None = None  # only those of this model, where the data name models
    scorer: str | None = None  # a scorer of the kind ``given``, which takes the scores that the data have
    domain: str = ""  # of prompts without one


class GivenRows(Strict):
    """Rows to train on that are there already, in any form of ``data/examples.py``, instead of what makes them."""

    sft: tuple[Data, ...] = ()
    preference: tuple[Data, ...] = ()


class Continues(Strict):
    """Begins a source's answers by what another source has said."""

    source: str  # the other one's name
    share: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)]  # of its answer, in turn


class RecipeSource(AskedModel):
    """A model that answers prompts; several that answer together; or answers that are there."""

    answers: tuple[GivenAnswers, ...] = ()  # instead of a model
    aggregate: Aggregate | None = None  # instead of a model: several, and the layers of steps that they take
    continues: Continues | None = None  # goes on from the beginnings of another source's answers
    drafts: str | None = None  # of an aggregate: the source whose answers its first layer has as drafts
    one_request: bool = False  # for all answers to a prompt, as far as the server gives several (`n`)
    samples: Count = 5  # answers to each prompt
    samples_for: dict[str, Count] = Field(default={})  # overrides by domain
    domains: tuple[str, ...] | None = None  # answers only prompts of these; all by default
    seed: int | None = None  # of its answers; the recipe's by default
    thoughts: Thoughts = "keep"  # of its answers, for training; only: leave out answers without

    @property
    def where(self) -> str:
        """Where it is asked, in words."""
        return "by several models" if self.aggregate is not None else super().where

    def answers_to(self, domain: str) -> int:
        """Return how many answers the source gives to a prompt of a domain, at least."""
        if self.domains is not None and domain not in self.domains:
            return 0
        return 1 if self.answers else self.samples_for.get(domain, self.samples)  # given ones: as many as there are


class RecipeTeacher(Strict):
    """A model whose distributions over given responses the student learns from, behind a server or in this process."""

    name: Name
    model: str  # a folder or org/name: its tokenizer, and its weights where it has no server
    server: str | tuple[str, ...] | None = None  # that returns log-probabilities of a given text; one or several
    served_model: str | None = None  # the name it is served under, if that isn't ``model``
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: Count = 32
    timeout: Annotated[float, Field(gt=0)] = 600
    retries: Annotated[int, Field(ge=0)] = 8
    batch_size: Count = 8  # in process
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    top: Annotated[int, Field(ge=0, le=65_535)] = (
        128  # likeliest tokens kept of each position; 0 keeps those of the text alone
    )
    domains: tuple[str, ...] | None = None  # teaches only responses to prompts of these; all by default
    system: str | None = None

    def teaches(self, domain: str) -> bool:
        """Whether it teaches responses to prompts of a domain."""
        return self.domains is None or domain in self.domains


class RecipeScorer(ScorerSettings):
    """A scorer with the domains that it judges."""

    domains: tuple[str, ...] | None = None  # judges only answers to prompts of these; all by default


class PairingRules(Strict):
    """How scored answers become training rows, apart from the rule."""

    score: Score | None = None  # the scorer that ranks, or several; only the rules of UNSCORED do without
    chosen: str | None = None  # for the rule asked: the source of the chosen answers, and of SFT
    rejected: str | None = None  # for the rule asked: the source of the rejected answers
    veto: dict[str, float] = {}  # scorer: the least score of chosen answers and SFT
    correct: str | None = None  # a verifier: only answers that it scores 1 are chosen, only others rejected
    answers: Literal["sources", "target", "all"] = "sources"  # whose answers best_worst and sweet_spot pair
    cut: Literal["drop", "keep"] = "drop"  # of chosen answers and SFT: those that the limit of tokens cut
    gap: tuple[float | None, float | None] = (None, None)  # least and most difference of scores in a pair
    gap_quantiles: tuple[Share, Share] | None = None  # the same as quantiles of all gaps of the domain
    gap_own: tuple[float | None, float | None] | None = None  # instead, where the chosen answer is the target's own
    chosen_score: float | None = None  # the least score of a chosen answer
    split: Literal["share", "availability"] = "share"  # availability: every pair is a preference row, the rest SFT
    sft_share: Share = 0.4  # with split share: of the prompts, rounded down
    rip: Rip = Rip()
    sft_rows: SftRows = SftRows()
    options: dict[str, float] = {}  # keyword arguments of the rule


class DomainPairing(PairingRules):
    """Overrides for one domain; unset fields inherit from ``pairs``."""

    rule: Rule | None = None


class Pairing(PairingRules):
    """The section ``pairs``: the rule for all domains, and overrides by domain."""

    rule: Rule
    domains: dict[str, DomainPairing] = {}

    @property
    def ranking(self) -> tuple[str, ...]:
        """The scorers that rank."""
        return self.score.names if isinstance(self.score, Combined) else (self.score,) if self.score else ()

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers whose scores an answer needs to be used, each once."""
        names = [*self.veto]
        if self.rule != "as_is" or self.sft_rows.needs_score:
            names += self.ranking
        if self.rule != "as_is" and self.correct is not None:
            names.append(self.correct)
        return tuple(dict.fromkeys(names))

    def score_of(self, scores: Mapping[str, float | None]) -> float | None:
        """Return the score that an answer is ranked by, of all that it has; None where one of them is missing."""
        values = [value for name in self.ranking if (value := scores.get(name)) is not None]
        if not values or len(values) < len(self.ranking):
            return None
        return self.score.of(values) if isinstance(self.score, Combined) else values[0]

    @property
    def needs_target(self) -> bool:
        """Whether pairs are made of answers that the target gives after its SFT."""
        if self.rule == "as_is" or (self.split == "share" and self.sft_share == 1):
            return False
        return self.rule in TARGET_RULES or (self.rule not in ("fusechat3", "asked") and self.answers != "sources")

    @property
    def reads_sources(self) -> bool:
        """Whether rows may be made of sources' answers."""
        return not self.needs_target or self.sft_share > 0 or self.rule in TARGET_RULES or self.answers != "target"

    def of(self, domain: str) -> Pairing:
        """Return the pairing of one domain, without further overrides.

        Another rule starts without options and named sources, and other bounds of gaps replace both kinds of bounds.
        """
        override = self.domains.get(domain, DomainPairing())
        changes = {name: getattr(override, name) for name in override.model_fields_set}
        if changes.get("rule") is None:
            changes["rule"] = self.rule
        elif changes["rule"] != self.rule:
            changes = {"options": {}, "chosen": None, "rejected": None, **changes}
        if "gap" in changes or "gap_quantiles" in changes:
            changes = {"gap": (None, None), "gap_quantiles": None, **changes}
        return self.model_copy(update={**changes, "domains": {}})


class Lora(Strict):
    """A LoRA adapter to train instead of all weights."""

    rank: Count = 16
    alpha: float = 32
    dropout: Share = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    modules_to_save: tuple[str, ...] = ()  # modules trained whole beside the adapter, such as embed_tokens
    rslora: bool = False  # scales by alpha / √rank instead of alpha / rank
    dora: bool = False  # trains the lengths of the columns of weights by themselves
    base: Literal["nf4"] | None = None  # QLoRA: the frozen weights have 4 bits in training; needs bitsandbytes


def _share_or_count(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"a share below 1 or a whole number of prompts is expected, got {value:g}")
    return value


class Training(Strict):
    """One training. ``trainer`` passes any other argument of transformers' TrainingArguments."""

    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)] = 1
    batch_size: Count = 128  # rows of an optimiser step, over all processes
    per_device_batch_size: Count = 2
    warmup_ratio: Share = 0.1
    scheduler: str = "cosine"
    max_length: Count = 2048  # tokens of prompt and response
    max_prompt_length: Count | None = None
    too_long: Literal["drop", "cut"] = "drop"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: Attention | None = None  # of transformers; by default the model's, sdpa where it can
    in_order: bool = False  # rows in the order of the file in every epoch; by default a new random one
    packing: bool = True  # rows of a device lie end to end, without padding, where the model and its attention allow it
    gradient_checkpointing: bool = False
    lora: Lora | None = None
    save_steps: Count = 100
    eval: Annotated[float, Field(ge=0), AfterValidator(_share_or_count)] = 0  # prompts held out: below 1 their share
    eval_steps: Count | None = None  # steps after which they are measured; by default save_steps
    keep: Literal["last", "best"] = "last"  # best: of the last checkpoints, by the prompts held out
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    trainer: dict[str, Any] = {}


class Noise(Strict):
    """Noise on the embeddings of tokens in training."""

    kind: Literal["neftune", "symnoise"] = "neftune"
    alpha: Annotated[float, Field(gt=0)] = 5


class Unlikelihood(Strict):
    """CUT: tokens that a judgment speaks of are made unlikely."""

    threshold: Annotated[float, Field(gt=0)] = 1.1  # τ, of a token's probability with the judgment over that without
    weight: Annotated[float, Field(ge=0)] = 1.0  # of the tokens above it


class Sft(Training):
    """Training on answers to imitate."""

    noise: Noise | None = None
    unlikelihood: Unlikelihood | None = None  # for rows with a judgment of their answer


class Preference(Training):
    """Preference training by one of ``OBJECTIVES``."""

    objective: str
    options: dict[str, Any] = {}  # keyword arguments of the objective: beta, alpha, schedule, smoothing …
    reference: str | None = None  # the model of s_ref, a folder or a name; by default the one that training starts from


class Pairwise(Strict):
    """A student for each teacher, merged: FuseChat."""

    merge_method: Literal["varm", "sce", "linear", "ties"] = "sce"
    parameters: dict[str, Any] = {}  # of the method, as in a merge recipe


class Fuse(Training):
    """Training on teachers' distributions: clm · CLM + (1 − clm) · Σ of the teachers' distances."""

    objective: str  # one of ``DISTANCES``
    options: dict[str, Any] = {}  # keyword arguments of the objective
    clm: Share = 0.9  # λ: the share of plain SFT in the loss
    combine: Literal["sum", "min_ce", "avg_ce"] = "sum"  # of several teachers, row by row
    vocabulary: Literal["exact", "edit_distance"] = "exact"  # the map of objectives that need one
    pairwise: Pairwise | None = None  # a student for each teacher, merged, instead of one


class OnPolicy(Training):
    """Training on the student's own answers, token by token towards what the teachers say of them.

    ``epochs`` are passes over the answers of a round, ``batch_size`` counts answers.
    """

    rounds: Count = 1  # of asking the student, as it is by then, and training on what it says
    prompts: Count | None = None  # of a round; all by default
    samples: Count = 1  # answers to each prompt in a round
    sampling: PolicySampling = PolicySampling()
    coef: Annotated[float, Field(gt=0)] = 1.0  # factor of the advantages
    clip: Annotated[float, Field(gt=0, lt=1)] | None = None  # PPO's bound ε of the importance weights; none by default
    spread: Literal["even", "whole"] = "even"  # of a chunk's log-ratio over its tokens, under another tokenizer


class Train(Strict):
    """The trainings in their order, each from what the one before it made; any may be left out, but not all."""

    sft: Sft | None = None
    fuse: Fuse | None = None
    on_policy: OnPolicy | None = None
    preference: Preference | None = None

    @property
    def stages(self) -> dict[str, Training]:
        """The trainings by name, in their order."""
        every = {name: getattr(self, name) for name in Train.model_fields}
        return {name: training for name, training in every.items() if training is not None}

    @property
    def reads_rows(self) -> bool:
        """Whether any training reads ``pairs/``; on-policy training has prompts alone."""
        return self.stages.keys() != {"on_policy"}

    @property
    def before_preference(self) -> str | None:
        """The training whose model preference training starts from; None where that is the target."""
        return next((name for name in reversed(self.stages) if name != "preference"), None)


class Rounds(Strict):
    """The distillation again and again, each time from the model that the last time made."""

    number: Count
    prompts: Literal["split", "reuse"] = "split"  # split: each round has its own part of them; reuse: all in each
    reference: Literal["start", "first"] = "start"  # of preference training: what it starts from, or the first model
    momentum: Annotated[float, Field(ge=0)] = 0  # of the step from the last round's trained model to this one's
    replay: tuple[Share, ...] = ()  # of the rows of the last round, of the one before it, …, trained on again


class ReportSettings(Strict):
    """What the models are compared on: the target before training, and after each training."""

    prompts: tuple[Prompts, ...] = ()  # held out; must share no prompt with the training data
    samples: Count = 1
    sampling: Sampling = Sampling(temperature=0)
    scores: tuple[str, ...] | None = None  # names of scorers; all by default
    servers: dict[str, str | tuple[str, ...]] = {}  # of untrained, sft, fuse, on_policy, preference, or of round-1 …
    examples: Count = 4  # prompts whose answers are shown side by side


class Recipe(Strict):
    """One distillation."""

    folder: Path  # of everything it makes
    seed: int = 0
    target: str  # the model to train
    rounds: Rounds | None = None  # in a file the number alone may stand for the section
    rows: GivenRows | None = None  # to train on; then there are no prompts, sources, scorers and pairs
    prompts: tuple[ChosenPrompts, ...] = ()  # those of the given answers by default
    sources: tuple[RecipeSource, ...] = ()
    target_source: RecipeSource | None = None  # how the SFT model answers for itself; the sample stage sets its model
    scorers: tuple[RecipeScorer, ...] = ()
    pairs: Pairing = Pairing(rule="as_is")
    teachers: tuple[RecipeTeacher, ...] = ()  # for ``train.fuse`` and ``train.on_policy``
    train: Train
    report: ReportSettings = ReportSettings()


class RoundRecipe(Recipe):
    """The recipe of one round, which ``rounds.py`` makes of the whole: no file has one."""

    whole: Recipe
    number: Count  # of the round

    @property
    def settings(self) -> Rounds:
        """How the rounds are."""
        assert self.rounds is not None
        return self.rounds
