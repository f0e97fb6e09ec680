"""Instructions whose following a program can check: sixteen kinds over topics, and the function that checks them.

A check holds an answer to its instruction *and* to a floor that every answer has to reach, so that the form alone wins
nothing: enough different words, the topic among them, hardly any repetition, and an end. A bullet or a step without
words is none; a word to use counts only once it stands in a text that reaches the floor.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from demo.real.topics import TOPICS, WORDS, Split

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
SENTENCE = re.compile(r"[^.!?]*[.!?]+[\"'”’)]*")
MOST_REPEATED = 0.2  # share of 3-grams of words that occur earlier in the answer
LEAST_DIFFERENT = 0.5  # share of words that are different ones
LEAST_WORDS = 8
STEMS = {  # of topics whose plural adds more than an s
    "wolves": "wol", "volcanoes": "volcano", "potatoes": "potato", "tomatoes": "tomato", "buses": "bus", "foxes": "fox",
    "beaches": "beach", "swimming": "swim", "libraries": "librar", "bakeries": "baker", "theatres": "theat",
    "harbours": "harb",
}  # fmt: skip
ENDS = (".", "!", "?", '"', "”", ")", "}", "]", ">", "`")

Check = Callable[[str, Any], bool]
Arguments = Callable[[Split], list[Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of instruction: how it is asked, its variants, and what its answer must look like."""

    ask: str  # with {topic} and {given}
    holds: Check
    variants: Arguments = lambda split: [None]
    open_end: bool = False  # whether the answer may end without a mark, as items of a list do
    least_words: int = LEAST_WORDS


def words_of(text: str) -> list[str]:
    """Return the words of a text in lowercase."""
    return [word.lower() for word in WORD.findall(text)]


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text that have at least three words each; marks without words are part of none."""
    return [sentence for sentence in SENTENCE.findall(text) if len(words_of(sentence)) >= 3]


def names_topic(text: str, topic: str) -> bool:
    """Return whether a text has the topic's word, in the singular, the plural or another form of at most four letters
    more."""
    stem = STEMS.get(topic) or re.sub("ies$|ing$|(?<=[^s])s$", "", topic)
    return any(word.startswith(stem) and len(word) <= len(stem) + 4 for word in words_of(text))


def has_substance(text: str, topic: str, least_words: int = LEAST_WORDS, open_end: bool = False) -> bool:
    """Return whether an answer says something about its topic, without going in circles, and comes to an end."""
    words = words_of(text)
    grams = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0
    return (
        len(words) >= least_words
        and len(set(words)) >= LEAST_DIFFERENT * len(words)
        and repeated <= MOST_REPEATED
        and names_topic(text, topic)
        and (open_end or text.rstrip().endswith(ENDS))
    )


def bullets(text: str, count: int) -> bool:
    """Return whether a text is nothing but ``count`` bullets of at least two words each, all different."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    items = [" ".join(words_of(line)) for line in lines if re.match(r"[-*•] ", line)]
    return len(lines) == len(items) == count == len(set(items)) and all(" " in item for item in items)


def numbered(text: str, count: int) -> bool:
    """Return whether a text is nothing but the items 1 to ``count``, each with a word or more, all different."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    items = [" ".join(words_of(line)) for number, line in enumerate(lines, 1) if line.startswith(f"{number}. ")]
    return len(lines) == len(items) == count == len(set(items)) and all(items)


def json_of(text: str, keys: list[str]) -> bool:
    """Return whether a text is one JSON object with just these keys and a text for each, in a fence or without."""
    inside = re.fullmatch(r"\s*(?:```(?:json)?\s*(.*?)\s*```|(.*?))\s*", text, re.DOTALL)
    try:
        found = json.loads((inside[1] or inside[2]) if inside else text)
    except ValueError:
        return False
    if not isinstance(found, dict) or list(found) != keys:
        return False
    values = list(found.values())
    return all(isinstance(value, str) and words_of(value) for value in values) and len(set(values)) == len(values)


def quoted(text: str, given: None) -> bool:
    """Return whether all of a text is one sentence within one pair of double quotation marks."""
    inside = text.strip()
    marked = len(inside) > 2 and inside[0] in '"“' and inside[-1] in '"”' and not set('"“”') & set(inside[1:-1])
    return marked and len(SENTENCE.findall(inside)) <= 1  # its full stop may be missing


def begins(text: str, word: str) -> bool:
    """Return whether the first word of two sentences is the given one."""
    return words_of(text)[:1] == [word.lower()] and len(sentences_of(text)) == 2


def ends(text: str, phrase: str) -> bool:
    """Return whether two sentences end with a phrase that they didn't say before."""
    body = text.strip().removesuffix(phrase)
    return body != text.strip() and phrase.rstrip(".").lower() not in body.lower() and len(sentences_of(body)) == 2


