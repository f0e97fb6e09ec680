"""A teacher behind a server, or several that serve the same model.

Requests are made, repeated and spread over URLs as those for answers are (``answers/server.py``). How the server tells
log-probabilities is found out by a first request (``dialects.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mergekit_lite.answers.asking import Sampling, urls_of
from mergekit_lite.answers.loading import CAUSAL, config_of
from mergekit_lite.answers.replies import UNREADABLE, Failed
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.server import Server, ask
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.distillation.teaching.dialects import OTHER_TOKENS, Absent, Dialect, Echo, Either, Generate
from mergekit_lite.distillation.teaching.scoring import Said
from mergekit_lite.errors import CheckpointError, RunError, counted
from mergekit_lite.input_files import parse_json

if TYPE_CHECKING:
    from httpx2 import Response
    from transformers import PreTrainedTokenizerBase

LONGEST_REPLY = 1 << 28  # bytes: vLLM takes some 70 for each likely token of each position, the prompt's too
SHOWN = 3  # reasons in a message
PROBED = 4  # tokens of the prompt, and of the response, in a first request
TELLS_NOTHING = "it tells no log-probabilities of given tokens"
ADVICE = "Serve the model by vLLM (with --max-logprobs) or SGLang, or leave `server` out to load it here."


class TokensQuestion(NamedTuple):
    """A row to score; ``key`` is its place."""

    key: int
    tokens: Tokens
    seed: int = 0


@dataclass(eq=False)
class ScoringServer(Server):
    """A server that is asked for what it says of given tokens."""

    dialect: Dialect = field(kw_only=True)
    top: int = field(kw_only=True)
    failed: Failed | None = None  # the last question that was lost

    def _asked(self, question: Any, seed: int, number: int) -> dict[str, Any]:
        asked = self.dialect.body(self.body.model, question.tokens, self.top)
        return {name: value for name, value in asked.items() if name not in self.body.refused}

    def _address(self, url: str) -> str:
        return self.dialect.address(url)

    def _found(self, url: str, body: bytes, asked: Mapping[str, Any], question: Any) -> list[Any]:
        if len(body) > self.longest:
            raise Failed(f"a reply of more than {self.longest >> 20} MB", repeat=False)
        try:
            content = parse_json(body.decode())
        except ValueError as error:
            raise Failed(UNREADABLE, repeat=True) from error
        try:
            return [self.dialect.said(content, question.tokens, self.top)]
        except Absent as error:
            raise Failed(TELLS_NOTHING, repeat=False) from error
        except Failed as failed:
            if not failed.stop:
                raise
            raise Failed(f"{url}: {failed}", repeat=False, stop=True) from failed

    def _of_status(self, url: str, response: Response, complaint: bytes, asked: Mapping[str, Any]) -> Failed:
        # llama.cpp has no echo, llama-cpp-python takes no ids, and both say so by a 500.
        if response.status_code >= 500 and any(
            about in complaint for about in (b"echo", b"logprobs", b"validation error")
        ):
            return Failed(
                f"HTTP {response.status_code}: {self._without_key(complaint.decode(errors='replace'))}", repeat=False
            )
        failed = super()._of_status(url, response, complaint, asked)
        if failed.refused and failed.refused not in self.dialect.optional:
            return Failed(str(failed), repeat=False)
        return failed

    def _lose(self, question: Any, failed: Failed) -> None:
        self.failed = failed
        super()._lose(question, failed)


def _replies(server: ScoringServer, questions: Iterable[TokensQuestion]) -> Iterator[tuple[TokensQuestion, Said]]:
    """Yield the questions with their replies, as these come. ``ask`` knows other questions by their types."""
    for _, question, said in ask(cast("Any", {server: questions})):
        yield cast("Any", question), cast("Any", said)


@dataclass(eq=False)
class ServedScorer:
    """A teacher behind a server."""

    settings: RecipeTeacher
    tokenizer: PreTrainedTokenizerBase
    _server: ScoringServer | None = field(default=None, init=False)
    _given: int = field(default=0, init=False)  # rows so far
    _fewest: int = field(default=1 << 31, init=False)  # likeliest tokens that a row came with

    @property
    def at_once(self) -> int:
        """How many rows are best given together: the last ones of each lot leave the server waiting."""
        return 16 * self.settings.concurrency * len(self.urls)

    @property
    def urls(self) -> tuple[str, ...]:
        """Where it is served."""
        return urls_of(self.settings.server or ())

    @property
    def notes(self) -> list[str]:
        """What was found out about the server, and how many requests were made again."""
        if self._server is None:
            return []
        failures = self._server.failures
        reasons = ", ".join(f"{why} {count:,}×" for why, count in failures.retried.most_common())
        again = [f"{counted(failures.retried.total(), 'request')} made again: {reasons}"] if reasons else []
        wanted = min(self._server.top, len(self.tokenizer))
        fewer = [f"it tells {self._fewest:,} of the {wanted:,} likeliest tokens: the others are in the tail's mass"]
        return [*failures.notes, *again, *(fewer if self._fewest < wanted else [])]

    @property
    def why_missing(self) -> str:
        """Why rows got no answer."""
        if self._server is None:
            return ""
        reasons = Counter(self._server.failures.lost.values()).most_common()
        return "; ".join(f"{why} ({count:,}×)" for why, count in reasons[:SHOWN])

    @cached_property
    def _context(self) -> int | None:
        with suppress(CheckpointError):
            config = config_of(self.settings.model, CAUSAL).get_text_config()
            most = getattr(config, "max_position_embeddings", None)
            return most if isinstance(most, int) and most > 0 else None
        return None

    def why_not(self, row: Tokens) -> str | None:
        """Return why a row can't be scored: it is longer than the model takes, a token to draw included."""
        most, size = self._context, len(row.prompt) + len(row.response) + 1
        return f"it is longer than the {most:,} tokens that the model takes" if most and size > most else None

    def score(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, Said]]:
        """Yield what the server says, as it comes. Rows that it gives no answer to are left out.

        Raises:
            RunError: the server can't do it, or isn't there.
        """
        if not rows:
            return
        if self._server is None:
            self._server = self._probed(rows[0])
        server, first = self._server, self._given
        self._given += len(rows)
        questions = (TokensQuestion(n, row) for n, row in enumerate(rows, first))
        for question, said in _replies(server, questions):
            self._fewest = min(self._fewest, said.top_ids.shape[1])
            yield question.key - first, said
        if server.failures.stopped:
            raise RunError(f"{self.settings.name}: {server.failures.stopped} What it said is kept.")

    def _probed(self, row: Tokens) -> ScoringServer:
        """Return a client that asks in the way that the server knows.

        Raises:
            RunError: it knows none, or tells fewer tokens than are wanted.
        """
        short = Tokens(row.prompt[-PROBED:], row.response[:PROBED])
        top, complaints = self.settings.top, list[str]()
        either = Either(Echo(self._spell))
        why = self._tried(either, short, top, complaints)
        if why is None and either.found is not None and (either.found.name != "echo" or not top):
            return self._client(either.found, top)
        if (
            why is not None
            and why.startswith("HTTP 4")
            and top > 1
            and self._tried(fewer := Either(Echo(self._spell)), short, 1, []) is None
        ):
            if fewer.found is not None and fewer.found.name != "echo":
                raise self._refused(f"it refuses {top:,} likeliest tokens: {why} Start it with --max-logprobs {top}, "
                                    "or lower `top`.", "")  # fmt: skip
            either = fewer
        generate = Generate()
        if self._tried(generate, short, top, complaints) is None:
            return self._client(generate, top)
        if either.found is None:
            # A server may put the first token before each text itself.
            begins = row.prompt[0] == self.tokenizer.bos_token_id
            for text in (self._text, *([lambda tokens: self._text(tokens[1:])] if begins else [])):
                echo = Echo(self._spell, text)
                if self._tried(echo, row, 0, complaints) is None:
                    either.found = echo
                    break
        if either.found is not None and not top:
            return self._client(either.found, 0)
        if either.found is not None:
            raise self._refused(
                f"it tells the log-probabilities of given tokens alone, and `top` is {top:,}. Set top: 0, if the "
                "objective needs no more (alm, on-policy).",
                ADVICE,
            )
        if (others := complaints[-1]).startswith(OTHER_TOKENS):
            raise self._refused(others, "")
        said = "" if complaints[0] == TELLS_NOTHING else f": {complaints[0].rstrip('.')}"
        raise self._refused(f"{TELLS_NOTHING}{said}.", ADVICE)

    def _tried(self, dialect: Dialect, row: Tokens, top: int, complaints: list[str]) -> str | None:
        """Ask once in some way. Returns why there was no answer, which is noted too; None where there was one.

        Raises:
            RunError: the server isn't there, or refuses everybody, or has other tokens.
        """
        server = self._client(dialect, top)
        if list(_replies(server, [TokensQuestion(0, row)])):
            return None
        why = server.failures.stopped or next(iter(server.failures.lost.values()), "no reply")
        failed = server.failed
        missing = " says 404" in why or " says 405" in why
        if failed is None or failed.repeat or (server.failures.stopped and not missing):
            raise self._refused(why, "")
        complaints.append(why)
        return why

    def _refused(self, why: str, advice: str) -> RunError:
        return RunError(f"{self.settings.name}, served at {', '.join(self.urls)}: {why} {advice}".rstrip())

    def _client(self, dialect: Dialect, top: int) -> ScoringServer:
        settings = self.settings
        return ScoringServer(
            self.urls,
            RequestBody(settings.served_model or settings.model, Sampling(), said=()),
            key_variable=settings.api_key_variable,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            retries=settings.retries,
            longest=LONGEST_REPLY,
            dialect=dialect,
            top=top,
        )

    def _spell(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
