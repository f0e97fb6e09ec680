"""CONTRIBUTING's table "to add a … touch …" is true: each row is performed with a toy, in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([a-z ]+) \| (`[^|]*`) \|", TABLE, re.MULTILINE))


@dataclass(frozen=True)
class Toy:
    """What one row adds.

    Attributes:
        new: the text of new files, by path from the package's folder.
        changed: the text that stands after a line of files that exist, by path: (line, text).
        check: a Python script that uses the toy.
    """

    check: str
    new: dict[str, str] = field(default_factory=dict)
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)


STATES = """
import torch
from safetensors.torch import load_file, save_file
save_file({"w": torch.arange(4.0)}, "a.safetensors")
"""

METHOD = '''"""A toy: the one model, made smaller."""

from mergekit_lite.methods.contract import Merge, TensorInfo
from mergekit_lite.methods.parameters import Share
from mergekit_lite.methods.registry import method
from mergekit_lite.ops.operations import WeightedSum


@method(given="models", base="none", models=(1, 1), formula="share·x", source="a toy")
def toy(info: TensorInfo, *, share: Share = 1.0) -> Merge:
    """Make a model smaller.

    Args:
        share: of the model.
    """
    return WeightedSum((share,))
'''

OBJECTIVE = '''

@objective(formula="−ā", source="a toy", when="never", reference=False)
def toy(logps: LogProbs, *, factor: Positive = 2.0) -> Outcome:
    """Raise the chosen responses."""
    chosen, rejected = logps.averages()
    return Outcome(-factor * chosen.mean(1), chosen, rejected[:, 0], chosen.mean(1) - rejected[:, 0])
'''

SCORER = '''"""A toy: the length of an answer."""

from mergekit_lite.answers.scoring.scorer import Judged, Positive, Score, Scorer, ScorerOptions, ScorerSettings, scorer


class Options(ScorerOptions):
    """``times``: what the length is multiplied by."""

    times: Positive = 1


@scorer("toy")
class Toy(Scorer):
    """The answer's length in characters."""

    def __init__(self, settings: ScorerSettings, options: Options):
        self.name, self.times = settings.name, options.times

    def score_one(self, judged: Judged) -> Score:
        """Return the length."""
        return Score(self.times * len(judged.answer))
'''

FORMAT = '''"""A toy: four float32 values under one name, behind four bytes that say so."""

from pathlib import Path

from mergekit_lite.checkpoint.formats.header import Header, WeightFile
from mergekit_lite.checkpoint.tensor import TensorSpec

SUFFIXES = (".toy",)
MODEL_NAMES: tuple[str, ...] = ()
ADAPTER_NAMES: tuple[str, ...] = ()


def read_header(path: Path) -> Header:
    """Read the header of a toy file."""
    file = WeightFile.identify(path, path.read_bytes()[:4])
    return Header(file, {"w": TensorSpec("w", "float32", (4,), path, 4)})
'''

ENCODING = '''"""A toy: values are stored as their negatives."""

from dataclasses import dataclass

from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.checkpoint.tensor import PLAIN, Encoding, TensorSpec


@dataclass(frozen=True, slots=True)
class Negated(Encoding):
    """Negatives of the values."""

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read the elements and negate them."""
        PLAIN.fill(spec, reader, start, out)
        tensor_of(out, spec.dtype).neg_()
'''

SCHEME = '''"""A toy: every tensor is stored under another name."""

from collections.abc import Iterator
from dataclasses import replace

from mergekit_lite.checkpoint.schemes.scheme import Quantised, Stored


def recognise(stored: Stored) -> Iterator[Quantised]:
    """Yield the tensors whose names end so."""
    for name, spec in stored.tensors.items():
        if name.endswith("_toy"):
            yield Quantised(name, {}, replace(spec, name=name.removesuffix("_toy")))
'''

COMMAND = '''"""The command ``toy``."""

import click


@click.command(name="toy")
def command() -> None:
    """Greet.

    Example: mergekit-lite toy
    """
    click.echo("hello from a toy")
'''

TOYS = {
    "merge method": Toy(
        STATES
        + """
import mergekit_lite
from mergekit_lite.commands import main
from click.testing import CliRunner
mergekit_lite.merge("../recipes/methods/toy.yml", "out.safetensors")
assert torch.equal(load_file("out.safetensors")["w"], torch.arange(4.0) / 2)
try:
    recipe = {"merge_method": "toy", "models": [{"model": "a.safetensors"}], "parameters": {"share": 7}}
    mergekit_lite.merge(recipe, "b.safetensors")
    raise SystemExit("share: 7 was not refused")
except mergekit_lite.UsageError as error:
    assert "from 0 to 1" in str(error), error
assert "from 0 to 1" in CliRunner().invoke(main, ["methods", "toy"]).output
""",
        new={
            "methods/toy.py": METHOD,
            "../recipes/methods/toy.yml": "merge_method: toy\nmodels: [{model: a.safetensors}]\n"
            "parameters: {share: 0.5}\n",
        },
    ),
    "objective": Toy(
        """
