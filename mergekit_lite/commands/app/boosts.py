"""A search from the page: the command that its fields say, and what of it the page doesn't start."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.exceptions import Exit

from mergekit_lite.boosting import record
from mergekit_lite.boosting.measure import scores as scoring
from mergekit_lite.boosting.measure.scores import NLL, PAIRS
from mergekit_lite.commands import boost
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import planned
from mergekit_lite.commands.app.runs import Kind, State, shown_command
from mergekit_lite.errors import MergekitLiteError, UsageError, listing
from mergekit_lite.input_files import read_json, read_text
from mergekit_lite.plain_text import plain

MOST_RECIPE = 1_000_000  # bytes
DATA = (".jsonl", ".parquet", ".txt")
MOST_FILES = 500
# Kinds of scores that the page starts: they run no code but the package's, and ask no server.
SCORES = ("maths", "exact", "reward", "pairs", "log_ratio", "nll")
# Options of the command that the page takes: they name files below the root, or are numbers and choices.
OPTIONS = {
    "models", "output", "recipe", "tune", "steps", "scores", "prompts", "pairs", "limit", "search", "start", "step",
    "final_step", "grid", "trials", "limits", "confidence", "held_out", "all_items", "temperature", "top_p",
    "max_tokens", "samples", "batch_size", "no_kl", "parallel", "at_once", "include", "exclude", "new_rows",
    "out_dtype", "rounding", "shard_size", "seed", "threads", "device", "sync",
}  # fmt: skip


def folder_of(root: Path, output: str) -> Path:
    """Return the folder of the search that makes an output: the command's own."""
    return root / f"{output}.boost"


def _stands(root: Path, state: State) -> str:
    """Return how a search stands that doesn't go on: done once it has chosen, and written what it chose."""
    folder = folder_of(root, state.output)
    if not (folder / "study.json").exists():
        return "failed"
    ended = folder / record.ENDED
    if not ended.exists() or (folder / record.SO_FAR).exists():
        return "stopped"
    return "done" if read_json(ended).get("chosen") is None or (root / state.output).exists() else "stopped"


BOOST = Kind("boost", _stands)


def boost_arguments(
    places: Places, base: str, tuned: str, data: str, score: str, alphas: str, output: str, more: str
) -> list[str]:
    """Return the command that the fields of the page say, unless it would reach out of the page's places.

    The command checks all else itself.

    Args:
        places: what may be read.
        base: the model before alignment; empty, with ``tuned``, where ``more`` names a recipe.
        tuned: the model after it.
        data: a file with prompts, or with pairs for the score ``pairs``.
        score: as ``--score`` takes it.
        alphas: the grid's, ``0.1,0.2``; empty for the command's own search.
        output: a name in the root.
        more: further options, as they are typed.

    Raises:
        UsageError: it would; or the fields make no command.
    """
    try:
        further = shlex.split(more or "")
    except ValueError as error:
        raise UsageError(f"Further options: {error}.") from None
    name = places.output(output)
    for path in (places.root / name, folder_of(places.root, name)):
        if path.exists():
            raise UsageError(f"{path.name} exists in {places.root}: take another name.")
    kind = "--pairs" if (score or "").partition(",")[0] == PAIRS else "--prompts"
    models = [each for each in (base, tuned) if each]
    given = [(kind, data), ("--score", score), ("--grid", alphas), ("-o", name)]
    options = [part for option, value in given if value for part in (option, value)]
    arguments = ["boost", *models, *(["--search", "grid"] if alphas else []), *options, *further]
    if problems := list(dict.fromkeys(_problems(places, _parsed(arguments), name))):
        raise UsageError(problems[0] if len(problems) == 1 else listing("The page doesn't start this", problems))
    return arguments


def data_files(places: Places) -> list[str]:
    """Return the files below the root that may hold prompts, pairs or texts, but those of searches and hidden ones."""
    found = _with_endings(places.root, 2)
    return [path.relative_to(places.root).as_posix() for path in found if places.may_read(path)][:MOST_FILES]


def _with_endings(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return
    yield from (path for path in entries if path.suffix in DATA and path.is_file())
    for path in entries:
        if depth and path.is_dir() and not path.is_symlink() and path.suffix != ".boost":
            yield from _with_endings(path, depth - 1)


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options that are given, as the command reads them. Raises UsageError where it would not."""
    try:
        context = boost.command.make_context("boost", list(arguments[1:]))
    except click.ClickException as error:
        raise UsageError(f"{plain(error.format_message())} ({shown_command(list(arguments))})") from None
    except Exit:
        raise UsageError("The help is shown where one types: mergekit-lite boost --help.") from None
    usual = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    given = {name: value for name, value in context.params.items() if context.get_parameter_source(name) not in usual}
    return {name: value for name, value in given.items() if value is not None and value != ()}


def _problems(places: Places, given: dict[str, Any], output: str) -> Iterator[str]:
    """Yield why the page doesn't start this search."""
    if str(given.get("output", "")) != output:
        yield "the output is the name above: leave -o out of the further options"
    written = {option.name: max(option.opts, key=len) for option in boost.command.params}
    for name in sorted(given.keys() - OPTIONS):
        yield (
            f"{written[name]} is left to the command line: the page runs on this machine alone, writes "
            "below its root, and starts nobody's code"
        )
    for path in (*given.get("prompts", ()), given.get("pairs"), given.get("recipe")):
        if path is not None:
            yield from filter(None, [places.refusal(str(path))])
    for reference in given.get("models", ()):
        yield from _of_model(places, reference)
    yield from _of_scores(places, given.get("scores", ()))
    recipe = given.get("recipe")
    if recipe is not None and not places.refusal(str(recipe)):
        try:
            result = planned(read_text(places.root / recipe, MOST_RECIPE), output, places)
        except MergekitLiteError as error:
            yield str(error)
            return
        yield from (f"{recipe}{f', line {line}' if line else ''}: {said}" for line, said in result.problems)


def _of_model(places: Places, reference: str) -> Iterator[str]:
    """Yield what is wrong with a model, or with the checkpoints that a pattern or a folder stands for."""
    if why := places.refusal(reference) or ("" if has_magic(reference) else places.missing(reference)):
        yield why
        return
    place = str(places.root / reference)
    inside = glob(place if has_magic(reference) else f"{place}/*")  # noqa: PTH207  (Path.glob takes no absolute one)
    yield from filter(None, map(places.refusal, filter(os.path.isdir, inside)))


def _of_scores(places: Places, texts: Sequence[str]) -> Iterator[str]:
    for spec in scoring.parse(texts):
        if spec.kind not in SCORES:
            yield (
                f"--score {spec.kind} is left to the command line: the page takes {', '.join(SCORES)}, which run no "
                "code but the package's and ask no server"
            )
            continue
        named = [] if spec.scorer is None else list(_texts(spec.scorer.model_dump(exclude={"name", "kind"})))
        files = [spec.target] if spec.kind == NLL else []
        yield from filter(None, map(places.refusal, (*named, *files)))
        if spec.scorer is not None and spec.scorer.server is not None:
            yield "the page asks no server: leave server out of --score"
        elif spec.scorer is not None and spec.scorer.model:
            yield from filter(None, [places.missing(spec.scorer.model)])


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
