"""The train stage: SFT on the sources' best answers, then preference training, each to a complete model folder.

    pairs/sft.jsonl ─▶ train/sft ─▶ (the target's own answers, paired) pairs/preference.jsonl ─▶ train/preference

Training is ``transformers.Trainer``'s: ``accelerate launch -m mergekit_lite distill train RECIPE`` runs it on several
processes, with FSDP or DeepSpeed where accelerate is configured so. Everything of an unfinished stage lies in
``train/STAGE.partial/``: ``training.json``, ``checkpoint-STEP/``, ``reference/`` and ``log.jsonl``. A killed run goes
on from the last complete checkpoint. The finished folder is renamed to ``train/STAGE/`` and holds

    the model (weights in the recipe's dtype, config, generation config, tokenizer with its template)
    adapter/          with ``lora``: the adapter by itself, relative to the model that the stage started from;
                      the weights beside it have it merged in
    training.json     settings, counts of rows, steps, processes, versions
    log.jsonl         below

Both stages score the tokens of responses only, the end of the turn included. (WRPO's released SFT packed templated
text and trained on all of its tokens, prompts included.) A step is ``batch_size`` rows whatever the number of
processes; rows go round in a new order each epoch, and what doesn't fill a last batch is left out. SFT averages over
the tokens of a batch, preference training over its rows, without the model's dropout: the reference has none.

**log.jsonl**, a row for each logged step; a figure is the mean since the row before, over all processes:

    step, epoch          done so far
    loss, grad_norm, learning_rate
    length/response      SFT: tokens of the responses
    length/source, length/target, length/rejected           tokens of chosen responses by role, and of rejected ones
    rewards/source, rewards/target, rewards/rejected        as the objective has them (β·ρ for DPO and WRPO)
    accuracy             share of rows whose chosen rewards, taken together, are above the rejected one's
    accuracy/source, accuracy/target                        the same for the chosen responses of one role
    margin               chosen minus rejected reward
    alpha                the sources' share (``wrpo`` only)
    kl                   estimate of KL(reference ‖ model), nats a response: mean of −ρ over the target's own responses

A figure that no row of the step has (no response of that role, no reference) is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe import Recipe
from mergekit_lite.distillation.training import arguments
from mergekit_lite.distillation.training.stage import Stage, objective_of
from mergekit_lite.errors import UsageError, counted, listing

if TYPE_CHECKING:
    from mergekit_lite.distillation.reporter import Tell


def train(recipe: Recipe, tell: Tell) -> None:
    """Train what can be trained now: each stage whose rows are there and that isn't done.

    Under ``accelerate launch`` every process calls this.

    Raises:
        UsageError: something in the recipe, its rows or its folder has to be seen to first.
    """
    check(recipe)
    folder = Folder(recipe.folder)
    start = recipe.target
    for name, training in (("sft", recipe.train.sft), ("preference", recipe.train.preference)):
        if training is None:
            continue
        stage = Stage(name, training, start, folder.pairs(name), folder.trained(name), recipe.seed)
        if not stage.rows_path.exists() and not stage.final.exists():
            if stage.is_main:
                tell.line(f"{name}: waits for {stage.rows_path}")
            return
        stage.run(tell)
        start = str(stage.final)


def check(recipe: Recipe) -> None:
    """Hold the recipe's ``train`` to the objectives' options and to transformers' arguments.

    Raises:
        UsageError: with all that is wrong.
    """
    problems: list[str] = []
    for name, training in (("sft", recipe.train.sft), ("preference", recipe.train.preference)):
        if training is None:
            continue
        problems += arguments.wrong_trainer_keys(training, name)
        if training.max_prompt_length is not None and training.max_prompt_length >= training.max_length:
            problems.append(f"train.{name}: max_prompt_length must be below max_length, or no response has room")
    if recipe.train.preference is not None:
        objective_of(recipe.train.preference, problems)
    if problems:
        raise UsageError(listing(f"{counted(len(problems), 'problem')} in the recipe's train", problems))
