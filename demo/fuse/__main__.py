"""``make demo-fuse``: three strong models of other architectures and tokenizers teach a small one by what they say of
given answers, on seven roads.

    SFT alone     on answers of people, most of whom are careless
    ULD, MinCE, ALM, P-KL     on the same answers, and on what the teachers say of them token by token
    on-policy     SFT for one epoch, then the student's own answers, of which the teachers say how likely they are
    FuseChat      a student for each teacher, by MinCE, and the three merged by SCE

All are planned for as many tokens of responses. The teachers score the answers once. Then ``mergekit-lite distill``
does the rest with recipes that lie in the output folder.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from string import Template

from demo.distill import results, skills
from demo.distill.jobs import Job, command, console, mergekit_lite, run, stage
from demo.distill.making import Lesson, make_models
from demo.fuse import page
from demo.fuse.plan import CAREFUL, FULL, QUICK, ROADS, STUDENT, TEACHERS, Files, Size

RECIPES = Path(__file__).parent / "recipes"


@command("demo/out-fuse", FULL, QUICK, "How often the roads are gone.")
def main(out: Path, seeds: tuple[int, ...], size: Size) -> None:
    """Make four models, fuse three into the fourth on seven roads, and say which gain is beyond noise.

    What is in the output folder already is used again: a run that was stopped goes on.
    """
    there = Files(out, seeds)
    with stage("Four models: three teachers of different architectures and tokenizers, and the student"):
        make_models(lessons(there, size), there.logs)
    write_questions(there, size)
    write_recipes(there, size)
    teach(there)
    train(there)
    evaluate(there)
    page.write(there, console)


def lessons(out: Files, size: Size) -> Iterator[Lesson]:
    for name, learnt in {**TEACHERS, "student": STUDENT}.items():
        careful = CAREFUL if name == "student" else 1.0
        yield Lesson(out.model(name), f"demo.fuse.models:{name}", learnt, size.steps[name], careful)


def write_questions(out: Files, size: Size) -> None:
    """Write each seed's rows, questions that people have answered; and other questions to judge by."""
    by_seed: dict[int, list[dict[str, str]]] = {seed: [] for seed in out.seeds}
    held_out = []
    for name in skills.SKILLS:
        rng = random.Random(name)
        held_out += skills.questions(name, size.held_out, rng, held_out=True)
        asked = skills.questions(name, size.rows * len(out.seeds), rng)
        for number, seed in enumerate(out.seeds):
            some = asked[number :: len(out.seeds)]
            by_seed[seed] += [answered(question, name, rng) for question in some]
    skills.write_rows(out.prompts("held-out"), map(skills.as_row, held_out))
    for seed, rows in by_seed.items():
        skills.write_rows(out.rows(seed), rows)
    skills.write_rows(out.rows("all"), [row for rows in by_seed.values() for row in rows])


def answered(question: str, skill: str, rng: random.Random) -> dict[str, str]:
    """Return a question with the answer of a person, who may be careless."""
    answer = skills.demonstrate(question, CAREFUL, rng)
    return {"id": question, "prompt": question, "completion": answer, "domain": skill}


def write_recipes(out: Files, size: Size) -> None:
    """Write a recipe for each seed and road, from what all roads share and what is a road's own."""
    out.teaching.parent.mkdir(exist_ok=True)
    write_recipe(out.teaching, "teach", "teach", size, seed=0, rows="all")
    for seed in out.seeds:
        for road in ROADS:
            write_recipe(out.recipe(seed, road), road, f"{seed}-{road}", size, seed=seed, rows=seed)


def write_recipe(path: Path, road: str, folder: str, size: Size, **values: object) -> None:
    parts = ["common", *(["teachers"] if road != "sft" else []), road]
    text = "\n".join((RECIPES / f"{part}.yaml").read_text() for part in parts)
    path.write_text(Template(text).substitute(folder=folder, batch=size.batch, asked=size.asked, **values))


def teach(out: Files) -> None:
    """Let each teacher score the rows of all seeds, once, and give what it said to every road."""
    roads = [road for road, stages in ROADS.items() if "fuse" in stages]
    lacking = [folder for seed in out.seeds for road in roads if not (folder := out.run(seed, road) / "teach").exists()]
    if not lacking:
        return
    with stage("The teachers say how likely the answers are, token by token"):
        for command in ("sample", "score", "pair", "teach"):
            run([Job(f"rows: {command}", mergekit_lite("distill", command, out.teaching))], out.logs)
    for folder in lacking:
        share(out.taught, folder)


def share(one: Path, other: Path) -> None:
    """Give a recipe's folder what another one has."""
    partial = other.with_name(f"{other.name}.partial")
    shutil.copytree(one, partial, dirs_exist_ok=True)
    partial.rename(other)  # what has its name is complete


def train(out: Files) -> None:
    """Run each road's recipe to its end, unless that is there."""
    jobs = [
        Job(f"seed {seed}: {road}", mergekit_lite("distill", "run", out.recipe(seed, road)))
        for seed in out.seeds
        for road in ROADS
        if not out.end(seed, road).exists()
    ]
    with stage("Seven roads"):
        run(jobs, out.logs)


def evaluate(out: Files) -> None:
    """Let every model answer questions that none has learnt from."""
    models = [out.model(name) for name in (*TEACHERS, "student")]
    models += [out.end(seed, road) for seed in out.seeds for road in ROADS]
    models += [out.pairwise(seed, teacher) for seed in out.seeds for teacher in TEACHERS]
    with stage("Scoring on questions that no model has learnt from"):
        results.score(out, "held-out", models)


if __name__ == "__main__":
    main()
