"""``mergekit-lite answer``: prompts answered by an aggregate, as rows of a file.

Beside ``answers.jsonl`` lie the replies of all steps, ``answers.steps.jsonl``: the next run begins with them. A row has
the form of the rows that SFT reads, so ``distill`` and ``boost`` take the file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.answers.aggregating.calls import Item
from mergekit_lite.answers.aggregating.dry_run import ModelCalls, dry_run
from mergekit_lite.answers.aggregating.recipe import AnswerRecipe, load
from mergekit_lite.answers.aggregating.running import TAUGHT, Aggregation, Reports, ledger_of, run
from mergekit_lite.answers.aggregating.steps import said_in
from mergekit_lite.answers.asked_model import AskedModel, absent
from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.prompts import load as load_prompts
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.respondents import respondent
from mergekit_lite.answers.rows import Prompt, seed_of, write_rows
from mergekit_lite.answers.server import Served
from mergekit_lite.answers.spreading import Crews, check_ray
from mergekit_lite.answers.thoughts import is_cut
from mergekit_lite.errors import RunError, UsageError, counted, listing
from mergekit_lite.options import named_options


class Untold:
    """Takes reports, and discards them."""

    def line(self, text: str) -> None:
        """Discard a result."""

    def warn(self, text: str) -> None:
        """Discard a warning."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        """Discard progress."""
        return nullcontext(lambda more: None)


@dataclass(frozen=True)
class ToAnswer:
    """What is to be answered, and by whom."""

    recipe: AnswerRecipe
    output: Path  # of the answers, as JSON Lines
    tasks: tuple[Task, ...]
    notes: tuple[str, ...] = ()  # rows of the prompts that were left out, an option without effect
    ray: str | None = None  # the cluster that models of this process are spread over

    @property
    def prompts(self) -> int:
        """The number of prompts."""
        return len({task.prompt.id for task in self.tasks})

    @property
    def steps(self) -> Path:
        """The ledger of the replies of all steps."""
        return self.output.with_name(f"{self.output.stem}.steps.jsonl")

    @property
    def rows(self) -> Path:
        """The file of the rows that a model can learn these steps from."""
        return self.output.with_name(f"{self.output.stem}.rows.jsonl")

    def log(self, model: AskedModel) -> Path:
        """Return the file that takes what a server prints that is started for a model."""
        return self.output.with_name(f"{self.output.stem}.{model.name}.server.log")

    def calls(self) -> list[ModelCalls]:
        """Return what each model would be asked."""
        return dry_run(self.recipe, self.tasks, self.steps)


@dataclass(frozen=True)
class Answered:
    """What was answered."""

    prepared: ToAnswer
    answers: int
    rows: int  # to learn these steps from
    asked: dict[str, int]  # replies that this run got, by model
    missing: tuple[str, ...]  # messages


@named_options
def answer(
    prompts: str | Path | Sequence[str | Path],
    recipe: str | Path,
    output: str | Path,
    *,
    limit: int | None = None,
    rows: bool = False,
    skip_missing: bool = False,
    ray: str | None = None,
    reports: Reports | None = None,
) -> Answered:
    """Answer prompts by several models together: MoA, Self-MoA, Archon, as a recipe says.

    Args:
        prompts: one or several files, as ``distill`` takes them.
        recipe: a YAML file; see docs/answer.md.
        output: the file of the answers, ``.jsonl``.
        limit: most prompts that are answered.
        rows: write ``NAME.rows.jsonl`` as well, on which a model can learn to aggregate (AFT), or to criticise and
            refine (SRT); one that is there from before is made anew in any case.
        skip_missing: go on without drafts that a model fails to give, and without prompts that can't be answered.
        ray: have models that answer in this process answer on the machines of a Ray cluster instead: ``auto``,
            ``HOST:PORT`` or ``local:N``.
        reports: gets results, warnings and progress; by default nothing is shown.

    Raises:
        UsageError: recipe, prompts or files are wrong; the message has every problem.
        RunError: answers are missing. All replies are kept, and the same call goes on.
    """
    files = [prompts] if isinstance(prompts, str | Path) else prompts
    prepared = prepare([Path(file) for file in files], Path(recipe), Path(output), limit=limit, rows=rows, ray=ray)
    return carry_out(prepared, reports or Untold(), rows=rows, skip_missing=skip_missing)


def prepare(
    prompts: Sequence[Path],
    recipe: Path,
    output: Path,
    *,
    limit: int | None = None,
    rows: bool = False,
    ray: str | None = None,
) -> ToAnswer:
    """Check everything that needs no model. Raises UsageError with every problem, or RecipeError with the recipe's."""
    loaded, asked = load(recipe), load_prompts(Prompts(path=path) for path in prompts)
    tasks = tasks_of(loaded, asked.prompts[:limit])
    repeated = f"{counted(asked.repeated, 'prompt')} asked before, answered once"
    notes = [*(f"left out: {problem}" for problem in asked.problems), *[repeated] * bool(asked.repeated)]
    problems: list[str] = []
    if ray is not None:
        try:
            notes += filter(None, [check_ray(ray, loaded.models)])
        except UsageError as error:
            problems.append(str(error))
    prepared = ToAnswer(loaded, output, tasks, tuple(notes), ray)
    problems += absent_models(loaded)
    if output.suffix != ".jsonl":
        problems.append(f"{output}: answers are JSON Lines, in a file that ends in .jsonl")
    elif taken := {output.resolve(), prepared.rows.resolve(), prepared.steps.resolve()} & {
        p.resolve() for p in prompts
    }:
        problems.append(f"{taken.pop()} is a file of prompts, and would be written to: name another output")
    elif not _is_begun(prepared):
        problems += [
            f"{path} is there already, and no answers that this command began: name another file"
            for path in (output, prepared.rows)
            if path.exists()
        ]
    if rows and not any(step.step in TAUGHT for layer in loaded.layers for step in layer):
        problems.append(
            f"rows to learn from are what was made of drafts: the recipe has none of {', '.join(map(repr, TAUGHT))}"
        )
    if not tasks:
        problems += asked.problems or ["the files have no prompt to answer"]
    if problems:
        raise UsageError(problems[0] if len(problems) == 1 else listing("This can't be done as asked", problems))
    return prepared


