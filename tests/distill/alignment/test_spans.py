"""Where tokens end in a text, and the groups of two tokenisations, beside naive second implementations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations

import numpy as np
import pytest

from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import CHANGED, NO_THOUGHTS, UNKNOWN, response_ends
from mergekit_lite.distillation.alignment.spelling import spelling_of
from tests.distill.alignment.ten_tokenizers import RULES, SPECIAL, WHOLE, tokenizer
from tests.tokenizers import TEMPLATES

# Of the published reference table of sequence alignment: what is hard for edit distances.
TABLE = ["I gets it", "I get s it", "knowledge", "2024", "20 24 !", "2 02 4 !"]
KINDS = [
    "etaoin shrdlu THE and",
    "ÄÖÜßéèñçøåœæ",
    "приветмир",
    "你好世界日本語テキスト",
    "שלוםעולםمرحبا",
    "🙂🎉👩\u200d👩\u200d👧🇩🇪👍🏽",
    "e\u0301a\u0308o\u0323\u0302\u0489",
    "".join(map(chr, range(1, 32))) + "\x7f\x85\u200b\u200e\u202e\ufeff",
    " \t\n\r\u00a0\u2003\u3000",
    "0123456789" * 3,
    "def f(x):\n\treturn {x: [y**2 for y in x]} != None;\n",
    "<|im_end|></s><s>[INST]<0x0A>Ġ##",
    "∑∫√ﬁ①Ⅷ™½",
]


def random_text(draw: random.Random) -> str:
    parts = []
    for _ in range(draw.randint(1, 6)):
        kind = draw.choice([*KINDS, None])
        length = draw.randint(1, 12)
        if kind is None:
            codes = (draw.randint(1, 0x10FFFF) for _ in range(length))
            parts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000 and code != 0x2581))
        else:
            start = draw.randrange(len(kind))
            parts.append(kind[start : start + length] if draw.random() < 0.5 else "".join(draw.choices(kind, k=length)))
    return "".join(parts)


def ids_of(name: str, text: str) -> list[int]:
    made = tokenizer(name)
    return [*made(text, add_special_tokens=False)["input_ids"], made.eos_token_id]


def naive_groups(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Compare every prefix of tokens of one with every one of the other; zero-width tokens go to what follows."""
    pairs = [
        (i, j)
        for i in range(len(student))
        for j in range(len(teacher))
        if student[i] == teacher[j] > 0
        if (i == 0 or student[i - 1] < student[i]) and (j == 0 or teacher[j - 1] < teacher[j])
    ]
    found, last = [], (sum(end == 0 for end in student) - 1, sum(end == 0 for end in teacher) - 1)
    for i, j in pairs:
        found.append((list(range(last[0] + 1, i + 1)), list(range(last[1] + 1, j + 1))))
        last = (i, j)
    if found:
        for side, ends, place in ((0, student, last[0]), (1, teacher, last[1])):
            found[-1][side].extend(n for n in range(place + 1, len(ends)) if ends[n] == ends[place])
    return found


def members(numbers: np.ndarray, count: int) -> list[list[int]]:
    return [[int(n) for n in np.flatnonzero(numbers == group)] for group in range(count)]


def test_groups_are_those_of_comparing_all_prefixes() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(400):
        size = draw.randint(1, 12)
        sides = [sorted(draw.choices(range(size + 1), k=draw.randint(0, 10))) for _ in range(2)]
        made = groups(*sides)
        naive = naive_groups(*sides)
        assert [first for first, _ in naive] == members(made.student, made.count), sides
        assert [second for _, second in naive] == members(made.teacher, made.count), sides


