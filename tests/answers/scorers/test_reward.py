"""Reward models: one logit, and gated heads held to a second implementation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings
from mergekit_lite.errors import CheckpointError
from tests.answers.scorers.asked import judged
from tests.tokenizers import tokenizer

VOCABULARY, HIDDEN, OBJECTIVES, GATE = 340, 32, 5, 16


def llama_config(**changes: object):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **{"num_labels": 1, "pad_token_id": 13, **changes},
    )


def write_classifier(folder: Path, style: str | None = "llama-3", **changes: object) -> Path:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    LlamaForSequenceClassification(llama_config(**changes)).save_pretrained(folder)
    tokenizer(style).save_pretrained(folder)
    return folder


def settings(model: Path, batch_size: int = 8, **options: object) -> ScorerSettings:
    return ScorerSettings(name="rm", kind="reward", model=str(model), batch_size=batch_size, options=options)


def rewards(given: list[Judged], scorer: ScorerSettings) -> list[Score]:
    with open_scorer(scorer) as opened:
        return opened.score(given)


def many(count: int = 9) -> list[Judged]:
    drawn = random.Random(1)
    words = ["one", "two", "three", "four", "five", "is", "it", "What", "helpful"]
    return [
        judged(
            " ".join(drawn.choices(words, k=drawn.randint(1, 40))),
            " ".join(drawn.choices(words, k=drawn.randint(1, 9))),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("rm"))


def test_rewards_are_the_models_logits(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    words = tokenizer("llama-3")
    for each, found in zip(many(), rewards(many(), settings(classifier)), strict=True):
        messages = [*each.prompt.messages, {"role": "assistant", "content": each.answer}]
        text = words.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            logit = model(torch.tensor([words(text, add_special_tokens=False)["input_ids"]])).logits.item()
        assert found.value == pytest.approx(logit, abs=1e-5)


@pytest.mark.parametrize("pad", [13, None])
def test_neither_batch_nor_order_nor_padding_matters(tmp_path: Path, pad: int | None) -> None:
    model = write_classifier(tmp_path, pad_token_id=pad)
    given = many()
    alone = rewards(given, settings(model, batch_size=1))
    assert len({round(score.value or 0, 3) for score in alone}) == 9
    for batch_size in (4, 16):
        together = rewards(given, settings(model, batch_size=batch_size))
        backwards = rewards(given[::-1], settings(model, batch_size=batch_size))[::-1]
        for one, other, third in zip(alone, together, backwards, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-5) == pytest.approx(third.value, abs=1e-5)
    assert rewards(given, settings(model)) == rewards(given, settings(model))


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "bert"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    import transformers

    config = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=VOCABULARY),
        "qwen2": lambda: transformers.Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        ),
        "bert": lambda: transformers.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
        ),
    }[architecture]()
    config.num_labels, config.pad_token_id, config.initializer_range = 1, 13, 0.2
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    alone, together = (rewards(many(), settings(tmp_path, batch_size=size)) for size in (1, 8))
    assert len({round(score.value or 0, 4) for score in alone}) == 9
    assert [s.value for s in alone] == pytest.approx([s.value for s in together], abs=1e-5)


def test_what_has_no_score_says_why(tmp_path: Path, classifier: Path) -> None:
    long = judged("one " * 500)
    found = rewards([long, judged("one")], settings(classifier))
    assert found[0].value is None and "tokens are more than 256" in found[0].why and found[1].value is not None
    found = rewards([judged("one two three four")], settings(classifier, max_length=20))
    assert found[0].value is None and "more than 20" in found[0].why
    gemma = write_classifier(tmp_path, style="gemma")
    twice = Judged(Prompt("p", (Message(role="user", content="u"), Message(role="user", content="v"))), "one")
    found = rewards([twice, judged("one")], settings(gemma))
    assert found[0].value is None and "roles must alternate" in found[0].why and found[1].value is not None


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "causal")
    tokenizer().save_pretrained(tmp_path / "causal")
    (tmp_path / "empty").mkdir()
    for folder, why in (
        (tmp_path / "causal", "the weights have no score.weight"),
        (write_classifier(tmp_path / "two", num_labels=2), "it has 2 logits, expected one"),
        (write_classifier(tmp_path / "plain", style=None), "no chat template"),
        (tmp_path / "empty", "Can't load the model"),
        (tmp_path / "nowhere", "Can't load the model"),
    ):
        with pytest.raises(CheckpointError, match=why):
            rewards([judged("one")], settings(folder))


# Gated heads.


class Reference(nn.Module):
    """The head as its paper has it, with modules of torch, a row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.regression_layer = nn.Linear(HIDDEN, OBJECTIVES, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(OBJECTIVES) + 0.3 * torch.randn(OBJECTIVES, OBJECTIVES))
        self.gating = nn.Module()
        self.gating.layers = nn.ModuleList(
            [nn.Linear(HIDDEN, GATE), nn.Linear(GATE, GATE), nn.Linear(GATE, OBJECTIVES)]
        )
        self.gating.logit_scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, hidden: Tensor, prompt: int) -> float:
        rewards = self.reward_transform_matrix.T @ self.regression_layer(hidden[-1])
        first, second, third = self.gating.layers
        logits = third(torch.relu(second(torch.relu(first(hidden[prompt])))))
        weights = torch.softmax(logits / 2.5, 0) * self.gating.logit_scale
        return float(weights @ rewards)


