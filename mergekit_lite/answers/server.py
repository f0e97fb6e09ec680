"""Models behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, ``transformers serve``, a service.

A request that fails is mostly worth repeating: no connection, a time-out, 408, 409, 429, any 5xx, a reply that is
empty, too long or can't be read. It is made again after a wait that doubles each time, or as long as ``Retry-After``
says, but ten minutes in all for a question; up to ``retries`` times. Any other status is the request's own fault and is
not repeated. A server that refuses everybody (401, 403, 404), that sends requests elsewhere (3xx), or that answers none
of many requests in a row, is given up.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lite.answers.asking import Failures, Sampling, Task
from mergekit_lite.answers.replies import Failed, Reply, body_of, reply_in
from mergekit_lite.answers.rows import Answer, Key, Message, seed_of
from mergekit_lite.errors import one_line

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

FIRST_WAIT = 0.5  # seconds before the first repetition
LONGEST_WAIT = 60.0
LONGEST_ASKED_WAIT = 600.0  # for one question, that a server's Retry-After may ask for in all its replies
LOST_IN_A_ROW = 16  # requests, or as many as are open at once: then the server is given up
COMPLAINT = 1000  # bytes of an error's body that are looked at
REPEATED = (408, 409, 429)  # and from 500 on
REFUSED = {
    401: "Put the key into the environment variable {variable}.",
    403: "Put a key that may do this into the environment variable {variable}.",
    404: "Check `server` (as a rule it ends in /v1) and `model`.",
}


class Question(NamedTuple):
    """One request; ``key`` is the caller's own."""

    key: Hashable
    messages: Sequence[Message]
    seed: int


@dataclass(eq=False)
class Server:
    """A model behind a URL, and the state of asking it."""

    url: str  # ``http://host:port/v1``
    model: str  # the name it is served under
    sampling: Sampling  # how answers are drawn
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key, if the server needs one
    concurrency: int = 32  # how many requests are open at once
    timeout: float = 600.0  # seconds that a request may take
    retries: int = 8  # how often a request is repeated at most
    failures: Failures = field(default_factory=Failures)  # lost questions by their key; ``stopped``: given up
    in_a_row: int = 0  # questions lost since the last reply

    async def reply(self, client: AsyncClient, question: Question) -> Reply | None:
        """Return the reply to a question, or None when it is lost."""
        seed, patience = question.seed, LONGEST_ASKED_WAIT
        for attempt in range(self.retries + 1):
            if self.failures.stopped:
                return None
            try:
                reply = await self._request(client, question.messages, seed)
            except Failed as failed:
                if failed.stop:
                    self.failures.stopped = self.failures.stopped or str(failed)
                    return None
                if not failed.repeat or attempt == self.retries:
                    self._lose(question, str(failed))
                    return None
                self.failures.retried[str(failed)] += 1
                if failed.fresh_seed:  # the same seed would give the same reply
                    seed = seed_of(seed, "again")
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1)
                asked_wait = min(failed.wait, patience)
                patience -= asked_wait
                await self._pause(asked_wait or wait)
            else:
                self.in_a_row = 0
                return reply
        return None

    def client(self) -> AsyncClient:
        """Return a client of this server that repeats nothing: ``reply`` does, and counts."""
        from httpx2 import AsyncClient, Limits

        headers = {
            b"Authorization": f"Bearer {os.environ.get(self.key_variable) or 'none'}".encode(),
            b"Content-Type": b"application/json",
            b"Accept-Encoding": b"identity",  # a small packed reply may be endless when it is unpacked
        }
        return AsyncClient(headers=headers, timeout=self.timeout, limits=Limits(max_connections=self.concurrency))

    async def _request(self, client: AsyncClient, messages: Sequence[Message], seed: int) -> Reply:
        import httpx2

        asked = {
            "model": self.model,
            "messages": messages,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            "seed": seed,
        }
        if self.sampling.repetition_penalty != 1:  # not all servers know it
            asked["repetition_penalty"] = self.sampling.repetition_penalty
        try:
            # The client's own limit is between two pieces of a reply, and a slow stream never reaches it.
            response, body = await asyncio.wait_for(self._post(client, asked), self.timeout)
        except (httpx2.TimeoutException, asyncio.TimeoutError) as error:
            raise Failed(f"no reply within {self.timeout:g} s", repeat=True) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise Failed("no connection", repeat=True) from error
        if not response.is_success:
            raise self._of_status(response, one_line(body[:COMPLAINT].decode(errors="replace")))
        return reply_in(body)

    async def _post(self, client: AsyncClient, asked: dict[str, Any]) -> tuple[Response, bytes]:
        """Return the response to a request, and its body."""
        address = f"{self.url.rstrip('/')}/chat/completions"
        async with client.stream("POST", address, content=json.dumps(asked)) as response:
            client.cookies.clear()  # else a server could fill the memory with them
            return response, await body_of(response)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.failures.stopped and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    def _of_status(self, response: Response, said: str) -> Failed:
        status = response.status_code
        if status in REFUSED:
            remedy = REFUSED[status].format(variable=self.key_variable)
            return Failed(f"{self.url} says {status}: {said} {remedy}", repeat=False, stop=True)
        if response.is_redirect:
            place = one_line(response.headers.get("location", "another place"))
            why = f"{self.url} says {status} and points to {place}: check `server`, it has to be the address itself."
            return Failed(why, repeat=False, stop=True)
        if status in REPEATED or status >= 500:
            return Failed(f"HTTP {status}", repeat=True, wait=_asked_wait(response.headers.get("retry-after")))
        return Failed(f"HTTP {status}: {said}", repeat=False)

    def _lose(self, question: Question, why: str) -> None:
        self.failures.lost[question.key] = why
        self.in_a_row += 1
        if self.in_a_row >= max(LOST_IN_A_ROW, self.concurrency):
            self.failures.stopped = f"{self.url}: {self.in_a_row} requests in a row got no answer, the last one: {why}."


