"""Bases with adapters against the logits of peft's own forward, unmerged, of models that transformers makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import read_all

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(20)[None]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def qwen(kind: str = "ForCausalLM", **changes: Any) -> Any:
    return getattr(transformers, f"Qwen3{kind}")(transformers.Qwen3Config(**SIZES | changes))


def experts(**changes: Any) -> Any:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | own | changes))


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": 16, "num_local_experts": 4})
    return transformers.GptOssForCausalLM(config)


def adapted(
    folder: Path, model: Any, prepare: Callable[[Any], Any] = lambda model: model, **config: Any
) -> torch.Tensor:
    """Save a base, and an adapter with random values for it; return the logits of peft's forward."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "base")
    model = prepare(type(model).from_pretrained(folder / "base"))
    trained = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | config)).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        trained.save_pretrained(folder / "adapter")
        return trained(IDS).logits


def folded(folder: Path) -> tuple[Any, Any]:
    """Return the base with its adapter, loaded by the class that its config names, and the plan that it was made by."""
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{folder / 'base'}+{folder / 'adapter'}"}]}
    (folder / "r.yml").write_text(json.dumps(recipe | {"dtype": "float32"}))
    plan = mergekit_lite.plan_merge(folder / "r.yml", folder / "out")
    mergekit_lite.merge(folder / "r.yml", folder / "out")
    [kind] = json.loads((folder / "out" / "config.json").read_text())["architectures"]
    model, loading = getattr(transformers, kind).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval(), plan


def difference(model: Any, expected: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.shape == expected.shape
    return float((logits - expected).abs().max())


TIED: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "embed_tokens"]},
    "in full": {"modules_to_save": ["embed_tokens"]},
    "lora, both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "in full, both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "tokens of each": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding(name: str, tmp_path: Path) -> None:
    """What peft's own merge is wrong in: there the head moves with the embedding."""
    expected = adapted(tmp_path, qwen(tie_word_embeddings=True), **TIED[name])
    model, plan = folded(tmp_path)
    assert difference(model, expected) < 1e-6
    alone = name in ("lora", "in full")
    assert any("lm_head.weight stays as it was" in note for note in plan.notes) == alone
    assert model.config.tie_word_embeddings == (name in ("lora, both", "in full, both", "tokens"))


@pytest.mark.parametrize(("rows", "tied"), [(35, True), (30, False)])
def test_a_resized_vocabulary(rows: int, tied: bool, tmp_path: Path) -> None:
    def resize(model: Any) -> Any:
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    expected = adapted(
        tmp_path, qwen(tie_word_embeddings=tied), resize, modules_to_save=["embed_tokens", "lm_head"], r=2
    )
    model, plan = folded(tmp_path)
    assert difference(model, expected) < 1e-6 and model.config.vocab_size == rows
    assert any(f"the adapter has {rows} rows of a vocabulary, the base 32" in note for note in plan.notes)


MORE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "experts": (experts, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "experts of one": (experts, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "experts and router": (experts, {"target_modules": "all-linear"}),
    "square experts": (
        lambda: experts(moe_intermediate_size=16),
        {"target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    ),
    "experts stored turned": (gpt_oss, {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "square experts stored turned": (gpt_oss, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "lengths": (qwen, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "tokens": (
        lambda: qwen(tie_word_embeddings=False),
        {"trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [31]}},
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_other_kinds(name: str, tmp_path: Path) -> None:
    make, config = MORE[name]
    expected = adapted(tmp_path, make(), **config)
    assert difference(folded(tmp_path)[0], expected) < 1e-6


@pytest.mark.parametrize(("task", "tied"), [("SEQ_CLS", True), ("TOKEN_CLS", False)])
def test_a_head_for_a_task(task: str, tied: bool, tmp_path: Path) -> None:
    """The base is the language model; only its heads differ from the classifier that was trained."""
    kind = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}[task]
    classifier = qwen(kind, tie_word_embeddings=tied, num_labels=3)
    expected = adapted(tmp_path, classifier, task_type=task)
    language = qwen(tie_word_embeddings=tied)
    language.model.load_state_dict(classifier.model.state_dict())
    language.save_pretrained(tmp_path / "base")
    model, plan = folded(tmp_path)
    assert type(model).__name__ == f"Qwen3{kind}" and model.config.num_labels == 3
    assert difference(model, expected) < 1e-6
    assert any(f"the output is Qwen3{kind}" in note for note in plan.notes)
    assert ("lm_head.weight of the base" in {name for _, name, _ in plan.left_out}) == (not tied)


def test_other_labels_for_a_classifier(tmp_path: Path) -> None:
    """The base has a head already, and the adapter's is for another number of labels."""
    classifier = qwen("ForSequenceClassification", num_labels=1)
    expected = adapted(tmp_path, classifier, task_type="SEQ_CLS")
    other = qwen("ForSequenceClassification", num_labels=4)
    other.model.load_state_dict(classifier.model.state_dict())
    other.save_pretrained(tmp_path / "base")
    model, _ = folded(tmp_path)
    assert model.config.num_labels == 1 and difference(model, expected) < 1e-6


def bert(kind: str) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(vocab_size=32, **sizes))


def test_a_head_behind_a_layer_that_is_stored_nowhere(tmp_path: Path) -> None:
    """BERT's pooler is in the hub's file of the base, but not where transformers saved the language model."""
    classifier = bert("ForSequenceClassification")
    expected = adapted(tmp_path, classifier, task_type="SEQ_CLS", target_modules=["query"])
    base = bert("ForPreTraining")
    base.bert.load_state_dict(classifier.bert.state_dict())
    base.save_pretrained(tmp_path / "base")
    model, _ = folded(tmp_path)
    assert difference(model, expected) < 1e-6
    bert("ForMaskedLM").save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="behind the layer 'pooler'"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


def test_a_head_that_the_base_has_is_scaled(tmp_path: Path) -> None:
    adapted(tmp_path, qwen("ForSequenceClassification", num_labels=3), task_type="SEQ_CLS")
    base = open_checkpoint(tmp_path / "base")
    half = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}:0.5"))["score.weight"]
    whole = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))["score.weight"]
    torch.testing.assert_close(half, (read_all(base)["score.weight"] + whole) / 2)


def test_a_decoder_that_answers_questions_is_refused(tmp_path: Path) -> None:
    """transformers calls its layers ``transformer.layers``, and loads none of those of a language model."""
    adapted(tmp_path, qwen("ForSequenceClassification", num_labels=3), task_type="SEQ_CLS")
    qwen().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "QUESTION_ANS"}))
    with pytest.raises(CheckpointError, match="under the base's names"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
