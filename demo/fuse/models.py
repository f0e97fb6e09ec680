"""Three teachers and a student: four architectures, four kinds of tokenizer, no two with the same chat template."""

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from demo.distill.models import BARE, CHATML, HEADERS, LINES, Family, byte_pairs, llama, qwen2, rotary, spoken, words

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

BLANK = "▁"  # SentencePiece's


def sentence_pairs(size: int, text: Iterable[str]) -> "Tokenizer":
    """Gemma's kind: pairs of characters merged, a mark for a blank, and bytes for what it has never seen.

    It cuts nothing beforehand, so signs and digits become one token: ``+4``, ``=1``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    unknown = "<unk>"
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [unknown, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def likeliest_pieces(size: int, text: Iterable[str]) -> "Tokenizer":
    """T5's kind: a text becomes the pieces that are likeliest together (Unigram)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    unknown = "<unk>"
    trainer = trainers.UnigramTrainer(vocab_size=size, unk_token=unknown, special_tokens=[unknown], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    # Pieces of equal likelihood come in another order each time, told apart by a ten-thousandth: here by their letters.
    learnt = {piece: round(score, 3) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]}
    pieces = sorted(learnt.items(), key=lambda item: (item[0] != unknown, -item[1], item[0]))
    tokenizer.model = models.Unigram(pieces, unk_id=0)
    return tokenizer


def gemma(width: int, layers: int) -> Callable[[dict[str, Any]], "PretrainedConfig"]:
    """Gemma: norms that begin at one, a gated GELU, one key head, embeddings scaled by √width and tied."""

    def config(numbers: dict[str, Any]) -> "PretrainedConfig":
        from transformers import GemmaConfig

        return GemmaConfig(**numbers, **rotary(width, layers), num_key_value_heads=1, head_dim=width // 4)

    return config


def neox(width: int, layers: int) -> Callable[[dict[str, Any]], "PretrainedConfig"]:
    """GPT-NeoX: attention and MLP side by side, positions in a quarter of each head, biases everywhere."""

    def config(numbers: dict[str, Any]) -> "PretrainedConfig":
        from transformers import GPTNeoXConfig

        return GPTNeoXConfig(**numbers, **rotary(width, layers))

    return config


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", lambda text: spoken(byte_pairs(300, text), HEADERS), llama(width=128, layers=2)),
        Family("gemma", lambda text: spoken(sentence_pairs(320, text), BARE), gemma(width=128, layers=2)),
        Family("neox", lambda text: spoken(likeliest_pieces(72, text), LINES), neox(width=128, layers=2)),
        Family("student", lambda text: spoken(words(), CHATML), qwen2(width=96, layers=2)),
    )
}
