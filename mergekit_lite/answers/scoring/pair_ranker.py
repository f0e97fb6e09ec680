"""PairRM's model: reads a prompt with two answers, and says by how much the first one is better.

From LLM-Blender (Jiang et al. 2023, arXiv 2306.02561). With h the last hidden states of a DeBERTa that reads

    [CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP] [CLS] <|candidate2|> second [SEP]

and s, c₁, c₂ the places of the three marks,

    M(first, second) = mean over tasks of f(h_s, h_c₁) − f(h_s, h_c₂)      f(a, b) = V·tanh(W·[a; b] + u) + v

The prompt is cut at ``source`` tokens, and each answer at ``answer`` tokens and half of what the prompt leaves of its
own; marks and ends count. llm-blender 0.0.2 does the same for one prompt at a time; in its batches the longest prompt
decides what is left for all. Marks, and the text of the token that ends a part, are blanks where a prompt or an answer
has them, and left out where a tokenizer makes one of signs that look alike: no answer can pass for the other one.

Two layouts are published: llm-blender/PairRM with a configuration of its own, whose tokenizer and sizes are those of
the backbone it names; and llm-blender/PairRM-hf with transformers' configuration. The tensors are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lite.answers.likelihood import batches
from mergekit_lite.answers.loading import NO_CODE, Placed, config_of, fetched, tokenizer_of
from mergekit_lite.answers.template import Tokens
from mergekit_lite.errors import CheckpointError, listing, shortened

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from mergekit_lite.checkpoint import Checkpoint

MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")  # the tokens that the ranker adds, in order
IDS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")  # of them, in a configuration
BACKBONE, HEAD = "pretrained_model.", ("head_layer.1.", "head_layer.4.")  # beginnings of names: backbone, W, V
EMBEDDINGS = f"{BACKBONE}embeddings.word_embeddings.weight"
POSITIONS = f"{BACKBONE}embeddings.position_ids"  # 0, 1, 2 …: a buffer that older versions wrote
KIND = "deberta-v2"  # of the backbone, v3 too
SOURCE, ANSWER = 1224, 412  # tokens, as published


class Comparison(NamedTuple):
    """Two answers to a prompt, in the order in which they are read."""

    source: str  # the prompt
    first: str
    second: str


class Lengths(NamedTuple):
    """Where texts are cut, in tokens."""

    source: int
    answer: int  # for two of them; what the prompt leaves is shared between them


class Layer(NamedTuple):
    """A linear layer of the head."""

    weight: Tensor
    bias: Tensor

    def of(self, states: Tensor) -> Tensor:
        """Return what the layer makes of states (B, in): (B, out)."""
        return states @ self.weight.T + self.bias


class PairRanker:
    """A backbone and its head. ``compare`` is all there is to call."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: tuple[Layer, Layer],
        tokenizer: PreTrainedTokenizerBase,
        marks: Mapping[str, int],
        lengths: Lengths,
    ):
        self.model, self.head, self.tokenizer, self.marks, self.lengths = model, head, tokenizer, marks, lengths

    def compare(self, pairs: Sequence[Comparison], batch_size: int) -> list[float]:
        """Return M(first, second) of each pair, in order: above 0 where the first is better."""
        import torch

        rows = [self.tokens(pair) for pair in pairs]
        by_place: dict[int, float] = {}
        with torch.inference_mode():
            for places in batches(rows, batch_size):
                by_place |= zip(places, self._margins([rows[place] for place in places]), strict=True)
        return [by_place[place] for place in range(len(rows))]

    def tokens(self, pair: Comparison) -> Tokens:
        """Return what the model reads: the prompt, and both answers as the response."""
        source = self._part(MARKS[0], pair.source, self.lengths.source)
        most = self.lengths.answer + (self.lengths.source - len(source)) // 2
        answers = (self._part(mark, text, most) for mark, text in zip(MARKS[1:3], pair[1:], strict=True))
        return Tokens(source, tuple(token for answer in answers for token in answer))

    def _part(self, mark: str, text: str, most: int) -> tuple[int, ...]:
        """Return a text behind its mark, between [CLS] and [SEP], of ``most`` tokens at most."""
        for token in (self.tokenizer.sep_token, *MARKS):
            text = text.replace(token, " ")
        ids = self.tokenizer(mark + text)["input_ids"]
        if ids[1] != self.marks[mark]:  # normalised, a combining sign is one with the end of the mark
            ids = self.tokenizer(f"{mark} {text}")["input_ids"]
        taken = {*self.marks.values(), self.tokenizer.sep_token_id}  # normalised, ＜|source|＞ is a mark
        words = [token for token in ids[2:-1] if token not in taken]
        return (*ids[:2], *words[: most - 3], ids[-1])

    def _margins(self, rows: Sequence[Tokens]) -> list[float]:
        import torch

        from mergekit_lite.answers.logprobs import padded

        batch = padded(rows, device=self.model.device)
        hidden = self.model(**batch.inputs).last_hidden_state
        source, first, second = (
            hidden[torch.arange(len(rows)), [(*row.prompt, *row.response).index(self.marks[mark]) for row in rows]]
            for mark in MARKS[:3]
        )
        inner, outer = self.head
        better, worse = (outer.of(inner.of(torch.cat([source, answer], 1)).tanh()) for answer in (first, second))
        margins: list[float] = (better - worse).double().mean(1).tolist()
        return margins


