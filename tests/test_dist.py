"""What `make dist` has built, installed where there is no compiler and nothing of this checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from mergekit_lite import merge_states
from tests.models import read_folder, state, tuned, write_folder

pytestmark = pytest.mark.slow

DIST = Path(__file__).parents[1] / "dist"
RECIPE = """\
merge_method: ties
base_model: base
models: [{model: math}, {model: code}]
parameters: {density: 0.5, weight: 1}
"""
CHECK = """\
import sys
import mergekit_lite
from mergekit_lite.ops import c_ops

assert mergekit_lite.__file__.startswith(sys.prefix), mergekit_lite.__file__
assert c_ops.compiled() is not None
mergekit_lite.merge("recipe.yml", "merged")
assert "torch" not in sys.modules, "the kernels merge without it"
assert mergekit_lite.verify("merged").sound
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = list(DIST.glob("*.whl"))
    assert len(wheels) == 1, "make dist builds the wheel that this tests"
    return wheels[0]


def test_the_source_package_has_all_that_a_build_needs() -> None:
    [source] = DIST.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "mergekit_lite/ops/kernels.c", "mergekit_lite/py.typed"} <= names


def test_the_wheel_is_of_a_platform_and_of_no_python(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none") and platform != "any"
    assert not platform.startswith("linux_"), "on Linux the tag says which glibc is needed"


def test_it_installs_without_a_compiler_and_merges_by_kernels(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, env={"PATH": ""})
    [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if "-packages" in path]  # but for what is installed from this checkout
    (packages / "dependencies.pth").write_text("\n".join(dependencies))

    base = {name: tensor.bfloat16() for name, tensor in state(0).items()}
    models = [tuned(base, 1), tuned(base, 2)]
    for name, tensors in zip(("base", "math", "code"), (base, *models), strict=True):
        write_folder(tmp_path / name, tensors)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    ended = subprocess.run(
        [str(python), "-c", CHECK], cwd=tmp_path, capture_output=True, text=True, check=False, env={}
    )
    assert ended.returncode == 0, ended.stderr
    wanted = merge_states("ties", base, models, density=0.5, weight=1.0)
    for name, tensor in read_folder(tmp_path / "merged").items():
        assert torch.equal(tensor, wanted[name])
