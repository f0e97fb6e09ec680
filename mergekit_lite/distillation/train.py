"""The train stage: SFT, teachers' distributions, the model's own answers, preferences, each to a complete model folder.

    pairs/sft.jsonl ─▶ train/sft ─▶ (the target's own answers, paired) pairs/preference.jsonl ─▶ train/preference
    pairs/sft.jsonl, teach/ ─▶ train/fuse       prompts ─▶ train/on_policy

Each starts from what the one before it made, in the order sft, fuse, on_policy, preference; any may be left out.
With ``pairwise`` fusing makes ``train/fuse-TEACHER`` for each teacher, and merges them to ``train/fuse``.

An unfinished training is in ``train/STAGE.partial/``: ``training.json``, ``checkpoint-STEP/``, ``reference/`` and
``log.jsonl``. The finished folder ``train/STAGE/`` holds

    the model         weights in the recipe's dtype, config, generation config, tokenizer with its template
    adapter/          with ``lora``: the adapter by itself, relative to the model that training started from;
                      the weights of the folder have it merged in
    training.json     settings, counts of rows, steps, processes, versions; which checkpoint it is, with ``keep: best``
    log.jsonl         see below

The loss covers the tokens of responses only, the end of the turn included. A step takes ``batch_size`` rows, whatever
the number of processes. Rows come in a new order each epoch; those that fill no last batch are left out. SFT averages
over the tokens of a batch, fusing over its groups of tokens as well. Preference training averages over its rows and has
no dropout, as the reference has none.

**log.jsonl** has a row for each logged step. A figure is the mean since the row before, over all processes:

    step, epoch, time    done so far, and when
    loss, grad_norm, learning_rate
    length/response      SFT, fusing: tokens of the responses
    clm                  fusing, CUT: SFT's part of the loss, nats a token
    unlikelihood         CUT: the other part, nats a token of answers with a judgment
    criticised           CUT: share of these tokens that are made unlikely
    distance             fusing: the teachers' part, mean of the groups; distance/TEACHER: to one of them
    weight/TEACHER       fusing: mean of its weight over the rows
    grouped              fusing: share of the tokens that are compared with a teacher's
    length/source, length/target, length/rejected           tokens of chosen responses by role, and of rejected ones
    rewards/source, rewards/target, rewards/rejected        as the objective defines them (β·ρ for DPO and WRPO)
    accuracy             share of rows whose chosen rewards, taken together, are above the rejected one's
    accuracy/source, accuracy/target                        the same for the chosen responses of one role
    margin               chosen minus rejected reward
    alpha                the sources' share (``wrpo`` only)
    tokens_per_second    over all processes, from the first forward pass since the row before to this row
    peak_memory          bytes, of the process that needs most: on its GPU, or of the machine's memory without one
    kl                   estimate of KL(reference ‖ model), nats a response: mean of −ρ over the target's own responses

With ``eval`` there are rows with ``eval_loss``, in preference training with ``eval_accuracy`` and ``eval_margin`` too:
of the held-out rows under the model after that step, 0 being before the first.

A row has no figure that its steps have no values for (no response of that role, no reference).
"""

from __future__ import annotations

from pathlib import Path

from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.on_policy import checks as on_policy
from mergekit_lite.distillation.on_policy.stage import OnPolicyStage
from mergekit_lite.distillation.recipe.schema import Preference, Recipe, RoundRecipe, Sft
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import add_momentum
from mergekit_lite.distillation.training import arguments
from mergekit_lite.distillation.training.fuse_stage import fuse_stage
from mergekit_lite.distillation.training.model import tokenizer_of, unavailable
from mergekit_lite.distillation.training.preference_stage import PreferenceStage, objective_of
from mergekit_lite.distillation.training.sft_stage import SftStage
from mergekit_lite.distillation.training.stage import TrainingStage
from mergekit_lite.distillation.training.vocabularies import can_project, has_vocabulary_of
from mergekit_lite.errors import UsageError, counted, listing


def train(recipe: Recipe, reporter: Reporter) -> None:
    """Run the trainings as far as what they read exists, and skip what is done.

    Under ``accelerate launch`` every process calls this.

    Raises:
        UsageError: the recipe, its rows or its folder don't allow the training.
    """
    check(recipe)
    folder = Folder(recipe.folder)
    start = recipe.target
    for name in recipe.train.stages:
        stage = stage_of(recipe, name, start)
        missing = [path for path in needs(recipe, name) if not path.exists()]
        if missing and not folder.trained(name).exists():
            if stage.is_main:
                reporter.line(f"{name}: waits for {', '.join(map(str, missing))}")
            return
        stage.run(reporter)
        start = str(folder.trained(name))
    if isinstance(recipe, RoundRecipe) and recipe.settings.momentum:
        stage.together(lambda: add_momentum(recipe, reporter))


