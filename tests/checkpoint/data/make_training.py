"""Make ``training.tar.xz``: checkpoints that two processes wrote, and what their own libraries load from them.

    DS_ACCELERATOR=cpu python -m torch.distributed.run --nproc-per-node 2 tests/checkpoint/data/make_training.py

It needs DeepSpeed (``DS_BUILD_OPS=0 pip install deepspeed``), which isn't needed to run the tests. Made with torch 2.13
and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib
import shutil
import tarfile
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import barrier, get_rank
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

OUT = Path(tempfile.gettempdir(), "training")


class Model(nn.Module):
    """Parameters that two processes can't share evenly, a tied one, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layer = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 3)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.odd = nn.Parameter(torch.ones(3))
        self.register_buffer("counts", torch.arange(3.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.layer(self.embed(tokens)))
        return self.head(hidden).sum() + self.frozen(hidden).mul(self.odd).sum()


def distributed() -> None:
    """Folders of torch.distributed.checkpoint: FSDP2's, torchtitan's keys, other cuts, safetensors shards."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(torch.tensor([[1, 2, 3, get_rank()]])).backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    average = {name: value * 2 for name, value in weights.items()}
    dcp.save(
        {"model": weights, "optim": states, "step": torch.tensor(3), "extra": {"lr": 1.0}}, checkpoint_id=OUT / "fsdp2"
    )
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({**weights, "optimizer": flat, "train_state": {"step": 3}}, checkpoint_id=OUT / "titan")
    dcp.save({"model": weights, "ema": average}, checkpoint_id=OUT / "two")
    grid = torch.arange(6 * 8 * 10.0).view(6, 8, 10)
    cuts = {
        "columns": distribute_tensor(grid[0].clone(), mesh, [Shard(1)]),
        "middle": distribute_tensor(grid.clone(), mesh, [Shard(1)]),
        "last": distribute_tensor(grid.clone(), mesh, [Shard(2)]),
        "replicated": distribute_tensor(grid.clone(), mesh, [Replicate()]),
        "uneven": distribute_tensor(grid[:5, :, 0].clone(), mesh, [Shard(0)]),
        "one_row": distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)]),
        "transposed": grid[1].t().clone().t(),
        "scalar": torch.tensor(2.5),
        "whole": torch.arange(5),
        "empty": torch.empty(0, 4),
    }
    dcp.save(cuts, checkpoint_id=OUT / "cuts")
    weights.pop("head.weight")  # a safetensors file has no tensor twice
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(OUT / "shards"), save_distributed=True))
    barrier()
    if get_rank():
        return
    for folder, keys in (("fsdp2", ["model"]), ("titan", []), ("two", ["ema"]), ("cuts", [])):
        dcp_to_torch_save(OUT / folder, OUT / "whole.pt")
        whole = torch.load(OUT / "whole.pt", weights_only=False)
        for key in keys:
            whole = whole[key]
        keep(folder, whole)
    keep("shards", {name: value for name, value in load_file(OUT / "fsdp2.safetensors").items() if name in weights})
    (OUT / "whole.pt").unlink()


def zero(name: str, stage: int, **options: int) -> None:
    """A folder of DeepSpeed after two steps, with two groups of parameters."""
    torch.manual_seed(stage)
    model = Model()
    trained = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in trained if each.dim() < 2], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **options},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=config)
    for _ in range(2):
        engine.backward(engine(torch.tensor([[1, 2, 3, get_rank()]])))
        engine.step()
    engine.save_checkpoint(str(OUT / name), tag="global_step2")
    barrier()
    if get_rank() == 0:
        for script in (OUT / name).glob("*.py"):
            script.unlink()
        if stage:
            keep(name, get_fp32_state_dict_from_zero_checkpoint(str(OUT / name)))


def keep(name: str, content: dict[str, object]) -> None:
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors")


def main() -> None:
    # Its operation for shared memory would have to be compiled first.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    distributed()
    for stage in range(4):
        zero(f"zero{stage}", stage)
    zero("zero3-groups", 3, sub_group_size=40)
    if get_rank() == 0:
        with tarfile.open(Path(__file__).with_name("training.tar.xz"), "w:xz") as archive:
            archive.add(OUT, "training")
    barrier()
    shutil.rmtree(OUT, ignore_errors=True)


main()
