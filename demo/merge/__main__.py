"""``make demo-merge``: three fine-tunes of one small model, one for each skill, made one model by every method.

The base has learnt a little of all three skills. Each seed makes a base, its fine-tunes and their LoRA adapters anew,
and merges them: by all methods with their defaults (some read statistics of the fine-tunes), by three with the numbers
that ``boost`` finds, the adapters in spaces that they have in common, and by peft's own merging. Beside them: the base,
and the base tuned on all skills at once.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from demo.distill import results, skills
from demo.distill.evaluation import PATTERN
from demo.distill.jobs import Job, command, console, mergekit_lite, python, run, stage
from demo.distill.making import Lesson, make_models
from demo.distill.skills import MAX_ANSWER_TOKENS, SKILLS
from demo.merge import page
from demo.merge.plan import (
    BOOSTED,
    BY_PEFT,
    COMBINED,
    FULL,
    QUICK,
    RANK,
    WITH_BASE,
    Files,
    Size,
    density,
    kind_of,
    merges,
    weights,
)
from mergekit_lite.methods import method_named

RATE, ADAPTER_RATE = 4e-4, 1e-3


@command("demo/out-merge", FULL, QUICK, "How often models are made and merged.")
def main(out: Path, seeds: tuple[int, ...], size: Size) -> None:
    """Make three fine-tunes and their adapters, merge them by every method, and say which is better than an average.

    What is in the output folder already is used again: a run that was stopped goes on.
    """
    there = Files(out, seeds)
    with stage("Bases that have learnt a little of all skills"):
        make_models(bases(there, size), there.logs)
    with stage("Fine-tunes and adapters"):
        make_models(fine_tunes(there, size), there.logs)
    write_questions(there, size)
    with stage("Statistics of the fine-tunes, for methods that need some"):
        run(statistics(there), there.logs)
    with stage("Merges"):
        run(combinations(there), there.logs)
        run(whole_models(there), there.logs)
    with stage("boost looks for better numbers"):
        run(boosts(there, size), there.logs)
    with stage("Scoring on questions that no model has learnt from"):
        results.score(there, "held-out", list(models(there)))
    page.write(there, console)


def bases(out: Files, size: Size) -> Iterator[Lesson]:
    for seed in out.seeds:
        yield Lesson(out.base(seed), "demo.distill.models:target", tuple(SKILLS), size.base, seed=seed)


def fine_tunes(out: Files, size: Size) -> Iterator[Lesson]:
    for seed in out.seeds:
        base, steps = out.base(seed), size.tuned
        for skill in SKILLS:
            yield Lesson(out.tuned(seed, skill), base, (skill,), steps, seed=seed, rate=RATE)
            yield Lesson(out.adapter(seed, skill), base, (skill,), steps, seed=seed, rate=ADAPTER_RATE, rank=RANK)
        yield Lesson(out.joint(seed), base, tuple(SKILLS), len(SKILLS) * steps, seed=seed, rate=RATE)


def write_questions(out: Files, size: Size) -> None:
    """Write questions for boost to choose by, others to judge by, and for each fine-tune some as it has learnt from."""
    rows: dict[str, list[dict[str, str]]] = {"choosing": [], "held-out": []}
    for name in SKILLS:
        asked = skills.questions(name, size.choosing + size.held_out, random.Random(name), held_out=True)
        rows["choosing"] += map(skills.as_row, asked[: size.choosing])
        rows["held-out"] += map(skills.as_row, asked[size.choosing :])
        read = skills.questions(name, size.read, random.Random(name))
        rows[name] = [{"prompt": question, "reference": skills.solve(question)} for question in read]
    for name, lines in rows.items():
        skills.write_rows(out.prompts(name), lines)


def statistics(out: Files) -> Iterator[Job]:
    """Yield the jobs in which fine-tunes read questions and answers of their skill."""
    for seed in out.seeds:
        for skill in SKILLS:
            for kind, option in (("gram", ()), ("fisher", ("--fisher",))):
                if not (made := out.statistics(seed, skill, kind)).exists():
                    made.parent.mkdir(exist_ok=True)
                    how = ("--prompts", out.prompts(skill), *option, "-o", made)
                    words = mergekit_lite("statistics", out.tuned(seed, skill), *how)
                    yield Job(f"seed {seed}: {kind} statistics of {skill}", words)
        if not all(out.statistics(seed, skill, "plus").exists() for skill in SKILLS):
            path = write_recipe(out.recipe(seed, "plus"), [of_fine_tunes(out, seed, "regmean_plus", {})])
            each = [
                word for skill in SKILLS for word in ("--prompts", f"{out.tuned(seed, skill)}={out.prompts(skill)}")
            ]
            yield Job(
                f"seed {seed}: statistics behind merged layers",
                mergekit_lite("statistics", path, "--plus", "--force", *each),
            )


def of_fine_tunes(out: Files, seed: int, method: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe that merges a seed's fine-tunes, with their statistics where the method needs some."""
    recipe = document(method, out.base(seed), [out.tuned(seed, skill) for skill in SKILLS], numbers)
    if kind := kind_of(method_named(method)):
        for model, skill in zip(recipe["models"], SKILLS, strict=True):
            model["statistics"] = str(out.statistics(seed, skill, kind))
    return recipe