def stage_of(recipe: Recipe, name: str, start: str) -> TrainingStage:
    """Return one of the trainings, from the model that it starts from."""
    if name == "fuse":
        return fuse_stage(recipe, start)
    if name == "on_policy":
        return OnPolicyStage.of(recipe, start)
    folder, training = Folder(recipe.folder), recipe.train.stages[name]
    places = (start, folder.pairs(name), folder.trained(name), recipe.seed)
    if isinstance(training, Preference):
        return PreferenceStage(name, training, *places)
    assert isinstance(training, Sft)
    return SftStage(name, training, *places)


def needs(recipe: Recipe, name: str) -> list[Path]:
    """Return what earlier stages make for a training."""
    folder = Folder(recipe.folder)
    if name == "on_policy":
        return []  # it settles the prompts itself
    if name == "fuse":
        return [folder.pairs("sft"), *(folder.taught(teacher.name) for teacher in recipe.teachers)]
    return [folder.pairs(name)]


def check(recipe: Recipe) -> None:
    """Check the recipe's ``train`` against the objectives' options and transformers' arguments.

    Raises:
        UsageError: with all problems.
    """
    problems: list[str] = on_policy.check(recipe)
    for name, training in recipe.train.stages.items():
        if name == "on_policy":
            continue
        problems += arguments.wrong_trainer_keys(training, name)
        problems += unavailable(training, name)
        if training.max_prompt_length is not None and training.max_prompt_length >= training.max_length:
            problems.append(f"train.{name}: max_prompt_length must be below max_length, or no response has room")
        if not training.eval:
            if training.keep == "best":
                problems.append(f"train.{name}: keep: best chooses by prompts held out: say by eval how many, as 0.02")
            if training.eval_steps is not None:
                problems.append(f"train.{name}: eval_steps has no effect without eval")
    if recipe.train.sft is not None and recipe.train.sft.noise and recipe.train.sft.unlikelihood:
        problems.append("train.sft: unlikelihood compares two contexts, and noise would differ in them: give one")
    problems += unfit_preferences(recipe)
    problems += unfit_distances(recipe)
    if problems:
        raise UsageError(listing(f"{counted(len(problems), 'problem')} in the recipe's train", problems))


def unfit_preferences(recipe: Recipe) -> list[str]:
    """Return messages about the objective of preferences, and what it needs that this recipe doesn't give it."""
    training = recipe.train.preference
    if training is None:
        return []
    problems: list[str] = []
    found = objective_of(training, problems)
    pairings = [recipe.pairs.of(domain) for domain in ("", *recipe.pairs.domains)]
    if found is not None and found[0].own and recipe.rows is None and not any(each.needs_target for each in pairings):
        text = "needs the target's own answers, and no pairs are made of them"
        problems.append(f"train.preference: {found[0].name} {text}: say `answers: target` in pairs, or `all`")
    other = training.reference
    if other is not None and not has_vocabulary_of(tokenizer_of(recipe.target), tokenizer_of(other)):
        problems.append(f"train.preference.reference: {other} has other tokens than {recipe.target}")
    return problems


def unfit_distances(recipe: Recipe) -> list[str]:
    """Return messages about an unknown objective of fusing, or one that these teachers' tokenizers are not for."""
    fuse = recipe.train.fuse
    if fuse is None:
        return []
    if fuse.objective not in DISTANCES:  # of a recipe that no file has
        return [f"train.fuse: there is no objective {fuse.objective!r}. There are: {', '.join(DISTANCES)}."]
    needed = DISTANCES[fuse.objective].vocabulary
    if needed not in ("same", "projection"):
        return []
    student = tokenizer_of(recipe.target)
    others = [name for name, distance in DISTANCES.items() if distance.vocabulary not in ("same", needed)]
    problems = []
    for teacher in recipe.teachers:
        tokenizer = tokenizer_of(teacher.model)
        if needed == "same" and not has_vocabulary_of(student, tokenizer):
            why = "needs the target's own vocabulary, and {} has another one"
        elif needed == "projection" and not can_project(student, tokenizer):
            why = "needs tokenizers of the package tokenizers, and the target's or that of {} is none"
        else:
            continue
        named = why.format(f"{teacher.name} ({teacher.model})")
        problems.append(f"train.fuse: {fuse.objective} {named}. For any vocabulary there are {', '.join(others)}.")
    return problems
