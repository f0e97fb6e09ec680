"""Names of the files of a model folder that travel with its weights. What is not listed here stays where it is.

They are patterns as in ``fnmatch``, in the spelling of the Hugging Face hub. Each names text, JSON or the model of a
sentencepiece tokenizer: never code, never a pickle, and no weights. ``config.json``, ``README.md`` and the index of the
shards are written anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER = (
    "added_tokens.json", "merges.txt", "normalizer.json", "sentencepiece.bpe.model", "source.spm",
    "special_tokens_map.json", "spiece.model", "spm.model", "target.spm", "tekken.json", "*.tiktoken", "tokenizer.json",
    "tokenizer.model", "tokenizer.model.v[0-9]", "tokenizer.model.v[0-9][0-9]", "tokenizer_config.json", "vocab*.json",
    "vocab*.txt", *TEMPLATES,
)  # fmt: skip
VOCABULARY_FILES = ("merges.txt", "sentencepiece.bpe.model", "spiece.model", "tekken.json", "tokenizer.json",
                    "tokenizer.model", "vocab.json", "vocab.txt")  # fmt: skip
COMPANIONS = (
    *TOKENIZER,
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json", "audio_tokenizer_config.json",
    # of sentence-transformers: how the vectors of tokens become one
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/config.json",
    "router_config.json", "wordembedding_config.json", "whitespacetokenizer_config.json", "lstm_config.json",
    "cnn_config.json",
    # of diffusers: which folders a pipeline has, and the classes of what lies there
    "model_index.json",
    *(
        f"{name}{ending}"
        for name in ("LICEN[CS]E", "[Ll]icen[cs]e", "LICENSE-CODE", "LICENSE-MODEL", "MODEL_LICENSE", "COPYING",
                     "NOTICE", "[Nn]otice", "USE_POLICY")
        for ending in ("", ".txt", ".TXT", ".md", ".rst")
    ),
)  # fmt: skip

IN_FOLDERS = (*COMPANIONS, "config.json", "scheduler_config.json")  # of a folder that the model's own lists name


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a file, by its path in the model folder, is one of those that the patterns name."""
    return name.isprintable() and any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def travels(name: str, folders: Collection[str]) -> bool:
    """Return whether a file travels with the weights, by its path and the folders that the model's own lists name."""
    inner = max((each for each in folders if each and name.startswith(f"{each}/")), key=len, default="")
    return matches(name.removeprefix(f"{inner}/"), IN_FOLDERS if inner else COMPANIONS)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer: its settings and its tokens."""
    return (folder / "tokenizer_config.json").exists() and any((folder / name).exists() for name in VOCABULARY_FILES)
