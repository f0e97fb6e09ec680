"""Ten small tokenizers by the rules of the well-known families, trained on a small text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat, and the dog didn't. It's 2024; 12345 + 678 = 13023.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))",
    "Übergröße naïve café, straße; приве́т мир, добрый день, 你好世界, 日本語のテキスト, שלום עולם, مرحبا بالعالم.",
    "emoji 🙂🎉👩‍👩‍👧 flags 🇩🇪 and math ∑ ∫ √ α β γ; the end of the text, and then the next one\t\ttabs",
    "knowledge I gets it I get it 20 24 ! them utterly got us user assistant system What is one and one? It is two.",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "[MASK]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# How the families cut a text into words, in our own words: contractions, letters with what leads them, digits by n.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'(?:[sdmt]|ll|ve|re))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'(?:[sdmt]|ll|ve|re))?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(pattern: str, size: int, normalizer: Any = None) -> Tokenizer:
    core = Tokenizer(models.BPE())
    if normalizer is not None:
        core.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL[1:], show_progress=False
        ),
    )
    return core


def _sentencepiece(*, fallback: bool, prefix: str, size: int = 500) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = SPECIAL + (BYTES if fallback else [])
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=size + len(special), special_tokens=SPECIAL, initial_alphabet=[], show_progress=False
        ),
    )
    return _with_bytes(core) if fallback else core


def _with_bytes(core: Tokenizer) -> Tokenizer:
    """Put the byte tokens into the vocabulary itself, where SentencePiece has them."""
    import json

    content = json.loads(core.to_str())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(BYTES)}
    else:
        vocabulary.extend([token, -20.0] for token in BYTES)
    return Tokenizer.from_str(json.dumps(content))


def _gemma() -> Tokenizer:
    core = _sentencepiece(fallback=True, prefix="never")
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    return core


def _unigram(*, fallback: bool) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    if not fallback:
        core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    if not fallback:
        return core
    import json

    content = json.loads(_with_bytes(core).to_str())
    content["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(content))


def _wordpiece(*, lower: bool) -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return core


def _characters() -> Tokenizer:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, min_frequency=1, show_progress=False)
    )
    return core


RULES: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: _byte_level(GPT2, 420),
    "llama-3": lambda: _byte_level(LLAMA3, 600),
    "qwen2": lambda: _byte_level(QWEN2, 520, normalizers.NFC()),
    "o200k": lambda: _byte_level(O200K, 700),
    "llama-2": lambda: _sentencepiece(fallback=True, prefix="always"),
    "mistral": lambda: _sentencepiece(fallback=True, prefix="first"),
    "sentencepiece": lambda: _sentencepiece(fallback=False, prefix="never"),
    "gemma": _gemma,
    "unigram": lambda: _unigram(fallback=True),
    "t5": lambda: _unigram(fallback=False),
    "bert": lambda: _wordpiece(lower=False),
    "bert-uncased": lambda: _wordpiece(lower=True),
    "characters": _characters,
}
WHOLE = ("gpt-2", "llama-3", "o200k", "llama-2", "mistral", "gemma", "unigram")  # lose nothing of any text


@cache
def core_of(name: str) -> str:
    return RULES[name]().to_str()


@cache
def tokenizer(name: str, template: str | None = None, **more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer by the rules of this name, with this chat template."""
    options = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **more}
    if name in ("gpt-2", "llama-3", "qwen2", "o200k"):
        options.pop("unk_token")
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(core_of(name)), **options)
    made.chat_template = template
    return made