def titled(text: str, given: None) -> bool:
    """Return whether two sentences come after one title of two words or more in <<double angles>>.

    The title of the instruction's example is none.
    """
    found = re.fullmatch(r"\s*<<([^<>]+)>>([^<>]+)", text)
    if found is None or "my title" in found[1].lower():
        return False
    return len(words_of(found[1])) >= 2 and len(sentences_of(found[2])) == 2


def postscript(text: str, given: None) -> bool:
    """Return whether two sentences are followed by one ``P.S.`` of three words or more."""
    before, mark, after = text.partition("P.S.")
    return bool(mark) and len(sentences_of(before)) == 2 and len(words_of(after)) >= 3 and "P.S." not in after


def two_parts(text: str, given: None) -> bool:
    """Return whether a line of three asterisks separates two parts of six words or more that differ."""
    parts = re.split(r"\n\s*\*\*\*\s*\n", text.strip())
    return len(parts) == 2 and all(len(words_of(part)) >= 6 for part in parts) and parts[0].strip() != parts[1].strip()


def _letters(text: str) -> str:
    return "".join(character for character in text if character.isalpha())


def _exactly(count: int) -> Callable[[Split], list[Any]]:
    return lambda split: [count, count + 1]


def _word_pairs(split: Split) -> list[Any]:
    words = WORDS[split]
    return [list(pair) for pair in pairwise(words)]


