"""Servers that drop connections, fail, hang or say nothing: asked again and counted, nothing lost or doubled."""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.answers import replies as replies_module
from mergekit_lite.answers import server as module
from mergekit_lite.answers.asking import Sampling, Task
from mergekit_lite.answers.replies import Failed, Reply, reply_in
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.rows import Answer, Key, Prompt, seed_of
from mergekit_lite.answers.server import Question, Served, Server, ask
from tests.answers.fake_server import REASONS, Fake, Trouble, answer_to, fake_server
from tests.ports import free_port


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.002)


def server_of(fake: Fake, **how: object) -> Server:
    how = {"urls": [fake.url], "sampling": Sampling(), "concurrency": 8, "timeout": 20.0, "retries": 6} | how
    return Server(body=RequestBody("m", how.pop("sampling")), **how)  # type: ignore[arg-type]


def questions(texts: list[str]) -> list[Question]:
    return [Question(text, [{"role": "user", "content": text}], number) for number, text in enumerate(texts)]


def replies(server: Server, asked: list[Question]) -> dict[object, Reply]:
    """The replies by key; no key may come twice."""
    found: dict[object, Reply] = {}
    for of, question, reply in ask({server: asked}):
        assert of is server and question.key not in found
        found[question.key] = reply
    return found


def test_every_trouble_is_repeated_and_counted() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    troubles: list[Trouble] = [*REASONS, 408, 409, 429, 500, 503]
    plans = {f"question {n}": [chance.choice(troubles) for _ in range(chance.randrange(4))] for n in range(60)}

    def mood(text: str, before: int) -> Trouble:
        return plans[text][before] if before < len(plans[text]) else None

    with fake_server(Fake(mood)) as fake:
        server = server_of(fake)
        found = replies(server, questions(list(plans)))
    given = Counter(fake.given)
    del given[None]
    expected: Counter[str] = Counter()
    for trouble, count in given.items():
        expected[REASONS.get(str(trouble), f"HTTP {trouble}")] += count
    assert server.failures.retried == expected and expected.total() > 0
    assert not server.failures.lost and not server.failures.stopped
    assert found.keys() == plans.keys()
    for number, (text, plan) in enumerate(plans.items()):
        drawn = number  # anew only where the same draw would end alike
        for _ in range(sum(trouble in ("empty", "none", "filtered") for trouble in plan)):
            drawn = seed_of(drawn, "again")
        assert found[text] == Reply(answer_to(text, drawn), "stop", 3)
        assert fake.asked[text] == len(plan) + 1


def test_a_server_that_hangs_is_asked_again() -> None:
    with fake_server(Fake(lambda text, before: "hang" if before == 0 else None)) as fake:
        server = server_of(fake, timeout=0.3)
        found = replies(server, questions(["a", "b"]))
    assert found.keys() == {"a", "b"}
    assert server.failures.retried == {"no reply within 0.3 s": 2}


def test_retry_after_is_waited_for() -> None:
    times: list[float] = []
    fake = Fake(
        lambda text, before: 429 if before == 0 else None,
        on_request=lambda text: times.append(time.monotonic()),
        retry_after="0.4",
    )
    with fake_server(fake):
        replies(server_of(fake), questions(["a"]))
    assert times[1] - times[0] >= 0.4


def test_what_stays_without_a_reply_is_told_and_the_others_go_on() -> None:
    moods: dict[str, Trouble] = {"bad": 500, "wrong": 400}
    with fake_server(Fake(lambda text, before: moods.get(text))) as fake:
        server = server_of(fake, retries=3)
        found = replies(server, questions(["a", "bad", "b", "wrong", "c long"]))
    assert found.keys() == {"a", "b", "c long"}
    assert found["c long"].finish == "length"
    assert server.failures.lost["bad"] == "HTTP 500"
    assert "HTTP 400" in server.failures.lost["wrong"] and "no luck" in server.failures.lost["wrong"]
    assert fake.asked["bad"] == 4 and fake.asked["wrong"] == 1
    assert server.failures.retried == {"HTTP 500": 3} and not server.failures.stopped