def tasks_of(recipe: AnswerRecipe, prompts: Iterable[Prompt]) -> tuple[Task, ...]:
    """Return what a recipe makes of prompts: its number of answers to each, with a seed of their own."""
    return tuple(
        Task(prompt, index, seed_of(recipe.seed, prompt.id, index))
        for prompt in prompts
        for index in range(recipe.samples)
    )


def absent_models(recipe: AnswerRecipe) -> list[str]:
    """Return what is not here that the models of a recipe need."""
    return [f"the model {model.name}: {why}" for model in recipe.models if (why := absent(model))]


def _is_begun(prepared: ToAnswer) -> bool:
    return prepared.steps.exists() or ledger_of(prepared.steps).partial.exists()


def ask(prepared: ToAnswer, reports: Reports, *, skip_missing: bool = False) -> Aggregation:
    """Have the models answer; ``missing`` says what is missing. Raises as ``run``."""

    def opened(model: AskedModel) -> AbstractContextManager[Served | Local]:
        return respondent(model, model.model, prepared.log(model))

    recipe = prepared.recipe
    how: dict[str, Any] = {"name": recipe.name, "skip_missing": skip_missing}
    with Crews(prepared.ray) as crews:
        return run(recipe, prepared.tasks, prepared.steps, opened, reports, crews=crews, **how)


def carry_out(prepared: ToAnswer, reports: Reports, *, rows: bool = False, skip_missing: bool = False) -> Answered:
    """Answer, and write the file. Raises as ``answer``."""
    found = ask(prepared, reports, skip_missing=skip_missing)
    if found.stopped:
        raise RunError(
            listing("Replies are missing; all others are kept", found.missing) + "\nThe same command goes on and asks "
            "for what is missing. With --skip-missing it goes on with the drafts that are there."
        )
    if not found.answered:
        raise RunError(listing("No prompt could be answered", found.missing))
    for message in found.missing:
        reports.warn(message)
    write_answers(prepared, found)
    if cut := cut_in(found):
        reports.warn(f"{counted(cut, 'answer')} of {len(found.answered):,} cut at max_tokens")
    stale = not rows and prepared.rows.exists()  # of the answers that were there before
    written = list(_taught_rows(found)) if rows or stale else []
    if rows or written:
        write_rows(prepared.rows, written)
    elif stale:
        prepared.rows.unlink()
    return Answered(prepared, len(found.answered), len(written), dict(found.asked), tuple(found.missing))


def write_answers(prepared: ToAnswer, found: Aggregation) -> None:
    """Write the file of the answers. Raises RunError where it can't be written."""
    write_rows(prepared.output, (_answer_row(prepared.recipe.name, item) for item in found.answered))


def cut_in(found: Aggregation) -> int:
    """Return how many answers were cut at max_tokens."""
    return sum("cut" in _said(item.drafts[0].reply) for item in found.answered)


def _answer_row(name: str, item: Item) -> dict[str, Any]:
    (draft,) = item.drafts
    return {
        **_asked(item.task.prompt),
        **({"reference": item.task.prompt.reference} if item.task.prompt.reference is not None else {}),
        **({"tests": list(item.task.prompt.tests)} if item.task.prompt.tests else {}),
        "messages": list(item.task.prompt.messages),
        **_said(draft.reply),
        "source": name,
        "index": item.task.index,
        "model": draft.model,
    }


def _taught_rows(found: Aggregation) -> Iterator[dict[str, Any]]:
    """Yield the requests about drafts that the last layers of their kinds made, each with the reply to it.

    Such rows train a model to aggregate: Aggregation Fine-Tuning (Li et al. 2025, arXiv 2501.11877); or to criticise
    answers and to refine them, the first stage of SRT (Hu et al. 2024, arXiv 2406.07168).
    """
    for item in found.answered:
        said = [(kind, messages, reply) for kind, pairs in item.taught.items() for messages, reply in pairs]
        for number, (kind, messages, reply) in enumerate(said):
            asked = _asked(item.task.prompt)
            yield {
                **asked,
                "id": f"{asked['id']}/{item.task.index}/{number}",
                "step": kind,
                "messages": list(messages),
                **_said(reply),
            }


def _asked(prompt: Prompt) -> dict[str, Any]:
    return {"id": prompt.id, "domain": prompt.domain}


def _said(reply: Reply) -> dict[str, Any]:
    cut = is_cut({"text": reply.text, "finish": reply.finish, "thoughts": reply.thoughts})
    return {"response": said_in(reply), **({"cut": True} if cut else {})}
