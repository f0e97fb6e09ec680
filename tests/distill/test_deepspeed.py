"""DeepSpeed as ``accelerate config`` sets it up: whose numbers go, and that it trains as one process does."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest

from mergekit_lite.distillation.training import deepspeed
from tests.distill.launching import Two

pytest.importorskip("accelerate")


def arguments(config: dict, stage: int = 3) -> SimpleNamespace:
    """What ``fit`` reads of transformers' arguments: two processes, two rows at a time, four times."""
    plugin = SimpleNamespace(deepspeed_config=config, zero_stage=stage, gradient_accumulation_steps=1)
    own = {"learning_rate": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8, "weight_decay": 0.0}
    numbers = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "world_size": 2}
    return SimpleNamespace(deepspeed_plugin=plugin, max_grad_norm=1.0, bf16=True, fp16=False, **numbers, **own)


def test_the_recipe_s_numbers_replace_those_of_the_file():
    auto = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    config = {**auto, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
    made = arguments(config)
    assert deepspeed.fit(made) == ["gradient_accumulation_steps 4 for 1"]
    assert config == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    }
    assert made.deepspeed_plugin.gradient_accumulation_steps == 4


def test_a_file_of_deepspeed_s_own_gives_way_too():
    config = {
        "train_batch_size": 64,
        "gradient_clipping": 0.3,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {}},
    }
    told = deepspeed.fit(arguments(config, stage=2))
    assert told == [
        "train_batch_size 16 for 64",
        "gradient_clipping 1.0 for 0.3",
        "optimizer.params.lr 0.0001 for 0.001",
        "scheduler: the recipe's",
    ]
    assert config["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.9, 0.99], "torch_adam": True}
    assert "scheduler" not in config and config["zero_optimization"] == {"stage": 2}


def test_without_deepspeed_nothing_is_done(monkeypatch):
    assert deepspeed.fit(SimpleNamespace(deepspeed_plugin=None)) == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert not deepspeed.is_wanted() and os.environ["ACCELERATE_USE_CPU"] == "true"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert deepspeed.is_wanted() and "ACCELERATE_USE_CPU" not in os.environ


# --- two processes ----------------------------------------------------------------------------------------------------

# What accelerate launch makes of a file that `accelerate config` wrote.
CONFIGURED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    "ACCELERATE_MIXED_PRECISION": "no",
    "DS_ACCELERATOR": "cpu",
}
# Kernels for CPUs, which DeepSpeed would compile first: that takes minutes and changes nothing here.
DRIVER = """
import sys
import deepspeed.ops
for kernel in deepspeed.ops.__compatible_ops__:
    deepspeed.ops.__compatible_ops__[kernel] = False
from tests.distill.training import main
main(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("stage", "init"), [(2, False), (3, True), (3, False)])
def test_two_processes_by_deepspeed_are_as_good_as_one(tmp_path, stage, init, lora):
    """Also where both are killed in between."""
    more = {"per_device_batch_size": 1, "save_steps": 2, "eval": 3} | ({"lora": {"rank": 4}} if lora else {})
    two = Two(tmp_path, sft={"epochs": 1, **more}, preference={"batch_size": 8, **more})
    (tmp_path / "driver.py").write_text(DRIVER)
    zero = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(init).lower()}
    how = {"environment": CONFIGURED | zero, "program": (str(tmp_path / "driver.py"),)}
    told = two.launch(**how, until="preference.partial/checkpoint-2/trainer_state.json")
    assert "sft: DeepSpeed is set up by the recipe: gradient_accumulation_steps 2 for 1" in told
    assert "preference: DeepSpeed is set up by the recipe: gradient_accumulation_steps 4 for 1" in told
    assert "preference: goes on after step 2" in two.launch(**how)
    two.check_alike()