def load(
    path: str, place: Placed, backbone: str | None = None, source: int | None = None, answer: int | None = None
) -> PairRanker:
    """Load a ranker in one of the published layouts; no code of its folder is run.

    Args:
        path: a folder, or org/name on the hub.
        place: device and dtype.
        backbone: the model whose tokenizer and sizes a ranker in PairRM's own layout has.
        source: tokens of a prompt; by default as the configuration says, or as published.
        answer: tokens of an answer, likewise.

    Raises:
        CheckpointError: it is no such ranker; the message has every reason.
    """
    from mergekit_lite.checkpoint import open_checkpoint

    opened = open_checkpoint(path)
    said = opened.config or {}
    tokenizer, config = (
        _own_layout(path, said, backbone) if "ranker_type" in said else _transformers(path, said, backbone)
    )
    marks = {mark: tokenizer.get_vocab().get(mark, -1) for mark in MARKS}
    if EMBEDDINGS in opened.tensors and (shape := opened.tensors[EMBEDDINGS].shape):
        config.vocab_size = shape[0]
    lengths = Lengths(
        _length(path, said, source, "source_maxlength", SOURCE),
        _length(path, said, answer, "candidate_maxlength", ANSWER),
    )
    problems = [*_wrong_marks(said, tokenizer, marks, config.vocab_size), *_too_long(config, lengths)]
    if problems:
        raise _no_ranker(path, problems)
    model, head = _filled(path, opened, config, place)
    return PairRanker(model, head, tokenizer, marks, lengths)


def _wrong_marks(
    said: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, marks: Mapping[str, int], rows: int
) -> Iterator[str]:
    """Yield what is wrong with how the tokenizer writes marks, and the ends of texts."""
    for key, (mark, token) in zip(IDS, marks.items(), strict=True):
        if token < 0:
            yield f"the tokenizer has no {mark}"
        elif said.get(key, token) != token:
            yield f"the configuration has {said[key]!r} as {key}, and the tokenizer writes {mark} as {token}"
        elif token >= rows:
            yield f"the tokenizer writes {mark} as {token}, and the embeddings have {rows:,} rows"
        elif tokenizer.sep_token is None or not _between(tokenizer(mark + "a")["input_ids"], token, tokenizer):
            yield f"the tokenizer doesn't write a text behind {mark} between one token and [SEP]"