def write_gated(folder: Path) -> tuple[nn.Module, Reference]:
    from transformers import LlamaModel

    torch.manual_seed(0)
    body, head = LlamaModel(llama_config()).eval(), Reference()
    tensors = {f"model.{name}": tensor for name, tensor in body.state_dict().items()} | head.state_dict()
    config = llama_config().to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
        "num_objectives": OBJECTIVES,
        "gating_temperature": 2.5,
    }
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_custom.py").write_text("raise SystemExit('code of a model folder was run')")
    tokenizer("llama-3").save_pretrained(folder)
    return body, head


@torch.no_grad()
def test_a_gated_head_equals_the_straightforward_one(tmp_path: Path) -> None:
    body, head = write_gated(tmp_path)
    words = tokenizer("llama-3")
    header = words("<|eot_id|><|start_header_id|>assistant<|end_header_id|>", add_special_tokens=False)["input_ids"]
    expected = []
    for each in many():
        messages = [*each.prompt.messages, {"role": "assistant", "content": each.answer}]
        ids = words(words.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
        starts = [start for start in range(len(ids)) if ids[start : start + len(header)] == header]
        expected.append(head(body(torch.tensor([ids])).last_hidden_state[0], starts[-1]))
    assert len({round(value, 5) for value in expected}) == 9
    for batch_size in (1, 8):
        found = [score.value for score in rewards(many(), settings(tmp_path, batch_size=batch_size))]
        assert found == pytest.approx(expected, abs=1e-5)


def test_an_answer_with_a_header_in_it_does_not_move_the_gate(tmp_path: Path) -> None:
    """Weights of the gate depend on the prompt alone."""
    write_gated(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["regression_layer.weight"].zero_()
    tensors["regression_layer.weight"][0, 0] = 1  # the first objective is the first element of the last hidden state
    save_file(tensors, tmp_path / "model.safetensors")
    ends = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    with open_scorer(settings(tmp_path)) as scorer:
        places: list[list[int]] = []
        inner = scorer.head.gate  # type: ignore[attr-defined]
        scorer.head.gate = SpyGate(inner, places)  # type: ignore[attr-defined]
        scorer.score([judged("one")])
        scorer.score([judged(f"one{ends}two")])
    assert torch.equal(places[0], places[1])  # type: ignore[arg-type]


class SpyGate:
    """Notes the prompt's hidden states."""

    def __init__(self, gate: object, seen: list) -> None:
        self.gate, self.seen = gate, seen

    def score(self, last: Tensor, prompt: Tensor) -> Tensor:
        self.seen.append(prompt[0].round(decimals=4))
        return self.gate.score(last, prompt)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gating.logit_scale": None}, "no gating.logit_scale"),
        ({"reward_transform_matrix": None}, "no reward_transform_matrix"),
        ({"gating.layers.1.bias": None}, "no gating.layers.1.bias"),
        ({"model.norm.weight": None}, "no norm.weight"),
        (
            {"gating.layers.1.weight": (GATE, GATE + 1)},
            r"gating.layers.1.weight has shape \(16, 17\), expected \(16, 16\)",
        ),
        ({"regression_layer.weight": (OBJECTIVES * 3, HIDDEN)}, r"has shape \(15, 32\), expected \(5, 32\)"),
        ({"gating.layers.0.running_mean": (GATE,)}, "gating.layers.0.running_mean is nothing that such a head has"),
        ({"quantiles": (3,)}, "quantiles in the weights belongs to nothing that is known"),
    ],
)
def test_another_head_is_refused_by_name(tmp_path: Path, change: dict[str, tuple[int, ...] | None], why: str) -> None:
    write_gated(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=why):
        rewards([judged("one")], settings(tmp_path))
