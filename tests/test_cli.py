"""The command line: help, exit codes, plain and machine-readable output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mergekit_lite.commands import COMMANDS, main
from mergekit_lite.extrapolation import default_output
from mergekit_lite.methods import METHODS, merge_states
from mergekit_lite.ops import c_ops
from tests.models import read_folder, state, tree_bytes, tuned, write_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sft = state(0)
    write_folder(tmp_path / "sft", sft)
    write_folder(tmp_path / "dpo", tuned(sft, 1, rms=1e-5))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_of_every_command_has_an_example() -> None:
    for arguments in ([], *([name] for name in COMMANDS)):
        code, told, _ = invoke(*arguments, "--help")
        assert code == 0
        assert "Example" in told and "mergekit-lite " in told.split("Example")[1]


def test_help_and_a_refused_plan_import_neither_torch_nor_transformers(pair: Path) -> None:
    for arguments in (
        ["--help"],
        ["extrapolate", "--help"],
        ["extrapolate", "sft", "nowhere", "--alpha", "1", "-o", "x"],
    ):
        code = (
            "import sys, atexit; from mergekit_lite.commands import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "assert not {'torch', 'transformers'} & sys.modules.keys()"
        )
        result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


HALF = {"density": 0.5, "weight": 0.5}
BY_KERNELS: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.75},
    "task_arithmetic": {"weight": 0.75},
    "expo": {"alpha": 0.25},
    "slerp": {"t": 0.25},
    "karcher": {},
    "model_stock": {},
    "sce": {},
    "varm": {},
    "dare_ties": HALF,
    "della_linear": {**HALF, "epsilon": 0.1},
    "ties": HALF,
    "breadcrumbs": {**HALF, "gamma": 0.05},
}
BY_TORCH: dict[str, dict[str, object]] = {"nearswap": {"t": 0.001}, "sce": {"select_topk": 0.5}}


@pytest.mark.parametrize(
    ("method", "parameters", "by_torch"),
    [(*case, False) for case in BY_KERNELS.items()] + [(*case, True) for case in BY_TORCH.items()],
)
def test_torch_is_imported_where_there_is_no_kernel(
    tmp_path: Path, method: str, parameters: dict[str, object], by_torch: bool
) -> None:
    """From the recipe to the manifest; and the memory that the plan tells of knows it."""
    by_torch = by_torch or c_ops.compiled() is None
    count = 1 if method in ("expo", "slerp", "nearswap") else 2
    base = {name: tensor.half() for name, tensor in state(1, hidden=64).items()}
    models = [tuned(base, 2 + number) for number in range(count)]
    folders = [write_folder(tmp_path / str(number), tensors) for number, tensors in enumerate([base, *models])]
    recipe = {
        "merge_method": method,
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    has_base = method not in ("linear", "karcher")
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe | {"base_model": str(folders[0])} if has_base else recipe))
    code = (
        "import sys; from mergekit_lite.merging import plan_merge; from mergekit_lite.engine.run import run\n"
        "from mergekit_lite.engine.memory import WITH_TORCH, memory_estimate\n"
        f"plan = plan_merge({str(tmp_path / 'recipe.yml')!r}, {str(tmp_path / 'out')!r})\n"
        f"assert (memory_estimate(plan, 1) > WITH_TORCH) is {by_torch}\n"
        "assert run(plan).outputs\n"
        f"assert ('torch' in sys.modules) is {by_torch} and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    wanted = merge_states(method, base if has_base else None, models, dtype=torch.bfloat16, **parameters)
    for name, made in read_folder(tmp_path / "out").items():
        assert torch.equal(made, wanted[name])


@pytest.mark.parametrize("start", [[str(ROOT / "cli.py")], ["-m", "mergekit_lite"]])
def test_the_three_ways_to_start_it(pair: Path, start: list[str]) -> None:
    arguments = ["extrapolate", "sft", "dpo", "--alpha", "0.5", "-o", "out"]
    result = subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    assert "made out" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["sft", "dpo", "-o", "x"], 2, "Give --alpha"),
        (["sft", "dpo", "--alpha", "much", "-o", "x"], 2, "'much' is not a number"),
        (["sft", "dpo", "--alpha", "nan", "-o", "x"], 2, "'nan' is not a number"),
        (["sft", "dpo", "--alpha", "1,1", "-o", "x{alpha}"], 2, "given twice"),
        (["sft", "dpo", "--alpha", "1,2", "-o", "x"], 2, "{alpha}"),
        (["sft", "dpo", "--alpha", "1", "-o", "x", "--alpha-for", "norm"], 2, "REGEX=ALPHA"),
        (["sft", "dpo", "--alpha", "1", "-o", "x", "--shard-size", "5 apples"], 2, "is not a size"),
        (["sft", "dpo", "--alpha", "1", "-o", "x", "--out-dtype", "bfloat61"], 2, "Did you mean 'bfloat16'"),
        (["sft", "dpo", "--alpha", "1", "-o", "x", "--device", "abacus"], 2, "Unknown device"),
        (["sft", "dpo", "--alpha", "1", "-o", "x", "--alfa", "1"], 2, "No such option"),
        (["sft", "dop", "--alpha", "1", "-o", "x"], 1, "'dpo'"),
        (["sft", "dpo", "--alpha", "1", "-o", "x", "--exclude", "nrom"], 1, "matches no tensor"),
        (["sft", "dpo", "--alpha", "1", "-o", "sft"], 2, "Inputs are never touched"),
        (["sft", "dpo", "--alpha", "1", "-o", ".", "--force"], 2, "Inputs are never touched"),
        (["sft", "dpo", "--alpha", "1", "-o", "/", "--force"], 2, "can't be an output"),
        (["sft", "dpo", "--alpha", "1", "-o", "sft/config.json/x"], 2, "Inputs are never touched"),
    ],
)
def test_mistakes_give_one_message_and_the_right_code(pair: Path, arguments: list[str], code: int, told: str) -> None:
    got, _, err = invoke("extrapolate", *arguments)
    assert (got, told in err) == (code, True), err
    assert sorted(path.name for path in pair.iterdir()) == ["dpo", "sft"]


def test_dry_run_prints_the_plan_and_writes_nothing(pair: Path) -> None:
    code, told, _ = invoke(
        "extrapolate", "sft", "dpo", "--alpha", "0.1,0.3", "-o", "x{alpha}", "--dry-run", "--exclude", "norm"
    )
    assert code == 0
    for part in (
        "x0.1",
        "x0.3",
        "expo alpha 0.1 | alpha 0.3",
        "copy (excluded)",
        "bfloat16",
        "of memory",
    ):
        assert part in told
    code, told, _ = invoke("extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "x", "--dry-run", "--json")
    assert len(json.loads(told)["tensors"]) == len(state(0))
    assert sorted(path.name for path in pair.iterdir()) == ["dpo", "sft"]


def test_an_output_is_named_after_the_aligned_model_and_alpha(pair: Path) -> None:
    code, told, err = invoke("extrapolate", "sft", "./dpo/", "--alpha", "0.3")
    assert code == 0 and err.splitlines()[0] == "Output: dpo-expo-0.3" and told.startswith("made dpo-expo-0.3 ")
    before = tree_bytes(pair)
    code, _, err = invoke("extrapolate", "sft", "dpo", "--alpha", "0.3")
    assert code == 2 and "dpo-expo-0.3: exists. --force replaces it." in err and tree_bytes(pair) == before
    code, told, err = invoke("extrapolate", "sft", "dpo", "--alpha", "0.5,1", "-q")
    assert (code, told) == (0, "") and "Output" not in err
    assert {path.name for path in pair.iterdir()} == {"sft", "dpo", "dpo-expo-0.3", "dpo-expo-0.5", "dpo-expo-1"}
    (pair / ".dpo-expo-2.partial").mkdir()
    code, _, err = invoke("extrapolate", "sft", "dpo", "--alpha", "2")
    assert code == 2 and "an earlier run was not finished" in err


def test_what_a_refused_run_left_is_told_to_another_one_with_both_ways_on(pair: Path) -> None:
    broken = state(1)
    next(iter(broken.values())).view(-1)[0] = torch.nan
    write_folder(pair / "dpo", broken)
    code, _, err = invoke("extrapolate", "sft", "dpo", "-a", "0.3", "-o", "out")
    assert code == 1 and "--resume --allow-nonfinite" in err and "Another recipe for this output needs --force" in err
    for more, expected in (((), 2), (("--resume",), 1)):
        code, _, err = invoke("extrapolate", "dpo", "sft", "-a", "0.3", "-o", "out", *more)
        assert code == expected and ".out.partial" in err
        both = (
            "With the recipe and options that it had --resume goes on with it, --force starts over and throws away what"
        )
        assert both in err
    assert invoke("extrapolate", "dpo", "sft", "-a", "0.3", "-o", "out", "--force", "--allow-nonfinite")[0] == 0


def test_a_file_gives_a_file_of_its_kind_in_the_working_folder(pair: Path) -> None:
    (pair / "runs").mkdir()
    for suffix, source in ((".safetensors", "model.safetensors"), (".pt", None)):
        for name in ("sft", "dpo"):
            file = pair / "runs" / f"{name}{suffix}"
            if source:
                file.write_bytes((pair / name / source).read_bytes())
            else:
                torch.save(read_folder(pair / name), file)
        code, _, err = invoke("extrapolate", f"runs/sft{suffix}", f"runs/dpo{suffix}", "-a", "0.3")
        assert code == 0 and err.splitlines()[0] == f"Output: dpo-expo-0.3{suffix}"
        assert (pair / f"dpo-expo-0.3{suffix}").is_file()


@pytest.mark.parametrize(
    ("aligned", "name"),
    [
        ("org/dpo@main", "dpo-expo-{alpha}"),
        ("org/dpo", "dpo-expo-{alpha}"),
        ("./sft+./lora", "lora-expo-{alpha}"),
        (".", "here-expo-{alpha}"),
        ("../here", "here-expo-{alpha}"),
    ],
)
def test_default_outputs_of_other_references(
    aligned: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_output(aligned) == name


def test_json_result_and_quiet(pair: Path) -> None:
    code, told, _ = invoke("extrapolate", "sft", "dpo", "--alpha", "0.5", "-o", "x", "--json")
    (made,) = json.loads(told)["outputs"]
    assert code == 0
    assert made["path"] == "x" and made["asked"] == pytest.approx(0.5) and made["exact"] is True
    assert len(made["tensors"]) == made["merged"] == len(state(0))
    code, told, _ = invoke("extrapolate", "sft", "dpo", "--alpha", "0.5", "-o", "y", "-q")
    assert (code, told) == (0, "")


def test_methods_are_listed_by_what_a_user_has() -> None:
    """Each once; and adapters, which take any of them."""
    code, told, _ = invoke("methods")
    assert code == 0
    heading, found = "", {}
    for line in told.splitlines():
        if line.endswith(":"):
            heading = line.rstrip(":")
        elif line.startswith("  "):
            assert line.split()[0] not in found
            found[line.split()[0]] = heading
    assert found.keys() == METHODS.keys()
    assert found["relex"] == "checkpoints of one training run" and found["ties"] == "fine-tunes of one base"
    assert found["linear"] not in (found["relex"], found["ties"])
    assert "vector combine --space" in told.splitlines()[-1]


def test_merge_takes_its_output_as_mergekit_does(pair: Path) -> None:
    (pair / "r.yml").write_text("merge_method: linear\nmodels: [{model: sft}, {model: dpo}]\nparameters: {weight: 1}\n")
    assert invoke("merge", "r.yml", "a")[0] == invoke("merge", "r.yml", "-o", "b")[0] == 0
    assert (pair / "a" / "config.json").exists() and (pair / "b" / "config.json").exists()
    for arguments in ([], ["a", "-o", "b"]):
        code, _, err = invoke("merge", "r.yml", *arguments)
        assert code == 2 and "Name one output" in err
    code, told, _ = invoke("plan", "r.yml")
    assert code == 0 and "linear" in told
    code, _, err = invoke("plan", "nothing.yml")
    assert code == 2 and "nothing.yml" in err
    code, told, _ = invoke("methods", "ties")
    assert code == 0 and "Yadav" in told and "subject" not in told
    assert "  density (a number from 0 to 1 for each model, default 1.0): share of each delta's elements that" in told
    assert "  lambda (a number, default 1.0): scales what is added.\n" in told
    code, _, err = invoke("methods", "tise")
    assert code == 2 and "Did you mean 'ties'" in err


def test_the_effective_alpha_is_told_with_the_remedy(pair: Path) -> None:
    _, told, err = invoke("extrapolate", "sft", "dpo", "--alpha", "0.1", "-o", "x")
    assert "effective" in told and "exact" in told
    assert "--rounding stochastic" in err and "--out-dtype float32" in err


def test_deltas_of_the_wrong_size_are_warned_of(pair: Path) -> None:
    write_folder(pair / "far", tuned(state(0), 2, rms=1e-3))
    _, _, err = invoke("extrapolate", "sft", "far", "--alpha", "0.1", "-o", "x", "--dry-run")
    assert "nearer to pretraining→SFT" in err
    _, _, err = invoke("extrapolate", "sft", "sft", "--alpha", "0.1", "-o", "x", "--dry-run")
    assert "RMS(delta) is 0" in err
    _, _, err = invoke("extrapolate", "sft", "dpo", "--alpha", "0.1", "-o", "x", "--dry-run")
    assert "Warning" not in err


def test_helps_are_neither_cut_nor_marked_up() -> None:
    groups = [[], ["vector"], ["distill"], ["moe"]]
    stages = [["vector", name] for name in ("extract", "apply", "combine")]
    stages += [["distill", name] for name in ("run", "sample", "score", "pair", "train", "report")]
    stages += [["moe", name] for name in ("build", "split", "prune", "merge-experts")]
    for arguments in (*groups, *stages, *([name] for name in COMMANDS)):
        code, told, _ = invoke(*arguments, "--help")
        assert code == 0 and "`" not in told, arguments
        listed = told.partition("\nCommands:\n")[2] if arguments in groups else ""
        assert not any(line.endswith(("...", "…")) for line in listed.splitlines()), listed
        assert "Example" in told and "mergekit-lite " in told.split("Example")[1]


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["bost"], "Did you mean 'boost'?"),
        (["vector", "aply"], "Did you mean 'apply'?"),
        (["distill", "trian"], "Did you mean 'train'?"),
        (["merge", "r.yml", "--froce"], "--force"),
    ],
)
def test_what_is_misspelt_has_its_nearest_name_in_the_message(arguments: list[str], nearest: str) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2 and nearest in err


def test_a_python_without_the_dependencies_is_told_what_to_install() -> None:
    result = subprocess.run(
        [sys.executable, "-S", str(ROOT / "cli.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1 and f"-m pip install -e {ROOT}" in result.stderr
