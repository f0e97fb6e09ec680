"""A judge between two answers, behind a real server: both orders, ties, and judges that favour a place."""

from __future__ import annotations

from itertools import product

import pytest
from pydantic import ValidationError

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.scorers.pairwise import PROMPT, Options, Pairwise, of_both_orders, verdict_in
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings
from mergekit_lite.answers.server import Reply
from tests.answers.fake_server import Fake, fake_server
from tests.answers.scorers.asked import judged


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


def pairwise(url: str, **options: object) -> Pairwise:
    settings = ScorerSettings(name="wins", kind="pairwise", model="m", server=url)
    return Pairwise(settings, Options.model_validate({"retries": 0, **options}))


def shown(text: str) -> tuple[str, str]:
    """Answers A and B, as the judge reads them."""
    first, second = (text.split(f"<answer_{place}>\n")[1].split(f"\n</answer_{place}>")[0] for place in "ab")
    return first, second


def longer(text: str, seed: int) -> str:
    """A judge that likes length, wherever it stands."""
    first, second = map(len, shown(text))
    return f"Better: {'tie' if first == second else 'A' if first > second else 'B'}"


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Both are fine, but A is clearer.\nBetter: A", 1),
        ("**Better: B**", 0),
        ("**Better:** B.", 0),
        ("Better: [[tie]]", 0.5),
        ("better: Answer B", 0),
        ("Better: A, no.\nBetter: tie", 0.5),
        ("<think>Better: A?</think>Better: B", 0),
        ("B", 0),
        (" **Tie**\n", 0.5),
    ],
)
def test_verdicts(reply: str, value: float) -> None:
    assert verdict_in(Reply(reply, "stop", None), Options()) == Score(value)


@pytest.mark.parametrize(
    "reply",
    ["A is better.", "Better: both", "Better: A or B", "Better: A/B", "Better: Anna", "<think>Better: A</think>"],
)
def test_no_verdict(reply: str) -> None:
    found = verdict_in(Reply(reply, "length", None), Options(max_tokens=7))
    assert found.value is None and "no verdict in the judge's reply (it was cut at 7 tokens)" in found.why


def test_both_orders_by_all_cases() -> None:
    """A win takes both orders; swapping the two answers turns the score."""
    for first, second in product((0, 0.5, 1), repeat=2):
        won, lost = (first, second) == (1, 0), (first, second) == (0, 1)
        assert of_both_orders(Score(first), Score(second)) == Score(1 if won else 0 if lost else 0.5)
        turned = of_both_orders(Score(second), Score(first))
        assert turned.value == 1 - (of_both_orders(Score(first), Score(second)).value or 0)
    missing = Score(None, "why")
    assert of_both_orders(missing, Score(1)) == of_both_orders(Score(1), missing) == missing


def test_a_fair_judge_and_one_that_favours_a_place() -> None:
    answers = [judged(answer, reference="abc") for answer in ("abcd", "ab", "xyz", "abc ", "{answer_b} and more")]
    with fake_server(Fake(say=longer)) as fake:
        assert [score.value for score in pairwise(fake.url).score(answers)] == [1, 0, 0.5, 0.5, 1]
        assert len(fake.bodies) == 2 * 4, "the opponent's own answer is not asked"
        orders = {shown(body["messages"][-1]["content"]) for body in fake.bodies}
        assert {("abcd", "abc"), ("abc", "abcd")} <= orders
        assert fake.bodies[0]["temperature"] == 0
    for place in "AB":
        with fake_server(Fake(say=lambda text, seed, place=place: f"Better: {place}")) as fake:
            assert {score.value for score in pairwise(fake.url).score(answers)} == {0.5}


def test_what_has_no_score() -> None:
    def say(text: str, seed: int) -> str:
        return "I can't say." if shown(text)[0] == "silent" else "Better: B"

    with fake_server(Fake(lambda text, before: 400 if "refused" in text else None, say=say)) as fake:
        answers = [judged(answer, reference="abc") for answer in ("silent", "refused", "plain")]
        silent, refused, plain, alone = pairwise(fake.url).score([*answers, judged("no opponent")])
    assert silent.value is None and "no verdict" in silent.why
    assert refused.value is None and "HTTP 400" in refused.why
    assert plain == Score(0.5) and alone == Score(None, "the prompt has no reference, which is the answer to beat")


def test_nothing_to_ask_asks_nobody() -> None:
    same: list[Judged] = [judged("abc", reference="abc")]
    assert pairwise("http://127.0.0.1:9/v1").score(same) == [Score(0.5)]


@pytest.mark.parametrize(
    ("prompt", "why"), [("{answer_a}", "{answer_b} is missing"), ("{answer_a}{answer_b}{x}", "no field 'x'")]
)
def test_wrong_prompts(prompt: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Options(prompt=prompt)
    assert Options().prompt == PROMPT


def test_against_rivals_each_pair_is_asked_once() -> None:
    answers = ["abcd", "ab", "xyz", "abc", "xyz "]
    given = [judged(each)._replace(rivals=(*answers[:at], *answers[at + 1 :])) for at, each in enumerate(answers)]
    with fake_server(Fake(say=longer)) as fake:
        found = [score.value for score in pairwise(fake.url, against="rivals").score(given)]
        lengths = [len(each) for each in answers]
        same = {(2, 4), (4, 2), (0, 4), (4, 0)}  # equal texts but for blanks, and texts of one length
        expected = [
            sum(0.5 if (at, other) in same or lengths[at] == lengths[other] else float(lengths[at] > lengths[other])
                for other in range(5) if other != at) / 4
            for at in range(5)
        ]  # fmt: skip
        assert found == pytest.approx(expected) and sum(expected) == 5 / 2
        assert len(fake.bodies) == 5 * 4 - 2
        [alone] = pairwise(fake.url, against="rivals").score([judged("abc", reference="ab")])
    assert alone == Score(None, "there is no other answer to the prompt to compare with")