def _asked_wait(header: str | None) -> float:
    """Return the seconds of a Retry-After header, which has a number or a date."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return min(seconds, LONGEST_ASKED_WAIT) if seconds > 0 else 0.0  # NaN is not


def ask(questions: Mapping[Server, Iterable[Question]]) -> Iterator[tuple[Server, Question, Reply]]:
    """Ask several servers at once, and yield replies as they come. Each server notes its own failures."""
    arrived: queue.SimpleQueue[tuple[Server, Question, Reply] | BaseException | None] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    work = loop.create_task(_all(questions, arrived.put))
    thread = threading.Thread(target=_run, args=(loop, work, arrived.put), name="asking servers", daemon=True)
    thread.start()
    try:
        while (item := arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(work.cancel)
        thread.join()
        loop.close()


def _run(loop: asyncio.AbstractEventLoop, work: asyncio.Task[None], put: Callable[[Any], None]) -> None:
    try:
        loop.run_until_complete(work)
        put(None)
    except asyncio.CancelledError:
        pass  # ``ask`` was closed
    except BaseException as error:  # ``ask`` raises it
        put(error)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())


async def _all(questions: Mapping[Server, Iterable[Question]], put: Callable[[Any], None]) -> None:
    await asyncio.gather(*(_one(server, iter(asked), put) for server, asked in questions.items()))


async def _one(server: Server, questions: Iterator[Question], put: Callable[[Any], None]) -> None:
    async def work(client: AsyncClient) -> None:
        for question in questions:
            if server.failures.stopped:
                return
            reply = await server.reply(client, question)
            if reply is not None:
                put((server, question, reply))

    async with server.client() as client:
        await asyncio.gather(*(work(client) for _ in range(server.concurrency)))


@dataclass(eq=False)
class Served:
    """A respondent behind a server; ``system`` is put before each conversation."""

    name: str
    server: Server
    system: str | None = None

    @property
    def failures(self) -> Failures:
        """The failures so far."""
        return self.server.failures

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the answers to the ``wanted`` of the ``tasks``, as they come."""
        return answers_of([(self, tasks, wanted)])

    def questions(self, tasks: Iterable[Task], wanted: frozenset[Key]) -> Iterator[Question]:
        """Yield the requests for the ``wanted``."""
        before: tuple[Message, ...] = (Message(role="system", content=self.system),) if self.system else ()
        return (Question(task.key, (*before, *task.prompt.messages), task.seed) for task in tasks if task.key in wanted)


def answers_of(asked: Iterable[tuple[Served, Sequence[Task], frozenset[Key]]]) -> Iterator[Answer]:
    """Yield the answers of several served models, all asked at once; each has its ``source``."""
    names: dict[Server, str] = {}
    questions: dict[Server, Iterator[Question]] = {}
    for respondent, tasks, wanted in asked:
        names[respondent.server] = respondent.name
        questions[respondent.server] = respondent.questions(tasks, wanted)
    for server, question, reply in ask(questions):
        if isinstance(question.key, Key):
            prompt, index = question.key
            yield Answer(prompt, names[server], index, *reply)
