"""Several URLs of one model: the load spread, and no answer lost where one of them fails."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import ExitStack

import pytest

from mergekit_lite.answers import endpoints as module
from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.server import Server
from tests.answers.fake_server import Fake, answer_to, fake_server
from tests.answers.test_server import questions, replies


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(module, "FIRST_REST", 0.1)


def asked(fakes: list[Fake], number: int = 60, **how: object) -> tuple[Server, dict[object, Reply]]:
    how = {"concurrency": 4, "timeout": 120.0, "retries": 2} | how
    server = Server([fake.url for fake in fakes], RequestBody("m", Sampling()), **how)  # type: ignore[arg-type]
    found = replies(server, questions([f"q{n}" for n in range(number)]))
    expected = {f"q{n}": Reply(answer_to(f"q{n}", n), "stop", 3) for n in range(number)}
    assert all(found[key] == expected[str(key)] for key in found)  # whoever gave it
    return server, found


def test_the_load_is_spread_and_each_url_has_its_own_limit() -> None:
    seen: list[int] = []
    with ExitStack() as stack:
        fakes = [stack.enter_context(fake_server()) for _ in range(3)]
        meeting = threading.Barrier(12, lambda: seen.extend(fake.asked.total() for fake in fakes), timeout=120)
        for fake in fakes:
            fake.on_request = lambda text: meeting.wait() and None
        server, found = asked(fakes, 60)
    assert len(found) == 60 and not server.failures.notes
    assert seen[:3] == [4, 4, 4] and seen[-3:] == [20, 20, 20]  # at the first and the last meeting


def test_a_url_that_dies_costs_no_answer_and_is_told() -> None:
    """In the midst of its replies: those are cut, and later ones refused."""
    with fake_server() as alive, fake_server(Fake(lambda text, before: "cut" if dying.is_set() else None)) as dead:
        dying = threading.Event()
        alive.on_request = lambda text: time.sleep(0.005)
        dead.on_request = lambda text: dying.set() if dead.asked.total() > 8 else None
        server, found = asked([alive, dead], 100, retries=0)
    assert len(found) == 100 and not server.failures.lost and not server.failures.stopped
    (note,) = server.failures.notes
    assert dead.url in note and "no connection" in note and "1 of 2 URLs go on" in note
    assert server.failures.retried.keys() == {"no connection"}
    assert dead.asked.total() < 40 < alive.asked.total()


def test_a_url_that_comes_back_is_asked_again() -> None:
    with fake_server() as alive, fake_server(Fake(lambda text, before: 503 if fails else None)) as other:
        fails = [True]
        alive.on_request = lambda text: time.sleep(0.01) or (alive.asked.total() > 30 and fails.clear())  # type: ignore[func-returns-value]
        server, found = asked([alive, other], 150, retries=0)
    assert len(found) == 150 and not server.failures.lost
    assert [other.url in note for note in server.failures.notes] == [True, True]
    assert "fails (HTTP 503)" in server.failures.notes[0] and "answers again" in server.failures.notes[1]
    assert other.given[None] > 10


def test_a_url_that_does_not_serve_the_model_is_left_and_all_such_are_an_end() -> None:
    with fake_server() as alive, fake_server(Fake(lambda text, before: 404)) as wrong:
        server, found = asked([alive, wrong], retries=0)
        assert len(found) == 60 and wrong.asked.total() <= 4
        (note,) = server.failures.notes
        assert wrong.url in note and "404" in note and "1 of 2 URLs go on" in note
        server, found = asked([wrong])
    assert not found and "404" in server.failures.stopped


def test_all_urls_gone_are_an_end_in_bounded_time() -> None:
    with fake_server(Fake(lambda text, before: "drop")) as one, fake_server(Fake(lambda text, before: "drop")) as other:
        began = time.monotonic()
        server, found = asked([one, other], 400)
    assert not found and "no connection" in server.failures.stopped and time.monotonic() - began < 30
    assert one.url in server.failures.stopped and other.url in server.failures.stopped


def test_a_question_that_no_url_answers_is_lost_alone() -> None:
    def mood(text: str, before: int) -> int | None:
        return 500 if text == "q7" else None

    with fake_server(Fake(mood)) as one, fake_server(Fake(mood)) as other:
        server, found = asked([one, other], retries=1)
    assert len(found) == 59 and server.failures.lost == {"q7": "HTTP 500"}
    assert one.asked["q7"] == other.asked["q7"] == 2  # twice at each


def test_urls_that_fail_at_random_give_every_answer_once() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with ExitStack() as stack:
        fakes = [
            stack.enter_context(
                fake_server(
                    Fake(lambda text, before: chance.choice([None, None, "drop", 500, "cut"]) if before < 2 else None)
                )
            )
            for _ in range(3)
        ]
        server, found = asked(fakes, 80, retries=8)
    assert len(found) == 80 and not server.failures.lost
    answered: Counter[tuple[str, int]] = sum((fake.answered for fake in fakes), Counter())
    assert set(answered.values()) == {1}
