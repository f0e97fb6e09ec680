"""The commands of recipes/adapters can be carried out, in their order, on adapters of other ranks and scales."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.commands import main
from tests.adapters import lora, write_adapter
from tests.models import state, write_folder

FILE = Path(__file__).parents[2] / "recipes/adapters/combine.sh"


def test_commands_can_be_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = state(0, hidden=32)
    write_folder(tmp_path / "org/base", base)
    for number, (name, options) in enumerate({"a": {"r": 12}, "b": {"r": 8, "use_rslora": True}}.items()):
        tensors = {}
        for layer in range(2):
            for module in ("self_attn.q_proj", "mlp.up_proj"):
                shape = base[f"model.layers.{layer}.{module}.weight"].shape
                tensors |= lora(f"model.layers.{layer}.{module}", *shape, rank=options["r"], seed=10 * number + layer)
        write_adapter(tmp_path / f"adapter-{name}", tensors, lora_alpha=8, **options)
    found = re.findall(r"^mergekit-lite (.*)$", FILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 7
    for command in found:
        ran = CliRunner().invoke(main, shlex.split(command))
        assert ran.exit_code == 0, (command, ran.output)
        assert (tmp_path / shlex.split(command)[-1] / "adapter_model.safetensors").exists()
