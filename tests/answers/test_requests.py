"""What a request says, and what becomes of it where a server refuses a part."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.requests import RequestBody, refused_parameter
from mergekit_lite.answers.server import Server
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_server import impatient, questions, replies, server_of

__all__ = ["impatient"]  # a fixture of every test

MESSAGES = ({"role": "user", "content": "x"},)
O1 = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
SENT = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "n", "top_k"}

REFUSALS = {  # what services and servers say, and the parameter that they mean
    "OpenAI's o1": ({"error": {"message": O1, "param": "max_tokens", "code": "unsupported_parameter"}}, "max_tokens"),
    "OpenAI's gpt-5": (
        {
            "error": {
                "message": "Unsupported value: 'temperature' does not support 0.8 with this model.",
                "param": "temperature",
                "code": "unsupported_value",
            }
        },
        "temperature",
    ),
    "Mistral": (
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
        "seed",
    ),
    "in words": ({"error": {"message": "Extra inputs are not permitted: seed"}}, "seed"),
    "a plain text": ("Unknown field: top_k", "top_k"),
    "several answers": ({"message": "n > 1 is not supported"}, "n"),
    "a context that is full": (
        {
            "error": {
                "message": "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context "
                "length is 2048 tokens and your request has 30 input tokens (2048 > 2048 - 30)."
            }
        },
        None,
    ),
    "a prompt that is too long": ({"error": {"message": "This model's maximum context length is 64 tokens."}}, None),
    "a value off its range": ({"error": {"message": "temperature must be non-negative"}}, None),
    "a limit without another name": ({"error": {"message": "max_tokens is not supported here"}}, None),
    "what was not sent": ({"error": {"message": "min_p is not supported"}}, None),
    "no object": ([{"error": 1}], None),
    "odd types": (
        {"error": {"code": "unsupported_value", "param": ["temperature"]}, "detail": {"a": 1}},
        "temperature",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_parameter_that_an_error_names(name: str) -> None:
    said, expected = REFUSALS[name]
    complaint = said if isinstance(said, str) else json.dumps(said)
    assert refused_parameter(complaint.encode(), dict.fromkeys(SENT)) == expected


def test_a_complaint_may_be_anything() -> None:
    for complaint in (b"", b"\xff" * 9, b"[" * 100_000, b'{"error": ' * 9, b'{"detail": [[1], null, {"loc": []}]}'):
        assert refused_parameter(complaint, dict.fromkeys(SENT)) is None


def test_nothing_is_sent_that_was_not_set_but_what_has_a_default() -> None:
    sent = RequestBody("m", Sampling()).of(MESSAGES, 7)
    assert sent.keys() == {"model", "messages", "temperature", "top_p", "max_tokens", "seed"}
    assert "top_p" not in RequestBody("m", Sampling(temperature=0)).of(MESSAGES, 7)
    more = {"top_k": 20, "min_p": 0.1, "stop": ["\n"], "presence_penalty": 1.5, "frequency_penalty": -0.5}
    more["chat_template_kwargs"] = {"enable_thinking": False}
    body = RequestBody("m", Sampling(**more, temperature=0, top_p=1, extra_body={"reasoning_effort": "low"}))
    assert body.of(MESSAGES, 7, 3) == {
        "model": "m", "messages": MESSAGES, "temperature": 0, "top_p": 1, "max_tokens": 2048, "seed": 7, "n": 3,
        "reasoning_effort": "low", **more,
    }  # fmt: skip
    json.dumps(body.of(MESSAGES, 7))


def refusing(*names: str) -> Fake:
    def refuses(body: dict[str, Any]) -> str | None:
        if "max_tokens" in names and "max_tokens" in body:
            return O1
        return next((f"{name!r} is not supported with this model" for name in names if name in body), None)

    return Fake(refuses=refuses)


def test_what_a_server_refuses_is_left_out_and_told_once() -> None:
    with fake_server(refusing("max_tokens", "temperature", "top_p", "seed")) as fake:
        server = server_of(fake, retries=0)
        assert len(replies(server, questions([f"q{n}" for n in range(40)]))) == 40
    assert fake.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert fake.bodies[-1]["max_completion_tokens"] == 2048
    assert len(server.failures.notes) == 4 and not server.failures.retried and not server.failures.lost
    assert all(sum(name in note for note in server.failures.notes) == 1 for name in ("temperature", "top_p", "seed"))
    assert fake.asked.total() <= 40 + 4 * 8  # no more than were open


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"top_k": 5}, {"stop": ("x",)}, {"extra_body": {"effort": "low"}}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_what_the_user_set_is_not_left_out(sampling: dict[str, Any]) -> None:
    (name,) = sampling.get("extra_body") or sampling
    with fake_server(refusing(name)) as fake:
        server: Server = server_of(fake, sampling=Sampling(**sampling), concurrency=2)
        assert not replies(server, questions([f"q{n}" for n in range(40)]))
    assert f"refuses {name!r}" in server.failures.stopped and "not supported with this model" in server.failures.stopped
    assert fake.asked.total() <= 2 and not server.failures.lost


def test_a_limit_that_is_too_large_for_one_prompt_loses_that_prompt_only() -> None:
    said = REFUSALS["a context that is full"][0]
    full = Fake(refuses=lambda body: said["error"] if body["messages"][-1]["content"] == "q3" else None)  # type: ignore[index,call-overload]
    with fake_server(full) as fake:
        server = server_of(fake, sampling=Sampling(max_tokens=2048))
        assert len(replies(server, questions([f"q{n}" for n in range(9)]))) == 8
    assert "maximum context" in server.failures.lost["q3"] and not server.failures.notes and fake.asked["q3"] == 1


def test_thoughts_that_took_all_tokens_are_a_reply_and_not_asked_again() -> None:
    """Its finish is ``length``, as "long" is in the text."""
    for empty in ("empty", "none"):
        fake = Fake(lambda text, before, empty=empty: empty, thoughts=lambda text: "many")  # type: ignore[misc]
        with fake_server(fake):
            server = server_of(fake, retries=2)
            found = replies(server, questions(["a long thought", "nothing"]))
        assert found == {"a long thought": ("", "length", 3, "many")}
        assert fake.asked == {"a long thought": 1, "nothing": 3}
        assert server.failures.retried == {"an empty reply": 2}
