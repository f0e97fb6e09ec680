"""Models behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, ``transformers serve``, a service.

A request that fails is mostly worth repeating: no connection, a time-out, 408, 409, 429, any 5xx, a reply that is
empty, too long or can't be read. Where the model has several URLs another one is asked at once. Else the request is
made again after a wait that doubles each time, or as long as ``Retry-After`` says, but ten minutes in all for a
question; up to ``retries`` times. Any other status is the request's own fault and is not repeated, unless the server
names a parameter that can be left out. A server that refuses everybody (401, 403, 404), that refuses a parameter of the
user's, that sends requests elsewhere (3xx), or that answers none of many requests in a row, is given up.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lite.answers.asking import Failures, Task
from mergekit_lite.answers.endpoints import Endpoint, Endpoints
from mergekit_lite.answers.replies import LONGEST_REPLY, Failed, Reply, body_of, replies_in
from mergekit_lite.answers.requests import CONTINUING, RequestBody, refused_parameter
from mergekit_lite.answers.rows import Answer, Key, Message, given_text, seed_of, with_system
from mergekit_lite.backoff import asked_wait, wait_after
from mergekit_lite.errors import one_line

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

FIRST_WAIT = 0.5  # seconds before the first repetition
LONGEST_WAIT = 60.0
LONGEST_ASKED_WAIT = 600.0  # for one question, that a server's Retry-After may ask for in all its replies
LOST_IN_A_ROW = 16  # requests, or as many as are open at once: then the server is given up
REPEATS = "replies have the beginning that was given once more: it is taken once"
COMPLAINT = 1000  # bytes of an error's body that are looked at
REPEATED = (408, 409, 429)  # and from 500 on
REFUSED = {
    401: "Put the key into the environment variable {variable}.",
    403: "Put a key that may do this into the environment variable {variable}.",
    404: "Check `server` (as a rule it ends in /v1) and `model`.",
}


class Question(NamedTuple):
    """One answer to ask for; ``key`` is the caller's own."""

    key: Hashable
    messages: Sequence[Message]
    seed: int


class Together(NamedTuple):
    """All answers to one conversation, to be asked for by one request with the first one's seed.

    The request is for all of them whichever are ``wanted``, so that an answer doesn't depend on where a run was
    stopped. Where the server gives fewer, each wanted one is asked for by itself.
    """

    questions: Sequence[Question]
    wanted: frozenset[Hashable]  # keys


