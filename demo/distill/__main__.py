"""``make demo-distill``: three strong models of other architectures teach a small one, on three roads.

    SFT → DPO            on the target's own answers
    SFT → WRPO           on the target's own answers and the sources' best ones
    SFT → dpo_norm       FuseChat-3.0: on pairs of the sources' answers

Once the four models are there, ``mergekit-lite distill`` does the rest with recipes that lie in the output folder; then
``mergekit-lite extrapolate`` goes past the end of each road, and ``mergekit-lite merge`` makes one model of the three.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Template

from demo.distill import page, results, skills
from demo.distill.jobs import Job, command, console, mergekit_lite, python, run, serving, stage
from demo.distill.making import Lesson, make_models
from demo.distill.plan import ALPHAS, CAREFUL, FULL, LEARNT, MERGES, QUICK, ROADS, Out, Size

RECIPES = Path(__file__).parent / "recipes"


@command("demo/out-distill", FULL, QUICK, "How often the roads are gone.")
def main(out: Path, seeds: tuple[int, ...], size: Size) -> None:
    """Make four models, distill three into the fourth on three roads, and say which road was best.

    What is in the output folder already is used again: a run that was stopped goes on.
    """
    there = Out(out, seeds)
    with stage("Four models: three sources of different architectures and tokenizers, and the target"):
        make_models(lessons(there, size), there.logs)
    write_prompts(there, size)
    distill(there, size)
    extrapolate(there)
    merge(there)
    alphas = evaluate(there)
    page.write(there, alphas, console)


def lessons(out: Out, size: Size) -> Iterator[Lesson]:
    for name, learnt in LEARNT.items():
        careful = CAREFUL if name == "target" else 1.0
        yield Lesson(out.model(name), f"demo.distill.models:{name}", learnt, size.steps[name], careful)


def write_prompts(out: Out, size: Size) -> None:
    """Prompts to train on, others to choose alphas by, and others to judge by."""
    rows: dict[str, list[str]] = {"train": [], "choosing": [], "held-out": []}
    for name in skills.SKILLS:
        rng = random.Random(name)
        unseen = skills.questions(name, size.choosing + size.held_out, rng, held_out=True)
        rows["train"] += skills.questions(name, size.prompts, rng)
        rows["choosing"] += unseen[: size.choosing]
        rows["held-out"] += unseen[size.choosing :]
    for name, asked in rows.items():
        skills.write_rows(out.prompts(name), map(skills.as_row, asked))


def distill(out: Out, size: Size) -> None:
    """Let the sources answer once for each seed, then run each recipe to its end."""
    first, *others = ROADS
    with stage("The sources answer; one of them is behind a server"):
        with serving(python("demo.distill.server", out.model("gpt2")), out.logs / "server.log") as address:
            write_recipes(out, address, size)
            run(
                [
                    Job(f"seed {seed}: the sources answer", mergekit_lite("distill", "sample", out.recipe(seed, first)))
                    for seed in out.seeds
                ],
                out.logs,
            )
        for seed in out.seeds:
            for road in others:
                share(out.run(seed, first), out.run(seed, road))
    with stage("Scores, pairs, SFT, preferences"):
        run(
            [
                Job(f"seed {seed}: {road}", mergekit_lite("distill", "run", out.recipe(seed, road)))
                for seed in out.seeds
                for road in ROADS
            ],
            out.logs,
        )


def write_recipes(out: Out, server: str, size: Size) -> None:
    """Write a recipe for each seed and road, from what all roads share and what is a road's own."""
    common = (RECIPES / "common.yaml").read_text()
    for seed in out.seeds:
        for road in ROADS:
            path = out.recipe(seed, road)
            path.parent.mkdir(exist_ok=True)
            text = Template(common + (RECIPES / f"{road}.yaml").read_text())
            path.write_text(
                text.substitute(seed=seed, road=road, server=server, batch=size.batch, correct=size.correct)
            )


def share(one: Path, other: Path) -> None:
    """Give a recipe's folder the prompts and answers of another one that asks the same."""
    if other.exists():
        return
    partial = other.with_name(f"{other.name}.partial")
    shutil.copytree(one / "samples", partial / "samples", dirs_exist_ok=True)
    shutil.copyfile(one / "prompts.jsonl", partial / "prompts.jsonl")
    partial.rename(other)  # what has its name is complete


def extrapolate(out: Out) -> None:
    alphas = ",".join(f"{alpha:g}" for alpha in ALPHAS)
    jobs = []
    for seed in out.seeds:
        for road in ROADS:
            pair = (out.trained(seed, road, "sft"), out.trained(seed, road, "preference"))
            how = ("--alpha", alphas, "--output", out.expo(seed, road, "{alpha}"), "--force")
            jobs.append(Job(f"seed {seed}: past {road}", mergekit_lite("extrapolate", *pair, *how)))
    with stage(f"ExPO: from SFT through the end of each road and on, alpha {alphas}"):
        run(jobs, out.logs)


def merge(out: Out) -> None:
    jobs = []
    for seed in out.seeds:
        for method in MERGES:
            folder = out.merged(seed, method)
            folder.parent.mkdir(exist_ok=True)
            recipe = folder.with_suffix(".yaml")
            text = Template((RECIPES / f"merge-{method}.yaml").read_text())
            recipe.write_text(text.substitute(seed=seed, out=out.root))
            jobs.append(
                Job(f"seed {seed}: merged by {method}", mergekit_lite("merge", recipe, "-o", folder, "--force"))
            )
    with stage("The three targets of each seed, merged"):
        run(jobs, out.logs)


def evaluate(out: Out) -> dict[str, float]:
    """Extrapolated models on prompts that choose alphas; all that count on others. Returns each road's alpha."""
    roads = [(seed, road) for seed in out.seeds for road in ROADS]
    stages = [out.trained(seed, road, stage) for seed, road in roads for stage in ("sft", "preference")]
    with stage("Scoring on questions that no model has learnt from"):
        tried = [out.expo(seed, road, f"{alpha:g}") for seed, road in roads for alpha in ALPHAS]
        results.score(out, "choosing", [*stages, *tried])
        choosing = results.Results(out, "choosing")
        alphas = {road: results.best_alpha(choosing, road) for road in ROADS}
        once = [out.model(name) for name in LEARNT]
        expo = [out.expo(seed, road, f"{alphas[road]:g}") for seed, road in roads]
        merged = [out.merged(seed, method) for seed in out.seeds for method in MERGES]
        results.score(out, "held-out", [*once, *stages, *expo, *merged])
    return alphas


if __name__ == "__main__":
    main()