import torch
from mergekit_lite.distillation.objectives.preference import OBJECTIVES, LogProbs
options = OBJECTIVES["toy"].options({"factor": 3}, [])
ones = torch.ones(1, 1)
assert OBJECTIVES["toy"](LogProbs(ones, ones[0], ones, ones[0]), **options).loss.item() == -3
problems = []
OBJECTIVES["toy"].options({"factor": -1}, problems)
assert problems
""",
        changed={"distillation/objectives/averages.py": ("", OBJECTIVE)},
    ),
    "scorer": Toy(
        """
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Judged, ScorerSettings, names
assert "toy" in names()
settings = ScorerSettings.model_validate({"name": "s", "kind": "toy", "options": {"times": 2}})
with open_scorer(settings) as scorer:
    assert scorer.score([Judged(Prompt("p", (Message(role="user", content="2 + 2"),)), "four")])[0].value == 8
""",
        new={"answers/scorers/toy.py": SCORER},
    ),
    "file format": Toy(
        """
import torch, mergekit_lite
from safetensors.torch import load_file
open("a.toy", "wb").write(b"toy!" + torch.arange(4.0).numpy().tobytes())
mergekit_lite.merge({"merge_method": "passthrough", "models": [{"model": "a.toy"}]}, "out.safetensors")
assert torch.equal(load_file("out.safetensors")["w"], torch.arange(4.0))
""",
        new={"checkpoint/formats/toy.py": FORMAT},
        changed={
            "checkpoint/formats/__init__.py": (
                "FORMATS: tuple[Format, ...] = (safetensors, torch, gguf)",
                "\nfrom mergekit_lite.checkpoint.formats import toy\nFORMATS += (toy,)",
            )
        },
    ),
    "encoding": Toy(
        STATES
        + """
from dataclasses import replace
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.encodings.toy import Negated
from mergekit_lite.checkpoint.reader import Reader
spec = replace(open_checkpoint("a.safetensors").tensors["w"], encoding=Negated())
with Reader() as reader:
    assert torch.equal(spec.elements(reader, 1, 3), -torch.arange(1.0, 4.0))
""",
        new={"checkpoint/encodings/toy.py": ENCODING},
    ),
    "scheme of quantised weights": Toy(
        """
import torch, mergekit_lite
from safetensors.torch import load_file, save_file
save_file({"w_toy": torch.arange(4.0)}, "a.safetensors")
mergekit_lite.merge({"merge_method": "passthrough", "models": [{"model": "a.safetensors"}]}, "out.safetensors")
assert torch.equal(load_file("out.safetensors")["w"], torch.arange(4.0))
""",
        new={"checkpoint/schemes/toy.py": SCHEME},
        changed={
            "checkpoint/quantised.py": (
                "    refused.unclaimed,\n)",
                "\nfrom mergekit_lite.checkpoint.schemes import toy\nSCHEMES += (toy.recognise,)",
            )
        },
    ),
    "operation": Toy(
        """
import torch
from mergekit_lite.ops import TensorKind, ops_for
from mergekit_lite.ops.operations import Halve
ops = ops_for(Halve(), TensorKind(("bfloat16", "bfloat16")))
out = torch.empty(4, dtype=torch.bfloat16)
ops.merge(Halve(), [ops.of_tensor(torch.arange(4.0).bfloat16())], 0, ops.of_tensor(out), 4)
assert torch.equal(out, torch.arange(4.0).bfloat16() / 2)
""",
        changed={
            "ops/operations.py": (
                "# --- operations that merge a block",
                '\n\n\n@dataclass(frozen=True)\nclass Halve:\n    """Half of the block\'s first tensor."""\n\n',
            ),
            "ops/torch_ops.py": (
                "        case op.Cast():\n            return block[0]",
                "\n        case op.Halve():\n            return block[0] / 2",
            ),
        },
    ),
    "command": Toy(
        """
from click.testing import CliRunner
from mergekit_lite.commands import main
assert "hello from a toy" in CliRunner().invoke(main, ["toy"]).output
assert "Greet somebody." in CliRunner().invoke(main, ["--help"]).output
""",
        new={"commands/toy.py": COMMAND},
        changed={"commands/__init__.py": ("COMMANDS = {", '\n    "toy": "Greet somebody.",')},
    ),
}


def test_every_row_has_a_toy() -> None:
    assert ROWS.keys() == TOYS.keys()


@pytest.mark.parametrize("what", TOYS)
def test_the_row_is_all_that_it_takes(what: str, tmp_path: Path) -> None:
    """The files of the row, and no others, make the toy work in a copy of the package."""
    toy = TOYS[what]
    touched = {path.replace("NAME", "toy") for path in re.findall(r"`([^`]+)`", ROWS[what])}
    assert touched == {path.removeprefix("../") for path in (*toy.new, *toy.changed)}
    package = tmp_path / "copy" / "mergekit_lite"
    shutil.copytree(ROOT / "mergekit_lite", package)
    (tmp_path / "copy" / "recipes" / "methods").mkdir(parents=True)
    for path, text in toy.new.items():
        (package / path).write_text(text, encoding="utf-8")
    for path, (after, text) in toy.changed.items():
        content = (package / path).read_text(encoding="utf-8")
        assert content.count(after) == 1 or not after, f"{path} has no one place {after!r}"
        begin = content.index(after) if after else len(content)
        end = content.index("\n", begin + len(after)) if after else begin
        (package / path).write_text(content[:end] + text + content[end:], encoding="utf-8")
    work = tmp_path / "copy" / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "copy")}
    ended = subprocess.run(
        [sys.executable, "-c", toy.check], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
