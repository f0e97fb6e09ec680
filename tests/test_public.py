"""The public face: complete for an editor, typed for a user's own files, and it refuses a misspelt option."""

from __future__ import annotations

import inspect
import math
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

import mergekit_lite
from mergekit_lite import BoostOptions, MergekitLiteError, RunOptions, StatisticsOptions, UsageError
from mergekit_lite.boosting.options import RANGES, request_of
from mergekit_lite.boosting.request import Request

ROOT = Path(__file__).parents[1]
NAMES = [name for name in mergekit_lite.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(mergekit_lite, name))]
TAKE_PARAMETERS = ("merge_tensors", "merge_states")  # a method's own, which the method knows
USER_FILE = """\
from pathlib import Path

import mergekit_lite
from mergekit_lite import {names}

print({uses})


def use(progress: dict[str, int]) -> tuple[float | None, ...]:
    def show(done: int, total: int) -> None:
        progress["done"] = done

    plan = plan_extrapolation("sft", Path("dpo"), "out", [0.1, 0.3], alpha_for={{"norm": 0.0}}, rounding="stochastic")
    options: RunOptions = {{"threads": 2, "progress": show}}
    run(plan, **options)
    finished = extrapolate("sft", "dpo", "out", 0.3, new_rows="copy", threads=2, device="cuda", progress=show)
    merge("recipe.yml", Path("out"), shard_size=10**9, resume=True)
    if not verify(finished.outputs[0], samples="all").sound:
        raise UsageError("not sound")
    extract_vector("base", "tuned", "v.safetensors", format="lowrank", energy=0.9)
    apply_vectors("base", ["v.safetensors:0.5"], "half", processes=True)
    combine_vectors(["v.safetensors"], "w.safetensors", "ties", {{"density": 0.2}}, force=True)
    boosted = boost(output="b", scores=["pairs"], sft="sft", aligned="dpo", pairs="p.jsonl", search="grid", trials=3)
    if boosted.finished is not None:
        print(boosted.finished.seconds)
    print(inspect("out", stats=True).doubts, distill("recipe.yaml", skip_missing=True).to_json())
    return compare("base", ["a", "b"], alphas=[0.1]).overall.rms
"""
WRONG_LINES = (
    'extrapolate("sft", "dpo", "out", 0.3, thraeds=2)',
    'extrapolate("sft", "dpo", "out", 0.3, rounding="stohastic")',
    'extrapolate("sft", "dpo", "out", 0.3, new_rows="copi")',
    'merge("recipe.yml", "out", threads="two")',
    'extract_vector("base", "tuned", "v.safetensors", format="spares")',
    'boost(output="b", scores=["pairs"], search="gird")',
    'boost(output="b", scores=["pairs"], tempreature=1)',
)


CONFIG = """\
[mypy]
strict = True
follow_imports = skip
[mypy-mergekit_lite.*]
follow_imports = silent
"""  # errors in this package are silent, as they are where it is installed; reading torch would take minutes


def mypy(file: Path) -> tuple[int, list[str]]:
    """Return the exit code and the errors of ``mypy --strict``, without this repository's settings."""
    (file.parent / "mypy.ini").write_text(CONFIG)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", f"--cache-dir={file.parent}", file.name],
        capture_output=True,
        text=True,
        check=False,
        cwd=file.parent,
        env={"MYPYPATH": str(ROOT)},
    )
    return result.returncode, [line for line in result.stdout.splitlines() if ": error:" in line]


def test_a_users_file_passes_mypy_strict_and_wrong_options_do_not(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    correct = USER_FILE.format(names=", ".join(NAMES), uses=", ".join(f"mergekit_lite.{name}" for name in NAMES))
    file.write_text(correct + "".join(f"\n\n{line}" for line in WRONG_LINES))
    lines = file.read_text().splitlines()
    code, errors = mypy(file)
    assert all(error.startswith("user.py:") for error in errors), "\n".join(errors)
    wrong = [lines[int(error.split(":")[1]) - 1] for error in errors]
    assert code == 1 and sorted(set(wrong)) == sorted(WRONG_LINES), "\n".join(errors)


def test_all_names_are_listed_once_sorted_and_complete_in_an_interpreter() -> None:
    assert set(mergekit_lite.__all__) <= set(dir(mergekit_lite))
    assert sorted(mergekit_lite.__all__) == list(mergekit_lite.__all__)
    assert set(mergekit_lite._MODULE_OF) == set(NAMES)
    for name in NAMES:
        assert getattr(mergekit_lite, name).__name__ == name
    with pytest.raises(AttributeError, match="extraplate"):
        _ = mergekit_lite.extraplate


def test_no_public_name_is_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(mergekit_lite.__path__)}
    assert modules and not modules & set(mergekit_lite.__all__)


