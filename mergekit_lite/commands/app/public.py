"""The page where anybody may use it, as on a space of the hub: models of the hub alone, within bounds.

Whatever a visitor's text can make slow is done in a process of its own, which is ended when its time is over.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mergekit_lite.checkpoint import hub
from mergekit_lite.checkpoint.formats import SUFFIXES
from mergekit_lite.checkpoint.stores.addresses import hub_url
from mergekit_lite.commands.app.places import ELSEWHERE, Places
from mergekit_lite.commands.app.planned import SOURCE, Planned
from mergekit_lite.commands.app.runs import PROGRAM, STREAM, Runs, ask
from mergekit_lite.commands.units import size
from mergekit_lite.errors import MergekitLiteError, UsageError, counted
from mergekit_lite.plain_text import plain
from mergekit_lite.recipe import RecipeError, parse
from mergekit_lite.yaml_document import Remark, read_documents

OUTPUT = "merged"  # what every run makes: a visitor chooses no name on this machine
MOST_TEXT = 100_000  # characters of a recipe
MOST_READ = 20_000_000_000  # bytes of models for one run, or one comparison
MOST_WRITTEN = 10_000_000_000
SECONDS_TO_RUN = 1800
SECONDS_TO_LOOK = 120  # for a plan, and for what a model is made of
SECONDS_KEPT = 600  # for which an output is there at least, before the next run replaces it
TERMS = (
    f"One run at a time, for all visitors, who all see it and may download what it made. It reads up to "
    f"{size(MOST_READ)} and writes up to {size(MOST_WRITTEN)}, in {SECONDS_TO_RUN // 60} minutes at most. Its output "
    f"stays for {SECONDS_KEPT // 60} minutes; then the next run replaces it."
)


@dataclass(frozen=True)
class PublicPlaces(Places):
    """A root of which nothing may be read, and the hub."""

    is_public = True

    def refusal(self, reference: str) -> str:
        """Return why a text is refused where it may be a reference: whatever lies on this machine or at an address."""
        parts = {reference, *re.split("[+:=>]", reference)} - {""}
        if (
            any(os.path.lexists(self.root / part) for part in parts)
            or ELSEWHERE.search(reference)
            or super().refusal(reference)
        ):
            return f"{reference!r}: this page reads models of the hub alone, as org/name or org/name@revision"
        return ""

    def missing(self, reference: str) -> str:
        """Return why a model is none of the hub; empty where it may be one. Sums are left to what opens them."""
        if re.search("[+:=]", reference) or hub.is_repository(reference):
            return ""
        return f"{reference!r} is not the name of a model on the hub: org/name or org/name@revision"

    def models(self) -> list[str]:
        """Return no models: the hub's are named by whoever looks for them."""
        return []


def public_runs(root: Path) -> Runs:
    """Return the runs of a public page."""
    return Runs(root, seconds=SECONDS_TO_RUN)


def checked(text: str, places: Places) -> Planned:
    """Look for what is wrong in a recipe's text itself; no model is looked at."""
    try:
        if len(text) > MOST_TEXT:
            raise UsageError(f"The recipe has {len(text):,} characters; this page takes {MOST_TEXT:,}.")
        tree, *others = read_documents(text, SOURCE)
        if others:
            raise RecipeError(SOURCE, [Remark(others[0].at, "this page takes one document; the command takes several")])
        if problems := list(places.problems(tree)):
            raise RecipeError(SOURCE, problems)
        parse(text, SOURCE)
    except RecipeError as error:
        return Planned(text, problems=tuple((each.at.line, each.text) for each in error.problems))
    except MergekitLiteError as error:
        return Planned(text, problems=((None, str(error)),))
    return Planned(text, tree=tree)


def plan(text: str) -> str:
    """Return what ``mergekit-lite plan`` says of a recipe that was checked. Raises UsageError where it takes long."""
    with TemporaryDirectory() as folder:
        return ask(Path(folder), _to_plan(folder, text), SECONDS_TO_LOOK)


def check_size(text: str) -> None:
    """Raise UsageError where a recipe that was checked can't be planned, or is more than one run may do."""
    with TemporaryDirectory() as folder:
        command = [*PROGRAM, *_to_plan(folder, text), "--json"]
        try:
            done = subprocess.run(
                command, cwd=folder, text=True, errors="replace", timeout=SECONDS_TO_LOOK, capture_output=True,
                stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UsageError(f"Planning took longer than {SECONDS_TO_LOOK} s.") from None
    if done.returncode:
        raise UsageError(plain(done.stderr))
    told = json.loads(done.stdout)
    check(told["bytes_to_read"], told["bytes_to_write"])


def _to_plan(folder: str, text: str) -> list[str]:
    Path(folder, "recipe.yml").write_text(text, encoding="utf-8", newline="")
    return ["plan", "recipe.yml", STREAM]


def check(read: int, written: int = 0) -> None:
    """Raise UsageError where these bytes are more than one run may read and write."""
    if read > MOST_READ or written > MOST_WRITTEN:
        raise UsageError(
            f"It reads {size(read)} and writes {size(written)}; this page reads up to {size(MOST_READ)} and writes up "
            f"to {size(MOST_WRITTEN)}. On your own machine: mergekit-lite merge recipe.yml -o ./{OUTPUT} {STREAM}"
        )


def weight_bytes(reference: str) -> int:
    """Return the bytes of a repository's weight files. Raises CheckpointError where the hub has none such."""
    repo, commit, files = hub.listed(reference)
    return sum(
        (told or hub.metadata(reference, hub_url(repo, commit, name)))[0]
        for name, told in files.items()
        if name.endswith(SUFFIXES)
    )


def make_room(runs: Runs) -> None:
    """Remove what the run before left. Raises UsageError where it goes on, or its output was made just now."""
    state = runs.state()
    if state.kind == "running":
        raise UsageError("Somebody's run goes on: one is done at a time.")
    made = runs.root / OUTPUT
    if state.kind == "done" and (left := SECONDS_KEPT - (time.time() - made.stat().st_mtime)) > 0:
        minutes = counted(int(left // 60) + 1, "minute")
        raise UsageError(f"The last output stays for {minutes}, so that it can be downloaded: run yours then.")
    for folder in (made, runs.root / f".{OUTPUT}.partial"):
        if folder.is_dir():
            shutil.rmtree(folder)


def downloads(runs: Runs) -> dict[str, int]:
    """Return the files of the finished output by name, with their bytes; none where there is none."""
    if runs.state().kind != "done":
        return {}
    folder = runs.root / OUTPUT
    return {
        path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()
    }