def _between(ids: Sequence[int], mark: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    return [*ids[1:2], *ids[-1:]] == [mark, tokenizer.sep_token_id]


def _too_long(config: PretrainedConfig, lengths: Lengths) -> Iterator[str]:
    if config.position_biased_input and lengths.source + 2 * lengths.answer > config.max_position_embeddings:
        yield (
            f"it knows {config.max_position_embeddings:,} places, fewer than {lengths.source:,} tokens of a prompt and "
            f"two answers of {lengths.answer:,}: lower source_length and answer_length"
        )


def _own_layout(
    path: str, said: Mapping[str, Any], backbone: str | None
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    if said["ranker_type"] != "pairranker":
        raise _no_ranker(path, [f"its ranker_type is {said['ranker_type']!r}, expected 'pairranker'"])
    if backbone is None:
        raise CheckpointError(
            f"{path} has the weights of a pair ranker, but neither the sizes of its backbone nor its tokenizer. Its "
            f"configuration names {shortened(str(said.get('model_name')), 80)}: give that as the option `backbone`, a "
            "folder or org/name, if you trust it; or name llm-blender/PairRM-hf, which has both."
        )
    tokenizer = tokenizer_of(backbone)
    tokenizer.add_tokens(list(MARKS))
    return tokenizer, _checked(backbone, config_of(backbone, "a DeBERTa"))


def _transformers(
    path: str, said: Mapping[str, Any], backbone: str | None
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    if missing := [key for key in IDS if key not in said]:
        raise _no_ranker(path, [f"its configuration has neither 'ranker_type' nor {', '.join(map(repr, missing))}"])
    if backbone is not None:
        raise _no_ranker(path, ["it has its own sizes and tokenizer: leave the option `backbone` out"])
    return tokenizer_of(path), _checked(path, config_of(path, "a pair ranker"))


def _checked(path: str, config: PretrainedConfig) -> PretrainedConfig:
    if config.model_type != KIND:
        raise CheckpointError(f"{path} is a {config.model_type}: known backbones of pair rankers are {KIND}, v3 too.")
    return config


def _length(path: str, said: Mapping[str, Any], given: int | None, key: str, published: int) -> int:
    value = given if given is not None else said.get(key, published)
    if not isinstance(value, int) or value < 4:
        raise _no_ranker(path, [f"{key} is {value!r}: expected a number of tokens from 4"])
    return value


def _filled(
    path: str, opened: Checkpoint, config: PretrainedConfig, place: Placed
) -> tuple[PreTrainedModel, tuple[Layer, Layer]]:
    """Return backbone and head with their weights. Raises CheckpointError with each tensor that doesn't fit."""
    import torch
    from transformers import AutoModel

    from mergekit_lite.checkpoint.reader import Reader

    made: Any = AutoModel
    model = fetched(path, "a pair ranker", lambda: made.from_config(config, **NO_CODE))
    expected = {f"{BACKBONE}{name}": tuple(tensor.shape) for name, tensor in model.named_parameters()}
    hidden = config.hidden_size
    outer = opened.tensors.get(f"{HEAD[1]}weight")
    tasks = outer.shape[0] if outer is not None and outer.shape else 1
    for beginning, shape in zip(HEAD, ((hidden, 2 * hidden), (tasks, hidden)), strict=True):
        expected |= {f"{beginning}weight": shape, f"{beginning}bias": shape[:1]}
    found = {name: tuple(spec.shape) for name, spec in opened.tensors.items() if name != POSITIONS}
    problems = [f"the weights have no {name}" for name in expected if name not in found]
    problems += [f"{name} in the weights belongs to nothing that is known" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise _no_ranker(path, problems)
    with Reader() as reader:
        tensors = {
            name: opened.tensors[name].elements(reader, 0, opened.tensors[name].numel).view(shape)
            for name, shape in expected.items()
        }
    dtype = tensors[EMBEDDINGS].dtype if place.dtype == "auto" else place.dtype
    tensors = {name: tensor.to(place.device, dtype) for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, parameter in model.to(device=place.device, dtype=dtype).named_parameters():
            parameter.copy_(tensors[f"{BACKBONE}{name}"])
    inner, last = (Layer(tensors[f"{beginning}weight"], tensors[f"{beginning}bias"]) for beginning in HEAD)
    return model.eval(), (inner, last)


def _no_ranker(path: str, problems: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        listing(f"{path} is no pair ranker. Name one like llm-blender/PairRM-hf. What is wrong", problems)
    )
