"""Four models of three architectures, no two with the same tokenizer or chat template, all with random weights."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from demo.distill import skills

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

POSITIONS = 128


@dataclass(frozen=True)
class Dialect:
    """A chat format: a template with its special tokens, such as ``<|end|>``."""

    template: str
    end: str
    special: tuple[str, ...] = ()


HEADERS = Dialect(  # as Llama 3 has them
    "<|begin|>{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    end="<|end|>",
    special=("<|begin|>", "<|user|>", "<|assistant|>", "<|system|>"),
)
LINES = Dialect(  # for a model that knows no roles
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}<|endoftext|>"
    "{% else %}Q: {{ message.content }}\nA:{% endif %}{% endfor %}",
    end="<|endoftext|>",
)
CHATML = Dialect(  # as Qwen has it
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    end="<|im_end|>",
    special=("<|im_start|>",),
)
BARE = Dialect(
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    end="<end>",
    special=("<user>", "<assistant>"),
)


def characters() -> "Tokenizer":
    """One token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({c: n for n, c in enumerate(skills.ALPHABET)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_pairs(size: int, text: Iterable[str]) -> "Tokenizer":
    """GPT-2's kind: bytes, and the pairs of them that the text has most often."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return merged(tokenizer, size, text)


def words() -> "Tokenizer":
    """Qwen2's kind: bytes cut in another way, each digit by itself; here merged to words of command only.

    transformers takes the tokenizer of a Qwen2 model for one of this kind, whatever its files say.
    """
    from transformers import Qwen2Tokenizer

    return merged(Qwen2Tokenizer().backend_tokenizer, 280, ["user", "assistant", "system", *skills.SKILLS])


def merged(tokenizer: "Tokenizer", size: int, text: Iterable[str]) -> "Tokenizer":
    """Pairs of bytes merged until there are ``size`` tokens."""
    from tokenizers import pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def spoken(tokenizer: "Tokenizer", dialect: Dialect) -> "PreTrainedTokenizerFast":
    """Return the tokenizer with its special tokens and its chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token=dialect.end,
        additional_special_tokens=list(dialect.special),
        chat_template=dialect.template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Family:
    """A kind of model: its tokenizer and its configuration."""

    name: str
    tokenizer: Callable[[list[str]], "PreTrainedTokenizerFast"]  # made from text
    config: Callable[[dict[str, Any]], "PretrainedConfig"]  # of the tokenizer's numbers

    def build(self, seed: int) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
        """Return a model with random weights, and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        tokenizer = self.tokenizer(sample_text(seed))
        torch.manual_seed(seed)
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        model = AutoModelForCausalLM.from_config(self.config({"vocab_size": len(tokenizer), **ends}))
        model.generation_config = GenerationConfig(do_sample=True, max_new_tokens=skills.MAX_ANSWER_TOKENS, **ends)
        return model, tokenizer


def sample_text(seed: int) -> list[str]:
    """Questions and answers of all skills, for tokenizers to learn from."""
    rng = random.Random(seed)
    asked = [question for name in skills.SKILLS for question in skills.questions(name, 400, rng)]
    return [line for question in asked for line in (f"Q: {question}\nA:", f" {skills.solve(question)}")]


def llama(width: int, layers: int) -> Callable[[dict[str, Any]], "PretrainedConfig"]:
    """Llama: rotary positions, gated MLP, no biases."""

    def config(numbers: dict[str, Any]) -> "PretrainedConfig":
        from transformers import LlamaConfig

        return LlamaConfig(**numbers, **rotary(width, layers))

    return config


def qwen2(width: int, layers: int) -> Callable[[dict[str, Any]], "PretrainedConfig"]:
    """Qwen2: like Llama, with biases on queries, keys and values, fewer key heads, and tied embeddings."""

    def config(numbers: dict[str, Any]) -> "PretrainedConfig":
        from transformers import Qwen2Config

        return Qwen2Config(**numbers, **rotary(width, layers), num_key_value_heads=2, tie_word_embeddings=True)

    return config


def rotary(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": width * 5 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    }


def gpt2(width: int, layers: int) -> Callable[[dict[str, Any]], "PretrainedConfig"]:
    """GPT-2: learnt positions, plain MLP, biases everywhere, tied embeddings."""

    def config(numbers: dict[str, Any]) -> "PretrainedConfig":
        from transformers import GPT2Config

        return GPT2Config(
            **numbers,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            n_positions=POSITIONS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )

    return config


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", lambda text: spoken(characters(), HEADERS), llama(width=128, layers=2)),
        Family("gpt2", lambda text: spoken(byte_pairs(320, text), LINES), gpt2(width=128, layers=2)),
        Family("qwen2", lambda text: spoken(words(), CHATML), qwen2(width=128, layers=2)),
        Family("target", lambda text: spoken(characters(), BARE), llama(width=96, layers=2)),
    )
}
