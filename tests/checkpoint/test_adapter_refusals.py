"""A LoRA that doesn't fit its base, is of another kind, damaged or hostile: refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError
from tests.adapters import PREFIX, lora, over, write_adapter
from tests.models import State, state, write_folder

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def refusal(tmp_path: Path, tensors: State, base: State | None = None, **changes: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        over(tmp_path, base or state(0), tensors, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"]},
    ],
)
def test_a_tied_head_whose_name_is_not_known(tmp_path, config):
    base = state(0)
    del base["lm_head.weight"]
    write_folder(tmp_path / "base", base, config=config | {"tie_word_embeddings": True})
    write_adapter(tmp_path / "adapter", {f"{PREFIX}model.embed_tokens.weight": torch.zeros(16, 8)})
    with pytest.raises(CheckpointError, match="Untie the base first"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_two_names_for_one_tensor_are_refused(tmp_path):
    base = {f"h.{n}.c.weight": torch.zeros(4, 4) for n in range(3)}
    tensors = lora("transformer.h.0.c", 4, 4) | lora("transformer.h.1.c", 4, 4) | lora("h.1.c", 4, 4)
    assert "h.1.c.weight: two tensors of the adapter" in refusal(tmp_path, tensors, base)


def test_what_matches_nothing_is_named_all_at_once(tmp_path):
    tensors = lora(Q, 8, 8) | lora("model.layers.7.self_attn.q_proj", 8, 8) | lora(UP, 9, 8, seed=1)
    tensors[f"{PREFIX}model.norm.weight"] = torch.ones(7)
    tensors[f"{PREFIX}model.extra.weight"] = torch.ones(7)
    message = refusal(tmp_path, tensors)
    assert "4 problems" in message
    for part in (
        "model.layers.7.self_attn.q_proj.lora_A",
        "[9, 8]",
        "[16, 8]",
        "model.norm.weight",
        "model.extra.weight",
    ):
        assert part in message


def test_a_vocabulary_of_two_sizes(tmp_path):
    tensors = lora(Q, 8, 8) | {f"{PREFIX}lm_head.weight": torch.ones(18, 8)}
    message = refusal(tmp_path, tensors)
    assert "has 18 rows, but model.embed_tokens.weight, which the adapter doesn't have, 16" in message
    assert "save_embedding_layers=True" in message


def test_a_tied_head_of_a_vocabulary_that_grew(tmp_path):
    base = state(0)
    del base["lm_head.weight"]
    write_folder(tmp_path / "base", base, config={"tie_word_embeddings": True})
    write_adapter(tmp_path / "adapter", {f"{PREFIX}model.embed_tokens.weight": torch.zeros(18, 8)})
    with pytest.raises(CheckpointError, match=r"has 18 rows, but lm_head.weight, .* 16"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_what_the_base_lacks_cannot_be_scaled(tmp_path):
    write_folder(tmp_path / "base", state(0), config={"architectures": ["LlamaForCausalLM"]})
    grown = {f"{PREFIX}{name}.weight": torch.zeros(18, 8) for name in ("lm_head", "model.embed_tokens")}
    write_adapter(tmp_path / "grown", grown)
    write_adapter(tmp_path / "head", {f"{PREFIX}score.weight": torch.ones(2, 8)}, task_type="SEQ_CLS")
    for adapter, told in (("grown", "can't be scaled or added to"), ("head", "can't be scaled by 0.5")):
        with pytest.raises(CheckpointError, match=told):
            open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / adapter}:0.5")


def test_a_head_for_a_task_on_a_model_of_no_known_class(tmp_path):
    head = {f"{PREFIX}score.weight": torch.ones(2, 8)}
    assert "which class of transformers" in refusal(tmp_path, head, task_type="SEQ_CLS")
    assert "the base has no tensor score.weight" in refusal(tmp_path / "no task", head)


def test_several_adapters_in_one_file(tmp_path):
    tensors = {
        name.replace("lora_A", f"lora_A.{own}").replace("lora_B", f"lora_B.{own}"): tensor
        for own in ("chat", "code")
        for name, tensor in lora(Q, 8, 8).items()
    }
    message = refusal(tmp_path, tensors)
    assert "holds 2 adapters: chat, code" in message and "selected_adapters=['chat']" in message


def test_experts_that_fit_nothing(tmp_path):
    base = {"l.experts.gate_up_proj": torch.zeros(3, 12, 8), "l.experts.down_proj": torch.zeros(3, 8, 6)}
    changes = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    other = lora("l.experts", 9, 8, rank=12)
    assert "fit no parameter of the experts of l.experts" in refusal(tmp_path / "1", other, base, **changes)
    assert "has no gate_up_proj or down_proj of experts" in refusal(tmp_path / "2", other, **changes)
    alike = {"l.experts.gate_up_proj": torch.zeros(3, 8, 6), "l.experts.down_proj": torch.zeros(3, 8, 6)}
    fitting = lora("l.experts", 8, 6, rank=12)
    assert "fit gate_up_proj and down_proj alike" in refusal(tmp_path / "3", fitting, alike, **changes)
    square = {"l.experts.w": torch.zeros(3, 8, 8)}
    fitting = lora("l.experts", 8, 8, rank=12)
    message = refusal(tmp_path / "4", fitting, square, target_parameters=["experts.w"])
    assert "nothing says which axis is the rows'" in message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"peft_type": None}, "None"),
        ({"peft_type": ["LORA"]}, "['LORA']"),
        ({"use_dora": True}, "use_dora is true"),
        ({"use_dora": "yes"}, "use_dora: expected"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "replicated"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: expected"),
        ({"trainable_token_indices": {"embed_tokens": [[1]]}}, "trainable_token_indices: expected"),
        ({"trainable_token_indices": {"embed_tokens": 1}}, "trainable_token_indices: expected"),
        ({"target_parameters": "experts"}, "target_parameters: expected"),
        ({"target_parameters": [1]}, "target_parameters: expected"),
        ({"task_type": ["SEQ_CLS"]}, "task_type: expected"),
        ({"alora_invocation_tokens": [1]}, "activated"),
        ({"use_something_new": {"a": 1}}, "use_something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"r": 0}, "r: expected"),
        ({"r": -4}, "r: expected"),
        ({"r": 4.0}, "r: expected"),
        ({"r": True}, "r: expected"),
        ({"r": 10**200}, "r: expected"),
        ({"r": 5000}, "4096"),
        ({"r": None}, "r: expected"),
        ({"r": 8}, "has rank 4"),
        ({"lora_alpha": math.nan}, "lora_alpha: expected"),
        ({"lora_alpha": math.inf}, "lora_alpha: expected"),
        ({"lora_alpha": 10**200}, "lora_alpha: expected"),
        ({"lora_alpha": "8"}, "lora_alpha: expected"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha_pattern": {"(a+)+x": 1}}, "repeats too much"),
        ({"alpha_pattern": {".*.*.*x": 1}}, "repeats too much"),
        ({"alpha_pattern": {"a" * 300: 1}}, "repeats too much"),
    ],
    ids=str,
)
def test_configs_that_are_refused(tmp_path, changes, told):
    assert told in refusal(tmp_path, lora(Q, 8, 8), **changes)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{Q}.lora_magnitude_vector", "use_dora is false"),
        (f"{UP}.lora_magnitude_vector", "expected one lora_A and one lora_B"),
        (f"{Q}.lora_B.bias", "bias"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "don't say which tokens"),
        (f"{Q}.hada_w1_a", "LoHa"),
        (f"{Q}.ia3_l", "IA3"),
        (f"{Q}.lora_X.weight", "unknown kind"),
        (f"{UP}.lora_A.weight", "expected one lora_A and one lora_B"),
        (f"{Q}.lora_embedding_A", "expected one lora_A and one lora_B"),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, told):
    message = refusal(tmp_path, lora(Q, 8, 8) | {PREFIX + name: torch.ones(4, 8)})
    assert told in message and name in message


def test_hostile_shapes_and_dtypes(tmp_path):
    a, b = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
    good = lora(Q, 8, 8)
    for number, (changes, told) in enumerate(
        [
            ({a: torch.ones(4, 8, 1, 1)}, "convolution"),
            ({a: torch.ones(4, 0)}, "expected a matrix"),
            ({a: torch.ones(4, 8, dtype=torch.int8)}, "is int8"),
            ({b: torch.ones(8, 3)}, "don't belong together"),
            ({Q + ".lora_A.weight": good[a].clone()}, "for the same place"),
            ({f"{PREFIX}lm_head.weight": torch.ones(16, 8, dtype=torch.int32)}, "is int32"),
        ]
    ):
        assert told in refusal(tmp_path / str(number), good | changes), told
    base = state(0) | {f"{Q}.weight": torch.ones(8, 8, dtype=torch.int64)}
    assert "not for arithmetic" in refusal(tmp_path / "int", good, base)


def test_files_that_are_missing_or_leave_the_folder(tmp_path):
    write_folder(tmp_path / "base", state(0))
    adapter = write_adapter(tmp_path / "adapter", lora(Q, 8, 8))
    file = adapter / "adapter_model.safetensors"
    outside = tmp_path / "outside.safetensors"
    file.rename(outside)
    reference = f"{tmp_path / 'base'}+{adapter}"

    def told() -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(reference)
        return str(caught.value)

    assert "holds no adapter_model" in told()
    file.symlink_to(outside)
    assert "leaves its folder" in told()
    file.unlink()
    file.write_bytes(outside.read_bytes()[:-1])
    assert "cut short" in told()
    (adapter / "adapter_config.json").write_text("[]")
    assert "JSON object" in told()
    (adapter / "adapter_config.json").unlink()
    assert "is not an adapter" in told()
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'none'}")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(f"{tmp_path / 'none'}+{tmp_path / 'base'}")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    write_folder(tmp_path / "base", state(0))
    adapter = write_adapter(tmp_path / "adapter", {})
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Trap()}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="restricted loader"):
        open_checkpoint(f"{tmp_path / 'base'}+{adapter}")
    assert not (tmp_path / "sprung").exists()


def test_a_changed_adapter_is_noticed(tmp_path):
    write_folder(tmp_path / "base", state(0))
    adapter = write_adapter(tmp_path / "adapter", lora(Q, 8, 8))
    opened = open_checkpoint(f"{tmp_path / 'base'}+{adapter}")
    opened.check_unchanged()
    save_file(
        load_file(adapter / "adapter_model.safetensors") | {"x": torch.ones(1)}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        opened.check_unchanged()


def test_rows_of_tokens_for_what_has_no_rows(tmp_path):
    tensors = {f"{PREFIX}model.norm.token_adapter.trainable_tokens_delta": torch.ones(1)}
    assert "Is it the right base?" in refusal(tmp_path, tensors, trainable_token_indices={"norm": [0]})


def test_a_vocabulary_of_other_axes(tmp_path):
    base = state(0) | {"lm_head.weight": torch.tensor(1.0)}
    assert "Is it the right base?" in refusal(tmp_path, {f"{PREFIX}lm_head.weight": torch.ones(18)}, base)