def test_importing_the_package_imports_nothing_else_of_weight() -> None:
    code = "import sys, mergekit_lite; sys.exit(bool({'torch', 'numpy', 'click', 'yaml'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_tell_of_each_parameter_and_type_it(name: str) -> None:
    function: Callable[..., object] = getattr(mergekit_lite, name)
    told = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not parameter.empty
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert f"{parameter.name}: " in told or "; see ``" in told, parameter.name
        elif name not in TAKE_PARAMETERS:
            assert "Unpack[" in parameter.annotation


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"plan", "open_checkpoint", *TAKE_PARAMETERS}))
def test_a_misspelt_option_names_the_function_and_the_nearest(name: str) -> None:
    function: Callable[..., object] = getattr(mergekit_lite, name)
    parameters = list(inspect.signature(function).parameters.values())
    required = {p.name: "x" for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    options = [p.name for p in parameters if p.name not in required and p.kind is not p.VAR_KEYWORD]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        other = StatisticsOptions if name.startswith("gather_statistics") else RunOptions
        options += (BoostOptions if name == "boost" else other).__annotations__
    assert options
    for option in options:
        misspelt = option[:-1] + "_" + option[-1]
        with pytest.raises(UsageError) as refused:
            function(**required, **{misspelt: None})
        assert str(refused.value) == f"{name}() has no option {misspelt!r}. Did you mean {option!r}?"


def test_errors_are_of_one_family() -> None:
    kinds = [getattr(mergekit_lite, name) for name in NAMES if name.endswith("Error")]
    assert len(kinds) == 6 and all(issubclass(kind, MergekitLiteError) for kind in kinds)


def test_boost_without_options_is_the_request_of_its_defaults() -> None:
    plain = Request(output=Path("out"), scores=("pairs",), sft="sft", aligned="dpo")
    assert request_of("out", ["pairs"], Path("sft"), "dpo", None, {}) == plain
    defaults: BoostOptions = {"new_rows": "refuse", "rounding": "nearest", "include": [], "temperature": 0.7}
    assert request_of("out", ["pairs"], "sft", "dpo", None, defaults) == plain
    chosen: BoostOptions = {"exclude": ["norm"], "seed": 3, "pairs": "p.jsonl", "max_tokens": 9}
    request = request_of("out", ["pairs"], "sft", "dpo", None, chosen)
    assert request.options == {"exclude": ["norm"], "seed": 3} and request.pairs == Path("p.jsonl")
    assert request.sampling.max_tokens == 9 and request.sampling.top_p == plain.sampling.top_p


@pytest.mark.parametrize(("name", "bounds"), RANGES.items())
def test_numbers_of_boost_have_bounds_from_python_too(name: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    for value in {low - 1, high * 2} - {math.inf}:
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: expected a number from {low:g}"):
            request_of("out", ["pairs"], "sft", "dpo", None, cast("BoostOptions", {name: value}))


def test_wrong_use_from_python_is_an_error_of_the_family(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Name both models"):
        mergekit_lite.boost(output=tmp_path / "out", scores=["pairs"], sft="sft")
    with pytest.raises(UsageError, match=r"nothing\.yaml"):
        mergekit_lite.distill(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="bfloat61"):
        mergekit_lite.compare("base", ["tuned"], dtypes=["bfloat61"])
    with pytest.raises(UsageError, match="Unknown format 'spares'"):
        mergekit_lite.extract_vector("base", "tuned", tmp_path / "v.safetensors", format="spares")
    assert not list(tmp_path.iterdir())
