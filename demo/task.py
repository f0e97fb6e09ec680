"""The task: add up a handful of digits, and the crowd that shows how it is done.

A question is ``7+4+9+3``. Two kinds of people wrote the demonstrations: most blurt a sum out (``23``) and
are wrong more often than right; the others work it out step by step (``7+4=11+9=20+3=23``) and seldom slip.
In both styles the last number is the answer, so a program can check it. The model is never told that working
it out pays: preference training has to find that habit from which of the model's own answers were right.
"""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORKED_SHARE = 0.35  # of the demonstrations
BLURT_ERROR = 0.6  # how often a blurted sum is off by up to three
STEP_ERROR = 0.02  # how often one step of a worked answer is off by one
MAX_ANSWER_TOKENS = 28  # the longest worked answer and its end take 22; what goes on has run away

ALPHABET = "0123456789+="
SPECIAL_TOKENS = ["<pad>", "<end>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def questions(count: int, rng: random.Random) -> list[str]:
    """Return distinct sums of three to five digits, so that slices of the list never share a question."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(3, 5)))] = None
    mixed = list(found)
    rng.shuffle(mixed)  # short sums run out first: without this they would all be at the front
    return mixed


def demonstrate(question: str, rng: random.Random) -> str:
    """Return the answer that one person of the crowd, drawn at random, writes down."""
    digits = [int(digit) for digit in question.split("+")]
    if rng.random() >= WORKED_SHARE:
        return str(sum(digits) + (rng.choice([-3, -2, -1, 1, 2, 3]) if rng.random() < BLURT_ERROR else 0))
    total = digits[0]
    answer = str(total)
    for digit in digits[1:]:
        total += digit + (rng.choice([-1, 1]) if rng.random() < STEP_ERROR else 0)
        answer += f"+{digit}={total}"
    return answer


def is_right(question: str, answer: str) -> bool:
    """Return whether the last number is right, whatever leads to it: the verifier."""
    return answer.split("=")[-1] == str(sum(map(int, question.split("+"))))


def is_worked(answer: str) -> bool:
    return "=" in answer


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """One token for each character, so that the vocabulary gives no sums away."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def as_prompt(question: str, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the question in the chat template, up to where the answer begins."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