KINDS: dict[str, Kind] = {
    "lowercase": Kind(
        "Write two sentences about {topic}. Use lowercase letters only, no capital letters.",
        lambda text, given: _letters(text) == _letters(text).lower() and len(sentences_of(text)) == 2,
    ),
    "uppercase": Kind(
        "Write two sentences about {topic}. Use CAPITAL LETTERS only.",
        lambda text, given: _letters(text) == _letters(text).upper() and len(sentences_of(text)) == 2,
    ),
    "no commas": Kind(
        "Write three sentences about {topic}. Don't use any commas.",
        lambda text, given: "," not in text and len(sentences_of(text)) == 3,
    ),
    "at most": Kind(
        "What should one know about {topic}? Answer with at most {given} words.",
        lambda text, given: len(words_of(text)) <= given,
        lambda split: [15, 20, 25],
    ),
    "at least": Kind(
        "Tell me about {topic} in one paragraph of between {given} words and 60 words.",
        lambda text, given: given <= len(words_of(text)) <= 60 and len(text.strip().splitlines()) == 1,
        lambda split: [30, 40],
    ),
    "sentences": Kind(
        "Write exactly {given} sentences about {topic}.",
        lambda text, given: len(sentences_of(text)) == given == len(set(sentences_of(text))),
        _exactly(2),
    ),
    "use": Kind(
        'Write two sentences about {topic}. Use the words "{given[0]}" and "{given[1]}".',
        lambda text, given: {*given} <= {*words_of(text)} and len(sentences_of(text)) == 2,
        _word_pairs,
    ),
    "avoid": Kind(
        'Write two sentences about {topic} without the word "{given}".',
        lambda text, given: given not in words_of(text) and len(sentences_of(text)) == 2,
        lambda split: ["the", "and", "are"],
    ),
    "bullets": Kind(
        'List exactly {given} facts about {topic}. Begin each line with "- " and write nothing else.',
        bullets,
        _exactly(3),
        open_end=True,
    ),
    "numbered": Kind(
        "Give {given} reasons to like {topic} as a numbered list (1., 2., ...). "
        "Write nothing before or after the list.",
        numbered,
        _exactly(3),
        open_end=True,
    ),
    "JSON": Kind(
        'Answer with a JSON object only. It has two keys, "{given[0]}" and "{given[1]}", '
        "with a text about {topic} each.",
        json_of,
        lambda split: {
            "train": [["fact", "reason"], ["title", "text"], ["question", "answer"]],
            "dev": [["name", "use"], ["good", "bad"]],
            "test": [["claim", "example"], ["topic", "summary"], ["past", "future"]],
        }[split],
    ),
    "quotes": Kind(
        "Write a sentence about {topic}. Put your whole answer in double quotation marks.",
        quoted,
    ),
    "begin": Kind(
        'Write two sentences about {topic}. The first word of your answer must be "{given}".',
        begins,
        lambda split: {"train": ["Honestly", "Perhaps"], "dev": ["Surely"], "test": ["Imagine", "Sometimes"]}[split],
    ),
    "end": Kind(
        'Write two sentences about {topic}. Then end your answer with the words "{given}"',
        ends,
        lambda split: {
            "train": ["That is all.", "So much for that."],
            "dev": ["Now you know."],
            "test": ["Think about it.", "I hope this helps."],
        }[split],
    ),
    "title": Kind(
        "Write two sentences about {topic}. Put a title before them in double angle brackets, such as <<My Title>>.",
        titled,
    ),
    "postscript": Kind(
        'Write two sentences about {topic}. After them add a postscript that begins with "P.S."',
        postscript,
    ),
    "question": Kind(
        "Ask me one question about {topic}. Write nothing but the question.",
        lambda text, given: text.strip().endswith("?") and text.count("?") == 1 and len(SENTENCE.findall(text)) == 1,
        least_words=5,
    ),
    "two parts": Kind(
        "Write two short paragraphs about {topic}, with a line of three asterisks (***) between them.",
        two_parts,
    ),
}  # fmt: skip


def follows(kind: str, given: Any, topic: str, answer: str) -> bool:
    """Return whether an answer follows its instruction, and says something about the topic."""
    asked = KINDS[kind]
    return has_substance(answer, topic, asked.least_words, asked.open_end) and asked.holds(answer, given)


def followed(
    prompts: list[str], completions: list[str], domain: list[str], given: list[Any], topic: list[str], **columns: Any
) -> list[float | None]:
    """Score answers: 1 where the instruction was followed, else 0. A reward function as TRL calls them.

    Args:
        prompts: the instructions.
        completions: the answers.
        domain: the kind of the instruction; a column of the prompts, as are the following two.
        given: what the instruction says beyond its kind: a number, words.
        topic: what it is about.
        columns: the other columns, which don't count here.
    """
    return [float(follows(*asked)) for asked in zip(domain, given, topic, completions, strict=True)]


def every(split: Split) -> Iterator[dict[str, Any]]:
    """Yield every instruction of a split as a row of prompts."""
    for name, kind in KINDS.items():
        for number, (topic, given) in enumerate(product(TOPICS[split], kind.variants(split))):
            text = kind.ask.format(topic=topic, given=given)
            yield {
                "id": f"{split}-{name.replace(' ', '-').lower()}-{number}",
                "prompt": text, "domain": name, "given": given, "topic": topic,
            }  # fmt: skip


def drawn(split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return ``count`` instructions of a split, drawn at random, with as equal a number of each kind as can be."""
    rng = random.Random(f"{split} {seed}")
    by_kind: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    for row in every(split):
        by_kind[row["domain"]].append(row)
    for rows in by_kind.values():
        rng.shuffle(rows)
    mixed = [
        rows[turn] for turn in range(max(map(len, by_kind.values()))) for rows in by_kind.values() if turn < len(rows)
    ]
    chosen = mixed[:count]
    rng.shuffle(chosen)
    return chosen