def document(method: str, base: Path, tuned: Sequence[Path | str], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe. A base is named only to methods that can't do without, and to WARP's."""
    chosen = method_named(method)
    needs_base = chosen.base == "required" or method in WITH_BASE
    models = [{"model": str(path), **parameters(weights(chosen))} for path in tuned]
    given = {"models": models, **parameters({**density(chosen), **numbers})}
    return {"merge_method": method, **({"base_model": str(base)} if needs_base else {}), **given}


def parameters(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": dict(numbers)} if numbers else {}


def combinations(out: Files) -> Iterator[Job]:
    """Yield the jobs that make one adapter of three, and by peft a model."""
    for seed in out.seeds:
        adapters = [out.adapter(seed, skill) for skill in SKILLS]
        for space, methods in COMBINED.items():
            for method in methods:
                numbers = [f"-p{name}={value:g}" for name, value in density(method_named(method)).items()]
                how = ("--space", space, "--method", method, *numbers, *adapters)
                if not (made := out.combined(seed, space, method)).exists():
                    words = mergekit_lite("vector", "combine", *how, "--threads", 1, "--force", "-o", made)
                    yield Job(f"seed {seed}: adapters by {method}, {space}", words)
        for kind in BY_PEFT:
            if not (made := out.merged(seed, f"peft-{kind}")).exists():
                words = python("demo.merge.by_peft", out.base(seed), made, *adapters, "--kind", kind)
                yield Job(f"seed {seed}: adapters by peft, {kind}", words)


def whole_models(out: Files) -> Iterator[Job]:
    """Yield a job for each seed that makes all models of it: a file of several recipes, which are planned together."""
    for seed in out.seeds:
        base = out.base(seed)
        recipes = {method: of_fine_tunes(out, seed, method, {}) for method in merges()}
        for key, adapter in adapters(out, seed):
            recipes[key] = document("passthrough", base, [f"{base}+{adapter}"], {})
        lacking = [{"name": name, **recipe} for name, recipe in recipes.items() if not out.merged(seed, name).exists()]
        if lacking:
            path = write_recipe(out.recipe(seed, "merges"), lacking)
            words = mergekit_lite("merge", path, "--threads", 1, "--force", "-o", out.merged(seed, "{name}"))
            yield Job(f"seed {seed}: {len(lacking)} merges", words)


def adapters(out: Files, seed: int) -> Iterator[tuple[str, Path]]:
    """Yield a name and a folder of each adapter."""
    for skill in SKILLS:
        yield f"adapter-{skill}", out.adapter(seed, skill)
    for space, methods in COMBINED.items():
        for method in methods:
            yield f"{space}-{method}", out.combined(seed, space, method)


def write_recipe(path: Path, documents: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return path


def boosts(out: Files, size: Size) -> Iterator[Job]:
    """Yield the searches for numbers; what was measured before is not measured again."""
    for seed in out.seeds:
        for method, (numbers, tuned) in BOOSTED.items():
            recipe = of_fine_tunes(out, seed, method, numbers)
            path = write_recipe(out.recipe(seed, f"boost-{method}"), [recipe])
            how = [word for each in tuned for word in ("--tune", each)]
            how += ["--prompts", out.prompts("choosing"), "--score", f"exact,pattern={PATTERN}"]
            how += ["--temperature", 1, "--top-p", 1, "--max-tokens", MAX_ANSWER_TOKENS, "--batch-size", 100]
            how += ["--trials", size.trials, "--no-kl", "--seed", seed, "--threads", 1, "--force"]
            made = out.boosted(seed, method)
            if not out.is_searched(seed, method):
                yield Job(f"seed {seed}: boost of {method}", mergekit_lite("boost", "--recipe", path, *how, "-o", made))


def models(out: Files) -> Iterator[Path]:
    """Yield every model that is measured."""
    names = [*merges(), *(f"peft-{kind}" for kind in BY_PEFT)]
    for seed in out.seeds:
        yield from (out.base(seed), out.joint(seed), *(out.tuned(seed, skill) for skill in SKILLS))
        yield from (out.merged(seed, name) for name in (*names, *(key for key, _ in adapters(out, seed))))
        yield from (out.boosted(seed, method) for method in BOOSTED if out.found(seed, method) is not None)


if __name__ == "__main__":
    main()