@dataclass(eq=False)
class Server:
    """A model behind one or several URLs, and the state of asking it."""

    urls: Sequence[str]  # ``http://host:port/v1``, each serving the same model
    body: RequestBody  # what is asked
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key, if the server needs one
    concurrency: int = 32  # how many requests are open at once, at each URL
    timeout: float = 600.0  # seconds that a request may take
    retries: int = 8  # how often a request is repeated at most
    names: Mapping[str, str] = field(default_factory=dict)  # of the model, by URL, where that is not the body's
    ended: Callable[[], str | None] = lambda: None  # says why there is no server any more, where that is known
    failures: Failures = field(default_factory=Failures)  # lost questions by their key; ``stopped``: given up
    in_a_row: int = 0  # questions lost since the last reply
    gives_several: bool = True  # answers to one request
    longest: int = LONGEST_REPLY  # bytes of a reply
    endpoints: Endpoints = field(init=False)

    def __post_init__(self) -> None:
        self.endpoints = Endpoints(self.urls, self.concurrency, self.failures.notes.append)

    @property
    def most_open(self) -> int:
        """How many requests are open at once at most, at all URLs."""
        return self.concurrency * len(self.urls)

    async def reply(self, client: AsyncClient, question: Question) -> Reply | None:
        """Return the reply to a question, or None when it is lost."""
        try:
            (reply,) = await self._replies(client, question)
        except Failed as failed:
            self._lose(question, failed)
            return None
        return reply

    async def together(self, client: AsyncClient, asked: Together) -> dict[Hashable, Reply]:
        """Return the replies of one request by their keys; none where the server gives fewer."""
        questions = asked.questions
        if not self.gives_several or len(questions) == 1:
            return {}
        try:
            found = await self._replies(client, questions[0], len(questions))
        except Failed as failed:
            if failed.refused != "n":
                for question in questions:
                    if question.key in asked.wanted:
                        self._lose(question, failed)
                return {}
            found = []
        if len(found) < len(questions):
            if self.gives_several:
                self.failures.notes.append(
                    f"the server gives {len(found) or 'no'} of {len(questions)} answers to one request: "
                    "each is asked for by itself"
                )
            self.gives_several = False
            return {}
        pairs = zip(questions, found, strict=True)
        return {question.key: reply for question, reply in pairs if reply and question.key in asked.wanted}

    async def _replies(self, client: AsyncClient, question: Question, number: int = 1) -> list[Reply | None]:
        """Return the replies to a question, made again as often as it is worth it. Raises Failed when it is lost."""
        seed, patience, attempt = question.seed, LONGEST_ASKED_WAIT, 0
        tried: set[Endpoint] = set()  # URLs that failed in this attempt
        while not self.failures.stopped:
            endpoint = await self.endpoints.take(tried)
            try:
                asked = self._asked(question, seed, number)
                if endpoint.url in self.names:
                    asked["model"] = self.names[endpoint.url]
                found = await self._request(client, endpoint, asked, question)
            except Failed as failed:
                if failed.stop:
                    if not self.endpoints.give_up(endpoint, str(failed)):
                        self.failures.stopped = self.failures.stopped or str(failed)
                    continue
                if failed.refused and failed.repeat:
                    if note := self.body.adapt(failed.refused):
                        self.failures.notes.append(note)
                    continue
                if not failed.repeat:
                    raise
                tried.add(endpoint)
                if why := self.ended():
                    self.failures.stopped = self.failures.stopped or why
                    continue
                if not failed.fresh_seed:
                    self.endpoints.failed(endpoint, str(failed))
                    if self.endpoints.other(tried):
                        self.failures.retried[str(failed)] += 1
                        continue
                if attempt == self.retries:
                    raise
                self.failures.retried[str(failed)] += 1
                if failed.fresh_seed:  # the same seed would give the same reply
                    seed = seed_of(seed, "again")
                wait = wait_after(attempt + 1, first=FIRST_WAIT, longest=LONGEST_WAIT)
                asked_wait = min(failed.wait, patience)
                patience -= asked_wait
            else:
                self.in_a_row = 0
                self.endpoints.answered(endpoint)
                return found
            finally:
                await self.endpoints.release(endpoint)
            await self._pause(asked_wait or wait)
            attempt += 1
            tried.clear()
        raise Failed(self.failures.stopped, repeat=False, stop=True)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """Give a client of this server that repeats nothing: ``reply`` does, and counts."""
        from httpx2 import AsyncClient, Limits

        headers = {
            b"Authorization": f"Bearer {self._key or 'none'}".encode(),
            b"Content-Type": b"application/json",
            b"Accept-Encoding": b"identity",  # a small packed reply may be endless when it is unpacked
        }
        self.endpoints.begin()
        limits = Limits(max_connections=self.most_open)
        async with AsyncClient(headers=headers, timeout=self.timeout, limits=limits) as client:
            yield client

    def _asked(self, question: Question, seed: int, number: int) -> dict[str, Any]:
        """Return the body of a request."""
        return self.body.of(question.messages, seed, number)

    def _address(self, url: str) -> str:
        """Return where requests go."""
        return f"{url.rstrip('/')}/chat/completions"

    def _found(self, url: str, body: bytes, asked: Mapping[str, Any], question: Question) -> list[Reply | None]:
        """Return the replies that a body of a URL has. Raises Failed."""
        return replies_in(body, asked.get("n", 1), blank=bool(given_text(question.messages)))

    async def _request(
        self, client: AsyncClient, endpoint: Endpoint, asked: dict[str, Any], question: Question
    ) -> list[Reply | None]:
        import httpx2

        try:
            # The client's own limit is between two pieces of a reply, and a slow stream never reaches it.
            response, body = await asyncio.wait_for(self._post(client, endpoint.url, asked), self.timeout)
        except (httpx2.TimeoutException, asyncio.TimeoutError) as error:
            raise Failed(f"no reply within {self.timeout:g} s", repeat=True) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise Failed("no connection", repeat=True) from error
        if not response.is_success:
            raise self._of_status(endpoint.url, response, body[:COMPLAINT], asked)
        return self._found(endpoint.url, body, asked, question)

    async def _post(self, client: AsyncClient, url: str, asked: dict[str, Any]) -> tuple[Response, bytes]:
        """Return the response to a request, and its body."""
        async with client.stream("POST", self._address(url), content=json.dumps(asked)) as response:
            client.cookies.clear()  # else a server could fill the memory with them
            return response, await body_of(response, self.longest)

    async def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.failures.stopped and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))

    def _of_status(self, url: str, response: Response, complaint: bytes, asked: Mapping[str, Any]) -> Failed:
        status, said = response.status_code, self._without_key(complaint.decode(errors="replace"))
        if status in REFUSED:
            remedy = REFUSED[status].format(variable=self.key_variable)
            return Failed(f"{url} says {status}: {said} {remedy}", repeat=False, stop=True)
        if response.is_redirect:
            place = self._without_key(response.headers.get("location", "another place"))
            why = f"{url} says {status} and points to {place}: check `server`, it has to be the address itself."
            return Failed(why, repeat=False, stop=True)
        if status in REPEATED or status >= 500:
            return Failed(
                f"HTTP {status}", repeat=True, wait=asked_wait(response.headers.get("retry-after"), LONGEST_ASKED_WAIT)
            )
        name = refused_parameter(complaint, asked) if status in (400, 422) else None
        if name is None or name == "n":
            return Failed(f"HTTP {status}: {said}", repeat=False, refused=name)
        if name in CONTINUING:
            why = f"{url} can't go on from the beginning of an answer. It says {status}: {said}"
            return Failed(why, repeat=False, stop=True)
        if name != "max_tokens" and self.body.is_set(name):
            why = f"{url} refuses {name!r}, which is set for it, and says {status}: {said} Take it out of `sampling`."
            return Failed(why, repeat=False, stop=True)
        return Failed(f"HTTP {status}: {said}", repeat=True, refused=name)

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_variable, "")

    def _without_key(self, said: str) -> str:
        """Return what a server says in one line, without the key, which some repeat."""
        return one_line(said.replace(self._key, "…") if self._key else said)

    def _lose(self, question: Question, failed: Failed) -> None:
        if failed.stop or self.failures.stopped:
            return
        self.failures.lost[question.key] = str(failed)
        self.in_a_row += 1
        if self.in_a_row >= max(LOST_IN_A_ROW, self.most_open):
            where = ", ".join(self.urls)
            self.failures.stopped = f"{where}: {self.in_a_row} requests in a row got no answer, the last one: {failed}."


