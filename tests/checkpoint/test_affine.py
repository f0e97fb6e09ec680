"""Weights as MLX quantises them: what is read is what ``mlx.core.dequantize`` gives, bit for bit.

``data/mlx.safetensors`` was written by mlx 0.32.4 on a CPU: for each layer ``weight``, ``scales`` and ``biases`` of
``mlx.core.quantize``, and under ``expected`` the dequantised weight; bits and groups are in its metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.encodings import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError
from tests.models import same_bytes

FILE = Path(__file__).parent / "data" / "mlx.safetensors"
STORED = load_file(FILE)
with safe_open(FILE, "pt") as opened:
    LAYERS = json.loads(opened.metadata()["layers"])
EXPECTED = {name.replace("expected", "weight"): STORED[name] for name in STORED if name.endswith("expected")}
GENERAL = {"bits": 4, "group_size": 64}  # of the layers that have no entry of their own: the experts


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **general: object) -> Path:
    """Write a model folder of MLX's layers, with its bits and groups in the config."""
    folder.mkdir()
    quantization = LAYERS | GENERAL | general
    config = {"model_type": "tiny", "quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    plain = {name: value for name, value in STORED.items() if not name.endswith("expected")}
    save_file(tensors or plain | {"norm.weight": torch.ones(7)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("piece", [1 << 20, 40, 24])
def test_values_are_those_of_mlx(tmp_path: Path, piece: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "q"))
    assert checkpoint.tensors.keys() == {*EXPECTED, "norm.weight"}
    with Reader() as reader, mock.patch.object(pieces, "PIECE", piece):
        for name, expected in EXPECTED.items():
            spec = checkpoint.tensors[name]
            assert spec.shape == tuple(expected.shape)
            values = spec.elements(reader, 0, spec.numel).view(expected.shape)
            assert values.dtype == expected.dtype and same_bytes(values, expected), name
            middle = spec.elements(reader, 61, spec.numel - 100)
            assert same_bytes(middle, expected.flatten()[61 : spec.numel - 39]), name


def test_codes_are_not_taken_for_weights(tmp_path: Path) -> None:
    sft = write(tmp_path / "q")
    dpo = tmp_path / "dpo"
    dpo.mkdir()
    (dpo / "config.json").write_text('{"model_type": "tiny"}')
    tuned = {name: (value.float() + 0.5).to(value.dtype) for name, value in EXPECTED.items()}
    save_file(tuned | {"norm.weight": torch.ones(7)}, dpo / "model.safetensors")
    mergekit_lite.extrapolate(sft, dpo, tmp_path / "out", alpha=0.5)
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in EXPECTED.items():
        exact = 1.5 * tuned[name].double() - 0.5 * value.double()
        torch.testing.assert_close(out[name].double(), exact, rtol=2**-7, atol=0)
    result = CliRunner().invoke(main, ["extrapolate", str(dpo), str(sft), "-o", str(tmp_path / "back"), "--alpha", "0"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert same_bytes(load_file(tmp_path / "back" / "model.safetensors")["bf16.4.weight"], EXPECTED["bf16.4.weight"])


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ({"bits": 7}, "got 7 and 64"),
        ({"group_size": None}, "got 4 and None"),
        ({"group_size": 32}, "doesn't fit 4 bits in groups of 32"),
        ({"mode": "mxfp4"}, "quantised in the mode 'mxfp4' of MLX, which isn't read"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, general: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.weight") as refused:
        open_checkpoint(write(tmp_path / "q", **general))
    assert message in str(refused.value)


def test_codes_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="uint32 with scales, as MLX writes them"):
        open_checkpoint(FILE)  # no config
    with pytest.raises(CheckpointError, match=r"in no scheme that is known: 1 tensor, such as w\.weight"):
        open_checkpoint(write(tmp_path / "q", {"w.weight": torch.ones(3, 4, dtype=torch.uint32)}))
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "position_ids": torch.zeros(1, 9).int()}
    assert open_checkpoint(write(tmp_path / "m", masks)).tensors.keys() == masks.keys()
