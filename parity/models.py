"""Stand-ins: real models of real classes, saved by transformers, small enough to merge in a blink.

A family is a base and five fine-tunes of it. ``small`` is a Llama whose fine-tunes differ from their base as little as
real ones do, ``large`` has a tensor of more than a million elements, ``tied`` has no head of its own, ``parted`` has
none in the base and one in each fine-tune, ``biased`` is a Qwen2 with biases, ``mixed`` has fine-tunes of other dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LAYERS = 4
WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "merge", "model", "weight", "delta", "layer")
STEPS = {"base": 0.0, "a": 2e-3, "b": 1e-3, "c": 4e-3, "d": 1.5e-3, "e": 3e-3}  # of weights whose rms is 0.02


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes.

    Attributes:
        architecture: transformers' name, without ``ForCausalLM``.
        config: what differs from the smallest config.
        step: scales the fine-tunes' distances from their base.
        untied: whether the fine-tunes have a head of their own where the base has none.
        dtypes: of models that have another than the rest.
    """

    architecture: str = "Llama"
    config: dict[str, Any] = field(default_factory=dict)
    step: float = 1.0
    untied: bool = False
    dtypes: dict[str, str] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(),
    "tied": Family(config={"tie_word_embeddings": True}),
    "parted": Family(config={"tie_word_embeddings": True}, untied=True),
    "biased": Family("Qwen2"),
    "mixed": Family(dtypes={"a": "float32", "b": "float16"}),
    "small": Family(step=0.1),
    "large": Family(config={"vocab_size": 20_000}),
}


def make(folder: Path, name: str, dtype: str) -> Path:
    """Return the folder of a family's models, which are written if they don't exist yet."""
    import transformers

    home, family = folder / f"{name}-{dtype}", FAMILIES[name]
    done, description = home / "done", f"{family} {STEPS}"
    if done.exists() and done.read_text() == description:
        return home
    transformers.utils.logging.disable_progress_bar()
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    config_class, model_class = (
        getattr(transformers, family.architecture + kind) for kind in ("Config", "ForCausalLM")
    )
    config = config_class(**sizes | family.config)
    state = model_class(config).state_dict()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in dict.fromkeys(state.values()):
            mean, spread = (1.0, 0.1) if tensor.ndim == 1 and tensor.mean() == 1 else (0.0, 0.02)
            tensor.normal_(mean, spread, generator=noise)
        for number, (which, step) in enumerate(STEPS.items()):
            noise.manual_seed(number)
            if step and family.untied:
                config = config_class(**sizes | family.config | {"tie_word_embeddings": False})
            model = model_class(config)
            model.load_state_dict(
                {
                    key: tensor + torch.randn(tensor.shape, generator=noise) * step * family.step
                    for key, tensor in state.items()
                }
            )
            model.to(getattr(torch, family.dtypes.get(which, dtype))).save_pretrained(home / which)
            _tokenizer().save_pretrained(home / which)
    done.write_text(description)
    return home


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<unk>", "<s>", "</s>", *WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
