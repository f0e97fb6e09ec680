"""Models with code of their own: named on the hub, copied by the user's word, never run; or what is missing is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.checkpoint.own_code import code_names, from_hub
from mergekit_lite.commands import main
from mergekit_lite.output.companions import companions, what_is_missing
from tests.models import state, tuned, write_folder

AUTO_MAP = {
    "AutoConfig": "configuration_tiny.TinyConfig",
    "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    "AutoModel": "org/other--modeling_other.OtherModel",
}
CONFIG = {"model_type": "tiny", "architectures": ["TinyForCausalLM"], "torch_dtype": "bfloat16", "auto_map": AUTO_MAP}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_tiny.TinyTokenizer", None]}}
RUN = "raise SystemExit('code of a stranger was run')\n"
CODE = {
    "configuration_tiny.py": RUN,
    "modeling_tiny.py": f"{RUN}from .configuration_tiny import TinyConfig\nfrom .layers_tiny import (\n    Layer,\n)\n",
    "layers_tiny.py": f"{RUN}try:\n    from .deep_tiny import x\nexcept ImportError:\n    pass\nfrom os import path\n",
    "deep_tiny.py": f"{RUN}from . import modeling_tiny, kernels_tiny as kernels\n",
    "kernels_tiny.py": RUN,
    "tokenization_tiny.py": RUN,
}
OTHER = {"setup.py": RUN, "modeling_other.py": RUN, "run.sh": "exit 1\n"}


def write_model(folder: Path, seed: int) -> Path:
    write_folder(folder, tuned(state(0), seed), config=CONFIG)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    for name, text in {**CODE, **OTHER}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("sft", "dpo")):
        write_model(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def code_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".py", ".sh")}


def test_without_the_users_word_the_last_line_says_what_is_missing(place: Path) -> None:
    code, told = invoke("extrapolate", "sft", "dpo", "-a", "0.5", "-o", "out")
    last = told.strip().splitlines()[-1]
    assert code == 0 and not code_in(place / "out")
    assert all(name in last for name in CODE) and "setup.py" not in last
    assert f"--copy-code copies these from {place / 'dpo'}" in last
    assert invoke("extrapolate", "sft", "dpo", "-a", "0.5", "--dry-run")[1].strip().splitlines()[-1] == last
    assert last.endswith(invoke("extrapolate", "sft", "dpo", "-a", "0.5", "-o", "again", "-q")[1].strip()[-200:])
    planned = CliRunner().invoke(main, ["extrapolate", "sft", "dpo", "-a", "0.5", "-o", "x", "--dry-run", "--json"])
    assert json.loads(planned.stdout)["missing"] in last


def run_extrapolate(output: str) -> None:
    mergekit_lite.extrapolate("sft", "dpo", output, 0.5, copy_code=True)


def run_merge(output: str) -> None:
    models = [{"model": "dpo", "parameters": {"weight": 1}}, {"model": "sft", "parameters": {"weight": 1}}]
    mergekit_lite.merge({"merge_method": "linear", "models": models}, output, copy_code=True)


def run_apply(output: str) -> None:
    mergekit_lite.extract_vector("sft", "dpo", "v.safetensors")
    mergekit_lite.apply_vectors("dpo", ["v.safetensors:1"], output, rebase=True, copy_code=True)


def run_command(output: str) -> None:
    code, told = invoke("extrapolate", "sft", "dpo", "-a", "0.5", "-o", output, "--copy-code")
    assert code == 0 and "code of its own" not in told
    assert "not copied: setup.py: code" in told and "not copied: modeling_tiny.py" not in told


@pytest.mark.parametrize("run", [run_extrapolate, run_merge, run_apply, run_command])
def test_by_the_users_word_what_the_configs_name_is_copied(run: object, place: Path) -> None:
    assert callable(run)
    run("out")
    assert code_in(place / "out") == CODE
    assert json.loads((place / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert mergekit_lite.verify("out", samples="all").sound
    (place / "out" / "layers_tiny.py").write_text("x")
    [finding] = mergekit_lite.verify("out", samples=0).findings
    assert finding.file == "layers_tiny.py"


def test_code_is_a_part_of_the_plan(place: Path) -> None:
    mergekit_lite.extrapolate("sft", "dpo", "out", 0.5)
    with pytest.raises(mergekit_lite.UsageError, match="is not the result of this run"):
        mergekit_lite.extrapolate("sft", "dpo", "out", 0.5, copy_code=True, resume=True)


def test_what_is_not_there_is_missing_with_the_users_word_too(place: Path) -> None:
    (place / "dpo" / "deep_tiny.py").unlink()
    (place / "dpo" / "configuration_tiny.py").unlink()
    (place / "dpo" / "configuration_tiny.py").symlink_to(place / "sft" / "configuration_tiny.py")
    _, told = invoke("extrapolate", "sft", "dpo", "-a", "0.5", "-o", "out", "--copy-code")
    last = told.strip().splitlines()[-1]
    assert "dpo has no configuration_tiny.py, deep_tiny.py itself" in last and "--copy-code" not in last
    assert code_in(place / "out").keys() == CODE.keys() - {"configuration_tiny.py", "deep_tiny.py", "kernels_tiny.py"}


@pytest.mark.parametrize(
    "named",
    [
        "../secret.Class",
        "/etc/passwd.Class",
        "a/b.Class",
        "a.b.Class",
        "..Class",
        "Class",
        "x.py.Class",
        "a\n.B",
        7,
        {},
    ],
)
def test_a_name_that_leads_elsewhere_is_no_name(named: object, place: Path) -> None:
    (place / "secret.py").write_text(RUN)
    (place / "dpo" / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": named}}))
    (place / "dpo" / "tokenizer_config.json").unlink()
    mergekit_lite.extrapolate("sft", "dpo", "out", 0.5, copy_code=True)
    assert not code_in(place / "out")


def test_the_tokenizers_code_is_the_tokenizers_owners(place: Path) -> None:
    (place / "sft" / "tokenization_tiny.py").write_text("# of sft\n")
    (place / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: dpo}, {model: sft}]\nparameters: {weight: 1}\ntokenizer_source: sft\n"
    )
    mergekit_lite.merge("r.yml", "out", copy_code=True)
    assert code_in(place / "out") == CODE | {"tokenization_tiny.py": "# of sft\n"}


def test_a_model_of_the_hub_names_its_repository(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite.checkpoint import opening

    monkeypatch.setattr(opening.hub, "fetch", lambda reference, **_: place / "dpo")
    plan = mergekit_lite.plan_extrapolation("sft", "org/tiny@v1", "out", 0.5)
    assert what_is_missing(plan) is None and not [name for name in companions(plan)[0] if name.endswith(".py")]
    mergekit_lite.run(plan)
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "org/tiny--configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "org/tiny--modeling_tiny.TinyForCausalLM",
        "AutoModel": "org/other--modeling_other.OtherModel",
    }
    tokenizer = json.loads((place / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["auto_map"] == {"AutoTokenizer": ["org/tiny--tokenization_tiny.TinyTokenizer", None]}


def test_modules_of_sentence_transformers() -> None:
    modules = [
        {"idx": 0, "path": "", "type": "custom_st.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Mine", "type": "a_library.models.Mine"},
    ]
    assert code_names(modules) == ["custom_st.Transformer"]
    assert [each["type"] for each in from_hub(modules, "org/m")] == [
        "org/m--custom_st.Transformer",
        "sentence_transformers.models.Pooling",
        "a_library.models.Mine",
    ]
