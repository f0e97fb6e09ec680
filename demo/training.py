"""From random weights to SFT, and from SFT a first stretch of the way to DPO, in plain PyTorch.

SFT imitates: it raises log p(answer | question) of every demonstration, the poor ones included.

DPO (Rafailov et al., 2023) prefers: of two answers to one question, the right one is to gain more probability
over the SFT model than the wrong one,

    loss = -log sigmoid(beta * (gain(right) - gain(wrong))),     gain(y) = log p(y | x) - log p_sft(y | x)
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from demo import task

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SFT_STEPS, SFT_BATCH, SFT_RATE = 1200, 32, 2e-3

# Twenty small steps: the preferred habit has started to grow and is far from its end. That unfinished way is
# what extrapolation lives on: with a larger rate or more steps, the best alpha is a smaller one.
DPO_STEPS, DPO_BATCH, DPO_RATE, DPO_BETA = 20, 64, 1.2e-5, 0.1
SAMPLES_PER_QUESTION = 4


class Answer(NamedTuple):
    text: str
    ended: bool  # by the model itself, not by the limit on its length


class Preference(NamedTuple):
    question: str
    right: str
    wrong: str


class Batch(NamedTuple):
    tokens: torch.Tensor  # [rows, length], padded on the right
    is_answer: torch.Tensor  # which of them the model has to say, its <end> included


def new_model(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """Return a Llama of 1.2 million parameters that samples from all of its distribution."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=224,
        intermediate_size=576,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=task.MAX_ANSWER_TOKENS, **special
    )
    return model


def batch_of(dialogues: Iterable[tuple[str, str]], tokenizer: "PreTrainedTokenizerFast") -> Batch:
    prompts, texts = [], []
    for question, answer in dialogues:
        prompts.append(task.as_prompt(question, tokenizer))
        texts.append(prompts[-1] + answer + tokenizer.eos_token)
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompt_lengths = torch.tensor([len(tokens) for tokens in tokenizer(prompts).input_ids])
    position = torch.arange(encoded.input_ids.shape[1])
    return Batch(encoded.input_ids, encoded.attention_mask.bool() & (position >= prompt_lengths[:, None]))


def answer_log_probs(model: "LlamaForCausalLM", batch: Batch) -> torch.Tensor:
    """log p(answer | question) of each row, the sum over the answer's tokens."""
    logits = model(input_ids=batch.tokens[:, :-1]).logits  # causal: padding on the right disturbs nobody
    log_probs = -cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    return (log_probs * batch.is_answer[:, 1:]).sum(1)


def supervise(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    demonstrations: list[tuple[str, str]],
) -> Iterator[float]:
    """SFT, one pass over the demonstrations; yields the loss per token after each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), SFT_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SFT_RATE, total_steps=len(demonstrations) // SFT_BATCH, pct_start=0.1
    )
    for start in range(0, len(demonstrations), SFT_BATCH):
        batch = batch_of(demonstrations[start : start + SFT_BATCH], tokenizer)
        loss = -answer_log_probs(model, batch).sum() / batch.is_answer.sum()
        descend(model, optimizer, loss)
        schedule.step()
        yield loss.item()


def prefer(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", preferences: list[Preference]
) -> Iterator[float]:
    """DPO, stopped early; yields the share of the batch's pairs whose right answer has gained more."""
    model.eval()
    batches = []
    for start in range(0, min(len(preferences), DPO_STEPS * DPO_BATCH), DPO_BATCH):
        pairs = preferences[start : start + DPO_BATCH]
        right = [(pair.question, pair.right) for pair in pairs]
        wrong = [(pair.question, pair.wrong) for pair in pairs]
        batches.append(batch_of(right + wrong, tokenizer))
    with torch.no_grad():  # the model still is the reference: its log-probabilities are wanted once only
        reference = [answer_log_probs(model, batch) for batch in batches]

    optimizer = torch.optim.AdamW(model.parameters(), DPO_RATE, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, total_iters=5)
    for batch, before in zip(batches, reference, strict=True):
        right_gain, wrong_gain = (answer_log_probs(model, batch) - before).chunk(2)
        descend(model, optimizer, -logsigmoid(DPO_BETA * (right_gain - wrong_gain)).mean())
        warm_up.step()
        yield (right_gain > wrong_gain).float().mean().item()


def descend(model: "LlamaForCausalLM", optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.inference_mode()
def answers(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    asked: list[str],
    seed: int,
    batch_size: int = 500,
) -> Iterator[Answer]:
    """Each question's answer, sampled the way the model's own generation config says.

    Every batch has its own seed: two models then draw the same random numbers for the same question, however
    long their earlier answers were, and differ by as little luck as possible.
    """
    model.eval()
    for start in range(0, len(asked), batch_size):
        torch.manual_seed(seed + start)
        prompts = [task.as_prompt(question, tokenizer) for question in asked[start : start + batch_size]]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        generated = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask)
        for tokens in generated[:, inputs.input_ids.shape[1] :].tolist():
            ended = tokenizer.eos_token_id in tokens
            said = tokens[: tokens.index(tokenizer.eos_token_id)] if ended else tokens
            yield Answer(tokenizer.decode(said), ended)


def preference_pairs(asked: list[str], given: list[Answer]) -> list[Preference]:
    """Return a right and a wrong answer to every question that the model has answered both ways.

    ``asked`` repeats each question as often as it was answered, one after the other.
    """
    pairs = []
    for start in range(0, len(asked), SAMPLES_PER_QUESTION):
        question = asked[start]
        texts = [answer.text for answer in given[start : start + SAMPLES_PER_QUESTION] if answer.ended]
        right = [text for text in texts if task.is_right(question, text)]
        wrong = [text for text in texts if not task.is_right(question, text)]
        if right and wrong:
            pairs.append(Preference(question, right[0], wrong[0]))
    return pairs