def ask(questions: Mapping[Server, Iterable[Question | Together]]) -> Iterator[tuple[Server, Question, Reply]]:
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


async def _all(questions: Mapping[Server, Iterable[Question | Together]], put: Callable[[Any], None]) -> None:
    await asyncio.gather(*(_one(server, iter(asked), put) for server, asked in questions.items()))


async def _one(server: Server, questions: Iterator[Question | Together], put: Callable[[Any], None]) -> None:
    async def work(client: AsyncClient) -> None:
        for asked in questions:
            single: Iterable[Question] = asked.questions if isinstance(asked, Together) else [asked]
            if isinstance(asked, Together):
                found = await server.together(client, asked)
                for question in single:
                    if question.key in found:
                        put((server, question, found[question.key]))
                left = asked.wanted - found.keys() - server.failures.lost.keys()
                single = [question for question in single if question.key in left]
            for question in single:
                if server.failures.stopped:
                    return
                reply = await server.reply(client, question)
                if reply is not None:
                    put((server, question, reply))

    async with server.client() as client:
        await asyncio.gather(*(work(client) for _ in range(server.most_open)))


@dataclass(eq=False)
class Served:
    """A respondent behind a server; ``system`` is put before each conversation."""

    name: str
    server: Server
    system: str | None = None
    one_request: bool = False  # asks for all answers to a prompt at once

    @property
    def failures(self) -> Failures:
        """The failures so far."""
        return self.server.failures

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the answers to the ``wanted`` of the ``tasks``, as they come."""
        return answers_of([(self, tasks, wanted)])

    def questions(self, tasks: Iterable[Task], wanted: frozenset[Key]) -> Iterator[Question | Together]:
        """Yield the requests for the ``wanted``."""
        if not self.one_request:
            return (self._question(task) for task in tasks if task.key in wanted)
        by_prompt = (list(of) for _, of in groupby(tasks, lambda task: task.prompt.id))
        return (
            Together([self._question(task) for task in of], frozenset(keys))
            for of in by_prompt
            if (keys := wanted.intersection(task.key for task in of))
        )

    def _question(self, task: Task) -> Question:
        return Question(task.key, with_system(task.prompt.messages, self.system), task.seed)


def answers_of(asked: Iterable[tuple[Served, Sequence[Task], frozenset[Key]]]) -> Iterator[Answer]:
    """Yield the answers of several served models, all asked at once; each has its ``source``."""
    names: dict[Server, str] = {}
    questions: dict[Server, Iterator[Question | Together]] = {}
    for respondent, tasks, wanted in asked:
        names[respondent.server] = respondent.name
        questions[respondent.server] = respondent.questions(tasks, wanted)
    for server, question, reply in ask(questions):
        if isinstance(question.key, Key):
            prompt, index = question.key
            text = _whole(given_text(question.messages), reply.text, server.failures.notes)
            yield Answer(prompt, names[server], index, *reply._replace(text=text))


def _whole(given: str, said: str, notes: list[str]) -> str:
    """Return an answer of which the beginning was given, as a whole. Some servers repeat it."""
    if not given or not said.startswith(given):
        return given + said
    if REPEATS not in notes:
        notes.append(REPEATS)
    return said
