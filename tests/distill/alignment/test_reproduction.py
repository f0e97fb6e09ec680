"""FuseLLM's and FuseChat's alignment beside what their released functions gave, and beside naive implementations."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from mergekit_lite.distillation.alignment.edit_distance import Nearest, edit_distance, edit_distance_map
from mergekit_lite.distillation.alignment.reproduction import (
    Released,
    aligned_steps,
    bare,
    counted_pairs,
    statistics_map,
    warped,
)
from tests.distill.alignment.ten_tokenizers import tokenizer


def levenshtein(one: str, other: str) -> int:
    """The table, row by row."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        new = [i + 1]
        for j, theirs in enumerate(other):
            new.append(min(row[j] + (letter != theirs), row[j + 1] + 1, new[j] + 1))
        row = new
    return row[-1]


def test_distances_and_nearest_words_are_those_of_the_table() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(draw.choices("abcé🙂", k=draw.randint(0, longest)))

    for _ in range(20):
        words = [word(draw.choice((4, 9, 70))) for _ in range(25)]
        for asked in (word(6), word(6) + "x", word(80)):
            distances = [levenshtein(asked, each) for each in words]
            assert [edit_distance(asked, each) for each in words] == distances
            assert Nearest(words).to(asked) == distances.index(min(distances)), (asked, words)


WARPED = [
    ("▁I ▁gets ▁it", "ĠI Ġget s Ġit", [[0], [1], [2, 3]], 3),
    ("▁I ▁get s ▁it", "ĠI Ġgets Ġit", [[0], [1], [2], [2]], 3),
    ("▁kn ow ledge", "Ġknow ledge", [[0], [0], [1]], 4),
    ("▁2024", "Ġ2 0 2 4", [[0, 1, 2, 3]], 12),
    ("▁20 24 !", "Ġ2 02 4 !", [[0, 1], [2], [3]], 4),
]


@pytest.mark.parametrize(("pivot", "source", "steps", "cost"), WARPED)
def test_warping_as_the_released_functions_gave_it(pivot: str, source: str, steps: list[list[int]], cost: int) -> None:
    made, least = warped(pivot.split(), source.split())
    assert least == cost
    assert made == steps


def least_cost(pivot: list[str], source: list[str]) -> int:
    """Try all paths."""
    own = levenshtein(source[-1], pivot[-1])
    shorter = [(pivot[:-1], source[:-1]), (pivot, source[:-1]), (pivot[:-1], source)]
    return own + min((least_cost(*each) for each in shorter if all(each)), default=0)


@pytest.mark.parametrize("released", ["fusellm", "fusechat"])
def test_warping_costs_the_least_of_all_paths(released: Released) -> None:
    draw = random.Random(5)
    for _ in range(30):
        pivot, source = (
            ["".join(draw.choices("ab", k=draw.randint(1, 3))) for _ in range(draw.randint(1, 4))] for _ in "12"
        )
        steps, cost = warped(pivot, source, released)
        assert cost == least_cost(pivot, source)
        assert cost == sum(
            levenshtein(source[step], own) for own, each in zip(pivot, steps, strict=True) for step in each
        )
        assert all(steps) and sorted({step for each in steps for step in each}) == list(range(len(source)))


PIVOT = ["<s>", "▁I", "▁gets", "▁it", "▁get", "s", "▁them"]
SOURCE = ["ĠI", "Ġget", "s", "Ġit", "Ġthem", "Ġgot", "Ġutterly"]
TOPS = [
    {"Ġget": 3.0, "Ġgot": 1.0},
    {"s": 4.0, "Ġit": 2.0},
    {"Ġit": 2.5, "Ġthem": 0.5},
    {"Ġthem": 1.5, "Ġutterly": 1.0},
]
EXACT = {token: own for token in SOURCE if (own := token.replace("Ġ", "▁")) in PIVOT}