@pytest.mark.parametrize(("status", "remedy"), [(401, "MY_KEY"), (403, "MY_KEY"), (404, "/v1")])
def test_a_server_that_refuses_everybody_is_asked_no_more(status: int, remedy: str) -> None:
    with fake_server(Fake(lambda text, before: status)) as fake:
        server = server_of(fake, key_variable="MY_KEY", concurrency=2)
        assert not replies(server, questions([f"q{n}" for n in range(50)]))
    assert (
        remedy in server.failures.stopped
        and str(status) in server.failures.stopped
        and "no luck" in server.failures.stopped
    )
    assert fake.asked.total() <= 2


def test_a_server_that_is_not_there_is_given_up() -> None:
    port = free_port()
    server = Server([f"http://127.0.0.1:{port}/v1"], RequestBody("m", Sampling()), concurrency=2, retries=1)
    assert not replies(server, questions([f"q{n}" for n in range(200)]))
    assert "no connection" in server.failures.stopped and str(port) in server.failures.stopped
    assert len(server.failures.lost) <= module.LOST_IN_A_ROW + 2


def test_a_server_that_was_given_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of its requests may be about to wait for minutes."""
    monkeypatch.setattr(module, "FIRST_WAIT", 300.0)
    with fake_server(Fake(lambda text, before: 404 if text == "last" else 503)) as fake:
        fake.on_request = lambda text: time.sleep(0.2 if text == "last" else 0)
        started = time.monotonic()
        server = server_of(fake)
        replies(server, questions(["a", "b", "last"]))
    assert server.failures.stopped and time.monotonic() - started < 30


def test_as_many_requests_are_open_as_allowed() -> None:
    """None is answered before five are open; a sixth would come while they wait a little longer."""
    meeting = threading.Barrier(5, timeout=120)

    def together(text: str) -> None:
        meeting.wait()
        time.sleep(0.01)

    with fake_server() as fake:
        fake.on_request = together
        found = replies(server_of(fake, concurrency=5), questions([f"q{n}" for n in range(40)]))
    assert len(found) == 40 and fake.most_open == 5


def test_several_servers_are_asked_at_once() -> None:
    meeting = threading.Barrier(2, timeout=120)
    with fake_server() as one, fake_server() as other:
        one.on_request = other.on_request = lambda text: meeting.wait() and None
        servers = [server_of(one, concurrency=1), server_of(other, concurrency=1)]
        found = list(ask({server: questions(["a", "b", "c"]) for server in servers}))
    assert Counter(server.urls[0] for server, *_ in found) == {one.url: 3, other.url: 3}


def test_who_stops_listening_stops_the_asking() -> None:
    with fake_server() as fake:
        threads = threading.active_count()
        fake.on_request = lambda text: time.sleep(0.01)
        coming = ask({server_of(fake, concurrency=2): questions([f"q{n}" for n in range(500)])})
        next(coming)
        coming.close()  # type: ignore[attr-defined]
        asked = fake.asked.total()
        time.sleep(0.1)
        assert fake.asked.total() <= asked + 2 < 100
        assert not any(thread.name.startswith("asking") for thread in threading.enumerate()), threads


def test_a_fault_of_the_program_is_raised_where_replies_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*arguments: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Server, "reply", broken)
    with fake_server() as fake, pytest.raises(RuntimeError, match="a fault"):
        replies(server_of(fake), questions(["a"]))


def test_the_request_says_all_that_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    sampling = Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.05, max_tokens=77)
    prompt = Prompt("p", ({"role": "user", "content": "hello"},))
    with fake_server() as fake:
        served = Served("s", server_of(fake, sampling=sampling, key_variable="MY_KEY"), system="Be brief.")
        (answer,) = served.answers([Task(prompt, 0, 5), Task(prompt, 1, 6)], frozenset({Key("p", 1)}))
        plain = server_of(fake)
        replies(plain, questions(["x"]))
    body, without = fake.bodies
    assert (answer.prompt, answer.source, answer.index, answer.text) == ("p", "s", 1, answer_to("hello", 6))
    assert (answer.finish, answer.tokens) == ("stop", 3)
    system = {"role": "system", "content": "Be brief."}
    expected = {"model": "m", "seed": 6, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 77}
    assert expected.items() <= body.items()
    assert body["messages"] == [system, {"role": "user", "content": "hello"}]
    assert fake.headers[0]["authorization"] == "Bearer sesame"
    assert "repetition_penalty" not in without  # not all servers know it


def test_a_key_may_have_any_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s\u00e9same\u2026")
    with fake_server() as fake:
        assert replies(server_of(fake, key_variable="MY_KEY"), questions(["x"])).keys() == {"x"}
    assert fake.headers[0]["authorization"].encode("latin-1").decode() == "Bearer s\u00e9same\u2026"


@pytest.mark.parametrize("status", [307, 400, 401])
def test_a_key_that_a_server_repeats_is_not_told(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    with fake_server(Fake(lambda text, before: status, complaint="wrong key: sesame")) as fake:
        fake.more_headers["Location"] = "http://else/sesame"
        server = server_of(fake, key_variable="MY_KEY", concurrency=1)
        replies(server, questions(["x"]))
    said = server.failures.stopped or str(server.failures.lost["x"])
    assert str(status) in said and "…" in said and "sesame" not in said


def test_half_a_surrogate_pair_does_not_stop_the_run() -> None:
    assert reply_in(body_with("a\ud83d b\ud83d\ude00")) == Reply("a� b😀", "stop", None)


# Replies of a server that means harm, or is broken.


def body_with(text: object, *, finish: object = "stop", **more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}], **more}).encode()


UNREADABLE = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "choices by name": b'{"choices": {"a": 1}}',
    "a number of choices": b'{"choices": 3}',
    "no choices": b'{"choices": []}',
    "a choice that is text": b'{"choices": ["text"]}',
    "no message": b'{"choices": [{"message": null}]}',
    "deep": b'{"choices": ' + b"[" * 100_000,
    "deep in objects": b'{"a": ' * 100_000,
    "a number of 5,000 digits": b'{"choices": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "packed": gzip.compress(body_with("packed")),
    "a bomb": gzip.compress(b" " * (64 << 20)),
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_reply_that_can_not_be_read_costs_one_retry(body: bytes) -> None:
    with fake_server(Fake(lambda text, before: body if before == 0 else None)) as fake:
        server = server_of(fake)
        tracemalloc.start()
        assert replies(server, questions(["a"])) == {"a": Reply(answer_to("a", 0), "stop", 3)}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert server.failures.retried == {"a reply that can't be read": 1}
    assert peak < 30 << 20


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "a"]), inner),
        max_leaves=5,
    )
)
def test_whatever_json_comes_is_a_reply_or_a_failure(value: object) -> None:
    """The value is the whole reply, its choices, its message, its text, its end, its usage or its count."""
    message = {"content": "fine"}
    for content in (
        value,
        {"choices": value},
        {"choices": [{"message": value}]},
        {"choices": [{"message": {"content": value}}]},
        {"choices": [{"message": {**message, "reasoning": value}}]},
        {"choices": [{"message": message, "finish_reason": value}]},
        {"choices": [{"message": message}], "usage": value},
        {"choices": [{"message": message}], "usage": {"completion_tokens": value}},
    ):
        try:
            reply = reply_in(json.dumps(content).encode())
        except Failed as failed:
            assert failed.repeat and not failed.stop
        else:
            assert isinstance(reply.text, str) and reply.text.strip() and reply.text.encode()
            assert reply.finish in ("stop", "length")
            assert reply.tokens is None or (type(reply.tokens) is int and 0 <= reply.tokens <= 10**9)


@pytest.mark.parametrize(("count", "tokens"), [(7, 7), (0, 0), (-5, None), (True, None), ("many", None), (1e400, None)])
def test_a_count_of_tokens_that_is_none_is_left_out(count: object, tokens: int | None) -> None:
    assert reply_in(body_with("fine", usage={"completion_tokens": count})) == Reply("fine", "stop", tokens)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_that_a_server_sends_apart_are_kept_apart(name: str) -> None:
    for sent, kept in (("so\ud83d many", "so\ufffd many"), (" ", None), (None, None), (7, None)):
        message = {"content": "fine", name: sent}
        reply = reply_in(json.dumps({"choices": [{"message": message}]}).encode())
        assert reply == Reply("fine", "stop", None, kept)
        row = Answer("p", "s", 0, *reply).as_row()
        assert row.get("thoughts", ...) == (kept if kept else ...)


def test_a_reply_without_end_is_read_up_to_a_bound() -> None:
    with fake_server(Fake(lambda text, before: "flood" if before == 0 else None)) as fake:
        server = server_of(fake)
        assert replies(server, questions(["a"])).keys() == {"a"}
        assert server.failures.retried == {"a reply of more than 4 MB": 1}
        assert fake.poured < 30 << 20  # what systems buffer is beyond the bound


def test_a_reply_of_the_longest_length_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_with("x" * 1000)
    monkeypatch.setattr(replies_module, "LONGEST_REPLY", len(body))
    assert reply_in(body).text == "x" * 1000
    with pytest.raises(Failed, match="more than"):
        reply_in(body + b" ")


def test_a_reply_that_drips_has_its_time() -> None:
    with fake_server(Fake(lambda text, before: "drip" if before == 0 else None)) as fake:
        server = server_of(fake, timeout=0.5)
        began = time.monotonic()
        assert replies(server, questions(["a"])).keys() == {"a"}
    assert server.failures.retried == {"no reply within 0.5 s": 1} and time.monotonic() - began < 20


@pytest.mark.parametrize("status", [400, 404])
def test_the_complaint_of_a_server_is_one_line_of_text(status: int) -> None:
    fake = Fake(lambda text, before: status, complaint="\x1b]0;owned\x07\n" * 50 + "x" * 10**6)
    with fake_server(fake):
        server = server_of(fake, concurrency=1)
        replies(server, questions(["a"]))
    said = server.failures.stopped or str(server.failures.lost["a"])
    assert f"no luck: {status}" in said and said.isprintable() and len(said) < 700


def test_a_server_that_sends_requests_elsewhere_is_not_followed() -> None:
    with fake_server() as other, fake_server(Fake(lambda text, before: 307)) as fake:
        fake.more_headers["Location"] = f"{other.url}/chat/completions"
        server = server_of(fake, concurrency=1)
        assert not replies(server, questions(["a", "b"]))
    assert "says 307" in server.failures.stopped and other.url in server.failures.stopped
    assert other.asked.total() == 0 and fake.asked.total() == 1


def test_cookies_are_not_kept() -> None:
    with fake_server() as fake:
        fake.more_headers["Set-Cookie"] = "a=b"
        replies(server_of(fake, concurrency=1), questions(["a", "b"]))
    assert not any("cookie" in headers for headers in fake.headers) and len(fake.headers) == 2


def test_a_question_waits_no_longer_than_a_server_may_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def noted(self: Server, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(Server, "_pause", noted)
    with fake_server(Fake(lambda text, before: 429, retry_after="250")) as fake:
        replies(server_of(fake, retries=6), questions(["a"]))
    assert waits[:3] == [250, 250, 100] and sum(waits[3:]) < 1 and len(waits) == 6