def test_published_examples() -> None:
    """Ends of TRL's example, and the exact answer to the example that edit distances get wrong."""
    made = groups([2, 5, 6, 10], [1, 2, 6, 8, 10])
    assert made.student.tolist() == [0, 1, 1, 2]
    assert made.teacher.tolist() == [0, 0, 1, 2, 2]
    gets = groups([1, 6, 9], [1, 5, 6, 9])  # "I gets it" as I, gets, it and as I, get, s, it
    last = [int(np.flatnonzero(gets.teacher == group)[-1]) for group in range(gets.count)]
    assert list(zip(gets.student.tolist(), last, strict=True)) == [(0, 0), (1, 2), (2, 3)]


def test_leftovers_and_empty_sides_are_in_no_group() -> None:
    made = groups([0, 0, 2, 5], [0, 2, 5, 5, 9, 10])
    assert made.student.tolist() == [-1, -1, 0, 1]
    assert made.teacher.tolist() == [-1, 0, 1, 1, -1, -1]
    assert groups([], [1, 2]).teacher.tolist() == [-1, -1]
    assert groups([], []).count == 0
    with pytest.raises(ValueError, match="ascend"):
        groups([3, 2], [3])


def exact(name: str, text: str) -> list[int] | None:
    """Return the ends, held to what they promise: they ascend, and what lies between spells the tokens."""
    made, ids, data = tokenizer(name), ids_of(name, text), text.encode()
    reasons: Counter[str] = Counter()
    found = response_ends(made, ids, text, reasons=reasons)
    if found is None:
        assert reasons.total() == 1 and next(iter(reasons)) in (UNKNOWN, CHANGED)
        return None
    ends = list(found)
    assert not reasons
    assert ends == sorted(ends) and ends[-1] == len(data) + 1 and len(ends) == len(ids)
    start = 0
    for token, end in zip(ids[:-1], ends, strict=False):
        piece = spelling_of(made).of(token)
        between = data[start:end]
        if piece != between:  # a blank that the tokenizer writes before the text, or drops
            blanks = (between.decode().split(), piece.decode().split())
            assert blanks[0] == blanks[1] and (start == 0 or name in ("t5", "bert", "bert-uncased")), (piece, between)
        start = end
    assert not data[start:].decode().strip() if name in ("t5", "bert", "bert-uncased") else start == len(data)
    return ends


def test_any_text_under_any_rules_goes_round() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    for text in [*TABLE, *(random_text(draw) for _ in range(40))]:
        if not text:
            continue
        ends = {name: exact(name, text) for name in RULES}
        found.update(name for name in RULES if ends[name] is not None)
        changed = {
            "llama-2": any(token in text for token in SPECIAL),  # a blank is written after each
            "unigram": "<0x0A>" in text or any(token in text for token in SPECIAL),  # is read as the byte
        }
        for name in WHOLE:
            assert ends[name] is not None or changed.get(name), (name, text)
        whole = {name: each for name, each in ends.items() if each is not None}
        for one, other in draw.sample(list(permutations(whole, 2)), 6):
            made = groups(whole[one], whole[other])
            data = text.encode() + b"."
            for numbers, own in ((made.student, whole[one]), (made.teacher, whole[other])):
                last = [own[members_of[-1]] for members_of in members(numbers, made.count)]
                cuts = [0, *last]
                assert b"".join(data[a:b] for a, b in pairwise(cuts)) == data
            naive = naive_groups(whole[one], whole[other])
            assert [first for first, _ in naive] == members(made.student, made.count)
            assert [second for _, second in naive] == members(made.teacher, made.count)
    assert all(found[name] >= len(TABLE) // 2 for name in RULES), found


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("bert-uncased", "The cat sat", CHANGED),
        ("t5", "ﬁnd it", CHANGED),
        ("qwen2", "cafe\u0301", CHANGED),
        ("characters", "a~b", UNKNOWN),
        ("bert", "a ~ b", UNKNOWN),
    ],
)
def test_what_a_tokenizer_changes_is_told_and_not_guessed(name: str, text: str, reason: str) -> None:
    reasons: Counter[str] = Counter()
    assert response_ends(tokenizer(name), ids_of(name, text), text, reasons=reasons) is None
    assert reasons == {reason: 1}
    assert response_ends(tokenizer(name), ids_of("gpt-2", "the cat"), "the cat") is None  # another one's numbers


