r"""Reward models of the ArmoRM family: several objectives, and a gate that weighs them by the prompt.

Wang, Xiong, Xie, Zhao, Zhang, "Interpretable preferences via multi-objective reward modeling and mixture-of-experts",
2024 (arXiv:2406.12845). With h_t the last hidden states of an ordinary backbone,

    r     = h_last · Wᵀ · M               objectives; W: regression_layer.weight, M: reward_transform_matrix
    g     = s · softmax(f(h_prompt) / τ)   gate; f: gating.layers.*, linear, ReLU between them; s: gating.logit_scale
    score = Σ_k g_k r_k

``last`` is the last token, ``prompt`` the one that ends the turn before the answer. The published model class searches
for the last ``<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n``, so an answer with such a header in it
misleads it; here the messages before the answer end there. Names and shapes of the head's tensors are those of
RLHFlow/ArmoRM-Llama3-8B-v0.1, from its model class and headers; its weights were not run here. A folder
with other names is refused. The head is small and computed on the CPU in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lite.answers.loading import Placed, model_of
from mergekit_lite.answers.template import Tokens
from mergekit_lite.errors import CheckpointError, listing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

OBJECTIVES, TRANSFORM, SCALE = "regression_layer.weight", "reward_transform_matrix", "gating.logit_scale"
LAYER = "gating.layers."
TEMPERATURE = 10.0  # the default


class Gate(NamedTuple):
    """The tensors of a head with K objectives over hidden states of size H."""

    objectives: Tensor  # (K, H) float32
    transform: Tensor  # (K, K) float32
    layers: tuple[tuple[Tensor, Tensor], ...]  # weights and biases of the gate's linear layers, from H to K
    scale: Tensor  # (1,) float32
    temperature: float  # of the gate's softmax

    def score(self, last: Tensor, prompt: Tensor) -> Tensor:
        """Return scores (B,) of hidden states (B, H) at the last token and at the prompt's."""
        gate = prompt
        for weight, bias in self.layers[:-1]:
            gate = (gate @ weight.T + bias).relu()
        weight, bias = self.layers[-1]
        weights = ((gate @ weight.T + bias) / self.temperature).softmax(1) * self.scale
        return (weights * (last @ self.objectives.T @ self.transform)).sum(1)


class Gated:
    """A backbone and its gated head."""

    def __init__(self, model: PreTrainedModel, gate: Gate):
        self.model = model
        self.gate = gate

    def rewards(self, rows: Sequence[Tokens]) -> list[float]:
        """Return the score of each conversation of a batch; a row's ``prompt`` is everything before the answer."""
        import torch

        from mergekit_lite.answers.logprobs import padded

        batch = padded(rows, device=self.model.device)
        hidden = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        places = torch.arange(len(rows))
        last = hidden[places, [len(row.prompt) + len(row.response) - 1 for row in rows]]
        prompt = hidden[places, [len(row.prompt) - 1 for row in rows]]
        rewards: list[float] = self.gate.score(last.float().cpu(), prompt.float().cpu()).double().tolist()
        return rewards


def is_gated(config: PretrainedConfig) -> bool:
    """Return whether the configuration is that of a model with a gated head."""
    return any(name.endswith("ForRewardModelWithGating") for name in config.architectures or ())


def load(path: str, config: PretrainedConfig, place: Placed) -> Gated:
    """Load backbone and head from the folder's weights, without running the code that comes with them.

    Raises:
        CheckpointError: a tensor is missing, or is not as described above.
    """
    from transformers import AutoModel

    model, missing, unexpected = model_of(AutoModel, path, "a reward model", place, config=config)
    tensors = _head_tensors(path)
    problems = [f"the weights have no {name}" for name in missing]
    stray = [name for name in unexpected if name not in tensors]
    problems += [f"{name} in the weights belongs to nothing that is known" for name in stray]
    problems += _misfits(tensors, model.config.hidden_size, getattr(config, "num_objectives", None))
    if problems:
        raise CheckpointError(listing(f"{path} is no reward model of the ArmoRM family", problems))
    depth = sum(name.endswith(".weight") for name in tensors if name.startswith(LAYER))
    layers = tuple((tensors[f"{LAYER}{n}.weight"], tensors[f"{LAYER}{n}.bias"]) for n in range(depth))
    temperature = float(getattr(config, "gating_temperature", TEMPERATURE))
    return Gated(model, Gate(tensors[OBJECTIVES], tensors[TRANSFORM], layers, tensors[SCALE], temperature))


def _head_tensors(path: str) -> dict[str, Tensor]:
    """Read the tensors of the head, in float32."""
    from mergekit_lite.checkpoint import open_checkpoint
    from mergekit_lite.checkpoint.reader import Reader

    tensors = {}
    with Reader() as reader:
        for name, spec in open_checkpoint(path).tensors.items():
            if name in (OBJECTIVES, TRANSFORM, SCALE) or name.startswith(LAYER):
                tensors[name] = spec.elements(reader, 0, spec.numel).view(spec.shape).float()
    return tensors


def _misfits(tensors: Mapping[str, Tensor], hidden: int, objectives: int | None) -> list[str]:
    """Return a message for each tensor of the head that is missing, unknown or of a wrong shape."""
    depth = sum(name.endswith(".weight") for name in tensors if name.startswith(LAYER))
    names = [OBJECTIVES, TRANSFORM, SCALE]
    names += [f"{LAYER}{layer}.{kind}" for layer in range(max(depth, 1)) for kind in ("weight", "bias")]
    missing = [f"the weights have no {name}" for name in names if name not in tensors]
    strange = [f"{name} is nothing that such a head has" for name in tensors if name not in names]
    if missing or strange:
        return missing + strange
    count = objectives or len(tensors[OBJECTIVES])
    weights = [tensors[f"{LAYER}{layer}.weight"] for layer in range(depth)]
    widths = [hidden, *(len(weight) for weight in weights[:-1]), count]
    expected = {OBJECTIVES: (count, hidden), TRANSFORM: (count, count), SCALE: (1,)}
    for layer, (width_in, width_out) in enumerate(pairwise(widths)):
        expected |= {f"{LAYER}{layer}.weight": (width_out, width_in), f"{LAYER}{layer}.bias": (width_out,)}
    return [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