def steps_of(released: Released, **more: str) -> list[dict[str, float]]:
    pivot, source = ["▁I", "▁gets", "▁it"], ["ĠI", "Ġget", "s", "Ġit"]
    steps, _ = warped(pivot, source, released)
    return aligned_steps(pivot, source, steps, TOPS, EXACT | more, released=released, suffixes=bool(more))


def test_distributions_as_the_released_functions_gave_them() -> None:
    assert steps_of("fusellm") == [{"▁get": 3.0}, {"▁gets": 1.0}, {"▁it": 1.0}]  # its own token: off by one
    assert steps_of("fusechat") == [{"▁get": 3.0}, {"▁it": 1.0}, {"▁it": 1.0}]
    mapped = {"Ġgot": "▁get", "Ġutterly": "▁it"}
    assert steps_of("fusechat", **mapped) == [{"▁get": 3.0}, {"▁it": 1.0}, {"▁them": 1.5, "▁it": 1.0}]


def test_several_steps_that_make_up_a_token_give_the_last_of_them() -> None:
    source, tops = ["Ġkno", "wle", "d"], [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    made = aligned_steps(
        ["▁knowled"],
        [*source[:2], "x", "d"],
        [[0, 1, 2, 3]],
        [*tops, {"e": 2.0}],
        {"e": "▁e"},
        released="fusechat",
        suffixes=True,
    )
    assert made == [{"▁e": 2.0}]
    made = aligned_steps(["▁know", "s"], source, [[0, 2], [1]], tops, {}, released="fusechat", suffixes=True)
    assert made == [{"s": 1.0}, {"s": 1.0}]


def test_the_map_by_edits_is_the_first_of_the_nearest() -> None:
    own, other = tokenizer("llama-2"), tokenizer("o200k")
    made = edit_distance_map(own, other).student_ids
    words = {number: token.replace("▁", " ", token[:1] == "▁") for token, number in own.get_vocab().items()}
    for token in random.Random(1).sample(range(len(other)), 40):
        word = other.convert_ids_to_tokens(token)
        word = word.replace("Ġ", " ", word[:1] == "Ġ")
        distances = [(levenshtein(word, words[number]), number) for number in sorted(words)]
        assert made[token] == min(distances)[1], word


def test_the_map_by_statistics() -> None:
    """The value of each pair is worked out here; what is seen often is put back."""
    own, other = tokenizer("llama-2"), tokenizer("gpt-2")
    counts: Counter[tuple[int, int]] = Counter()
    for text in ("The cat sat on the mat", "I gets it 2024"):
        ids = [each(text, add_special_tokens=False)["input_ids"] for each in (own, other)]
        steps, _ = warped(*(each.convert_ids_to_tokens(row) for each, row in zip((own, other), ids, strict=True)))
        counted_pairs(*ids, steps, counts)
    made = statistics_map(own, other, counts).student_ids
    for theirs in {pair[1] for pair in counts}:
        values = []
        for (token, their), count in counts.items():
            if their == theirs:
                texts = bare(own.convert_ids_to_tokens(token)), bare(other.convert_ids_to_tokens(their))
                within = texts[0] in texts[1] or texts[1] in texts[0]
                values.append((levenshtein(*texts) * (0.1 if within else 1) / (1 + np.exp(-count)), token))
        assert made[theirs] == min(values)[1]
    seen = {pair[1] for pair in counts}
    assert all(made[token] == own.unk_token_id for token in range(len(other)) if token not in seen and token > 2)
    assert (made[other.bos_token_id], made[other.eos_token_id]) == (own.bos_token_id, own.eos_token_id)
    two = other.convert_tokens_to_ids("2")
    often = {(own.convert_tokens_to_ids("e"), two): 50, (own.convert_tokens_to_ids("t"), two): 1}
    assert statistics_map(own, other, often).student_ids[two] == own.convert_tokens_to_ids("t")  # .7311 against 1.0