THINKS = {
    "opened": TEMPLATES["thinking"],
    "in the text": TEMPLATES["chatml"],
    "marks of its own": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.thinking %}[THINK]{{ m.thinking }}[/THINK]{% endif %}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "stripped": TEMPLATES["llama-3"],
    "channels": (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|user|>analysis<|assistant|>{{ m.thinking }}<|im_end|><|im_start|>assistant{% endif %}"
        "<|user|>final<|assistant|>{% else %}<|assistant|>{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
}
QUESTION = [{"role": "user", "content": "What is one and one?"}]
ANSWERS = ["It is two.", " It is two.\n", "2", "\n\nIt is\n\ntwo 🙂  ", "<think>\nthe cat sat\n</think>\n\nIt is two."]


def marked(template: str, name: str, text: str, *, cut: bool = False, keep: int | None = None) -> list[int] | None:
    made = tokenizer(name, THINKS[template])
    ids = ChatTemplate(made).tokens(QUESTION, text, cut=cut).response[:keep]
    found = response_ends(made, ids, text)
    return None if found is None else list(found)


@pytest.mark.parametrize("text", ANSWERS)
def test_templates_meet_at_the_same_bytes(text: str) -> None:
    """Whatever a template writes around: the last byte of the answer is one end, the end of turn meets by its role."""
    size, last = len(text.encode()), len(text.rstrip().encode())
    for template in THINKS:
        for name in ("gpt-2", "llama-2", "gemma", "unigram"):
            ends = marked(template, name, text)
            assert ends is not None, (template, name)
            assert ends[-1] == size + 1 and ends.count(size + 1) == 1, (template, name, ends)
            assert last in ends, (template, name, ends)
            if "<think>" in text:
                thoughts = text.index("sat") + 3
                assert thoughts in ends, (template, name, ends)
                assert all(end == 0 or end > text.index("the") for end in ends), (template, name, ends)


def test_answers_that_were_cut_have_the_ends_of_what_is_left() -> None:
    for text in ANSWERS:
        for template in THINKS:
            for name in ("gpt-2", "llama-2", "gemma"):
                whole = marked(template, name, text)
                assert whole is not None
                blank = len(text) - len(text.lstrip())  # cut within these, nothing of the text can be told
                started = next(n for n, end in enumerate(whole) if end > blank)
                for keep in range(started + 1, len(whole)):
                    ends = marked(template, name, text, keep=keep)
                    # Cut within marks that aren't the text's own, the answer may not have begun.
                    assert ends == whole[:keep] or ("<think>" in text and ends is None), (template, name, keep, ends)
    ends = marked("in the text", "gpt-2", "It is tw", cut=True)
    assert ends is not None and ends[-1] == 8
    open_thoughts = "<think>\nthe cat s"
    for template in THINKS:
        ends = marked(template, "gpt-2", open_thoughts)
        assert ends is not None and ends[-1] == len(open_thoughts), template


def test_closed_thoughts_before_an_answer_are_before_the_text() -> None:
    ends = marked("opened", "gpt-2", "It is two.")
    assert ends is not None and ends[0] == 0 and ends[-2:] == [10, 11]


def test_a_template_that_leaves_thoughts_out_is_told() -> None:
    template = (
        "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
        "{{ '<think>\n\n</think>\n\n' if add_generation_prompt }}"
    )
    made = tokenizer("gpt-2", template)
    text = "<think>\nthe cat\n</think>\n\nIt is two."
    reasons: Counter[str] = Counter()
    ids = ChatTemplate(made).tokens(QUESTION, text).response
    assert response_ends(made, ids, text, reasons=reasons) is None
    assert reasons == {NO_THOUGHTS: 1}
