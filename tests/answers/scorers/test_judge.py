"""A judge behind a real server, which also misbehaves."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.scorers.judge import PROMPT, Judge, Options, grade_in
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings
from mergekit_lite.answers.server import Reply
from mergekit_lite.errors import RunError
from tests.answers.fake_server import Fake, Trouble, fake_server
from tests.answers.scorers.asked import judged


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Clear and right.\nGrade: 8", 8),
        ("**Grade:** 8", 8),
        ("Grade: **8**", 8),
        ("Grade: [[8]]", 8),
        ("grade = 8.5", 8.5),
        ("Grade: 8/10", 8),
        ("Grade - 8.", 8),
        ("Grade: 3, no: it is right after all.\nGrade: 8", 8),
        ("<think>Grade: 2? It says Grade: 3.</think>Grade: 8", 8),
        ("8", 8),
        (" **8/10**\n", 8),
        ("Grade: 10", 10),
        ("Grade: 1", 1),
    ],
)
def test_grades(reply: str, value: float) -> None:
    assert grade_in(Reply(reply, "stop", None), Options()) == Score(value)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("I'd say it is good.", "no grade in the judge's reply: …I'd say it is good."),
        ("It has 8 sentences.", "no grade"),
        ("Grade: 7-8", "no grade"),
        ("Grade: 17 – 18", "no grade"),
        ("Grade: eight", "no grade"),
        ("<think>Grade: 2</think>", "no grade"),
        ("Grade: 11", "off the scale: 11"),
        ("Grade: 0", "off the scale: 0"),
        ("Grade: -3", "off the scale: -3"),
        ("Grade: 85", "off the scale: 85"),
        ("Grade: 4/5", "another scale"),
        ("upgrade 8", "no grade"),
    ],
)
def test_no_grade(reply: str, why: str) -> None:
    found = grade_in(Reply(reply, "stop", None), Options())
    assert found.value is None and why in found.why


def test_a_cut_reply_says_so() -> None:
    found = grade_in(Reply("It is", "length", None), Options(max_tokens=3))
    assert found == Score(None, "no grade in the judge's reply (it was cut at 3 tokens): …It is")


def test_another_scale() -> None:
    scale = Options(lowest=0, highest=1)
    assert grade_in(Reply("Grade: 0.25", "stop", None), scale) == Score(0.25)
    assert grade_in(Reply("Grade: 1/1", "stop", None), scale) == Score(1)
    assert grade_in(Reply("Grade: 2", "stop", None), scale).value is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"prompt": "Grade this."}, "{answer} is missing"),
        ({"prompt": "{answer} {qestion}"}, "no field 'qestion'"),
        ({"prompt": '{answer} {"grade": 1}'}, "braces"),
        ({"prompt": "{answer} {"}, "written twice"),
        ({"lowest": 5, "highest": 5}, "a lower and a higher one"),
        ({"temprature": 1}, "Extra inputs"),
    ],
)
def test_wrong_options(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Options.model_validate(options)


def judge(url: str, concurrency: int = 4, **options: object) -> Judge:
    settings = ScorerSettings(name="judge", kind="judge", model="m", server=url, concurrency=concurrency)
    return Judge(settings, Options.model_validate(options))


def number_in(text: str) -> int:
    return int(text.split("<answer>")[1].split("answer ")[1].split()[0])


def answers(count: int) -> list[Judged]:
    return [judged(f"answer {number} {{braces}}") for number in range(count)]


def test_every_answer_gets_its_own_grade_whatever_the_server_does() -> None:
    moods: list[Trouble] = ["drop", 500, 429, "empty", "garbage", "cut", None, None]
    fake = Fake(
        lambda text, before: moods[number_in(text) % len(moods)] if not before else None,
        say=lambda text, seed: f"Grade: {number_in(text) % 10 + 1}",
    )
    with fake_server(fake):
        found = judge(fake.url, retries=3).score(answers(40))
    assert found == [Score(number % 10 + 1) for number in range(40)]
    assert fake.most_open <= 4 and sum(fake.answered.values()) == 40
    asked = fake.bodies[0]
    assert asked["temperature"] == 0 and asked["max_tokens"] == 1024
    assert "What is one and one?" in asked["messages"][-1]["content"] and "from 1 (" in asked["messages"][-1]["content"]


def test_what_the_judge_refuses_has_no_score() -> None:
    fake = Fake(lambda text, before: 400 if number_in(text) == 3 else None, say=lambda text, seed: "Grade: 7")
    with fake_server(fake):
        found = judge(fake.url).score(answers(6))
    assert [score.value for score in found] == [7, 7, 7, None, 7, 7]
    assert "HTTP 400" in found[3].why and "no luck: 400" in found[3].why


def test_a_server_that_refuses_everybody_stops_the_run() -> None:
    with fake_server(Fake(lambda text, before: 401)) as fake, pytest.raises(RunError, match="OPENAI_API_KEY"):
        judge(fake.url).score(answers(3))


def test_the_prompt_is_the_users_to_write() -> None:
    fake = Fake(say=lambda text, seed: "Grade: 7")
    own = judge(fake.url, prompt="{reference}|{conversation}|{answer}|{{}}", system="You grade.")
    with fake_server(fake):
        own.settings = own.settings.model_copy(update={"server": fake.url})
        own.score([judged("{answer}", "{conversation}", reference="{lowest}")])
    [body] = fake.bodies
    assert [message["content"] for message in body["messages"]] == [
        "You grade.",
        "{lowest}|user: {conversation}|{answer}|{}",
    ]


def test_the_default_prompt_has_all_it_needs() -> None:
    assert Options().prompt == PROMPT and all(tag in PROMPT for tag in ("{conversation}", "{answer}", "Grade: N"))


def test_a_judge_may_have_several_urls_and_be_told_not_to_think() -> None:
    def say(text: str, seed: int) -> str:
        return f"Grade: {number_in(text) + 1}"

    with fake_server(Fake(say=say)) as one, fake_server(Fake(lambda text, before: 503, say=say)) as other:
        settings = ScorerSettings(name="j", kind="judge", model="m", server=(one.url, other.url), concurrency=2)
        how = {"chat_template_kwargs": {"enable_thinking": False}, "extra_body": {"effort": "low"}, "retries": 0}
        scores = Judge(settings, Options.model_validate(how)).score(answers(9))
    assert [score.value for score in scores] == list(range(1, 10))
    assert one.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False} and one.bodies[0]["effort"] == "low"
    assert one.bodies[0]["temperature"] == 0 and "top_p" not in one.bodies[0]


def test_a_judge_that_is_asked_several_times_gives_the_mean() -> None:
    """As Self-Rewarding has it. Replies without a grade are left out; each judging has its own seed."""
    said: dict[int, str] = {}

    def reply(body: dict[str, Any]) -> str:
        if "nonsense" in body["messages"][-1]["content"]:
            return "I don't know."
        return said.setdefault(body["seed"], ["Grade: 2", "Grade: 5", "Well."][len(said) % 3])

    with fake_server(Fake(reply=reply)) as fake:
        options = Options(times=3, temperature=0.7, lowest=0, highest=5)
        judge = Judge(ScorerSettings(name="self", kind="judge", model="m", server=fake.url, concurrency=1), options)
        first, second = judge.score([judged("fine"), judged("nonsense")])
        assert first == Score(3.5) and second.value is None and "no grade" in second.why
        assert len({body["seed"] for body in fake.bodies}) == 6
        once = Judge(judge.settings, Options(lowest=0, highest=5))
        once.score([judged("fine")])
        assert fake.bodies[-1]["seed"] == fake.bodies[0]["seed"], "the first judging is that of a judge asked once"


def test_a_judge_that_would_say_the_same_is_refused() -> None:
    with pytest.raises(ValidationError, match="raise the temperature"):
        Options(times=3)
