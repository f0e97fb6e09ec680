"""A server that scores given tokens by a model, in the ways of several servers, and misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Status = tuple[int, Any]


@dataclass
class Scoring:
    """The server's ways, its mood and its log."""

    model: Any
    tokenizer: Any
    way: str  # vllm, sglang, echo, echo of text, llama-cpp-python, llama.cpp, nothing
    mood: Callable[[int], str | int | None] = lambda request: None  # drop, garbage, or a status
    most: int = 20  # likeliest tokens
    caps: int | None = None  # tells no more likely tokens than these, whatever is asked
    adds: tuple[int, ...] = ()  # tokens that it puts before all others
    shift: int = 0  # added to each id that it tells
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)  # by path
    headers: list[dict[str, str]] = field(default_factory=list)
    scored: Counter[tuple[int, ...]] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, path: str, body: dict[str, Any]) -> Status:
        """Return the status and the content of a reply."""
        if path == "/generate" and self.way == "sglang":
            return 200, self.generate(body)
        if path != "/v1/completions" or self.way == "sglang":
            return 404, {"error": "Not Found"}
        if self.way == "llama.cpp" and body.get("echo"):
            return 500, {"error": {"message": "Only no echo is supported"}}
        if self.way == "vllm":
            return self.vllm(body)
        if self.way == "echo" and not isinstance(body["prompt"], str):
            return 200, self.echo(body["prompt"])
        if self.way == "echo of text":
            if not isinstance(body["prompt"], str):
                return 422, {"detail": "prompt: Input should be a valid string"}
            return 200, self.echo(self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"])
        if self.way == "llama-cpp-python":
            return self.llama_cpp_python(body["prompt"])
        return 200, {"choices": [{"text": "x", "logprobs": None}]}

    def llama_cpp_python(self, prompt: Any) -> Status:
        """As its code: no ids; rows of log-probabilities beside tokens from the second on, if the first is BOS."""
        if not isinstance(prompt, str):
            return 500, {"error": {"message": "1 validation errors: Input should be a valid string"}}
        ids = [*self.adds, *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        rows = self.log_probs([*ids, 0])
        begin = self.tokenizer.bos_token_id
        told = [*ids[ids[0] == begin :], 0]
        kept = [(token, row) for token, row in zip(told, rows, strict=False) if token != begin]
        texts = [self.tokenizer.decode([token], skip_special_tokens=True) for token, _ in kept]
        values = [None, *(row[token].item() for token, row in kept[1:])]
        usage = {"prompt_tokens": len(ids)}
        return 200, {"choices": [{"logprobs": {"tokens": texts, "token_logprobs": values}}], "usage": usage}

    def vllm(self, body: dict[str, Any]) -> Status:
        """As vLLM: a mapping from ids for each token but the first, the token itself beside the likeliest."""
        top = body["prompt_logprobs"]
        if top > self.most:
            said = f"Requested prompt logprobs of {top}, which is greater than max allowed: {self.most}"
            return 400, {"error": {"message": said}}
        ids = [*self.adds, *body["prompt"]]
        told: list[dict[str, Any] | None] = [None]
        for token, values in zip(ids[1:], self.log_probs(ids), strict=True):
            best = values.topk(min(top, self.caps or top)).indices.tolist()
            names = dict.fromkeys([token, *best])
            told.append({str(n + self.shift): {"logprob": values[n].item(), "decoded_token": "?"} for n in names})
        return 200, {"choices": [{"text": "x", "prompt_logprobs": told, "logprobs": None}]}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """As SGLang: from a place on, the first one without a value."""
        ids, start, top = [*self.adds, *body["input_ids"]], body["logprob_start_len"], body["top_logprobs_num"]
        all_values = self.log_probs(ids)
        own: list[Any] = [[None, ids[start], None]]
        best: list[Any] = [None]
        for place in range(start + 1, len(ids)):
            values = all_values[place - 1]
            own.append([values[ids[place]].item(), ids[place] + self.shift, None])
            best.append(
                [[value, n, None] for value, n in zip(*map(torch.Tensor.tolist, values.topk(top)), strict=True)]
            )
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": best}}

    def echo(self, ids: list[int]) -> dict[str, Any]:
        """As OpenAI's former completions: texts, and one more token that is generated."""
        ids = [*self.adds, *ids]
        values: list[float | None] = [None]
        values += [each[token].item() for token, each in zip(ids[1:], self.log_probs(ids), strict=True)]
        texts = [self.tokenizer.decode([n + self.shift]) for n in ids]
        return {"choices": [{"logprobs": {"tokens": [*texts, "!"], "token_logprobs": [*values, -1.0]}}]}

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Return the log-probabilities after each token but the last."""
        with self.lock:
            self.scored[tuple(ids)] += 1
            return self.model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    scoring: Scoring

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        scoring = self.scoring
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with scoring.lock:
            trouble = scoring.mood(scoring.requests.total())
            scoring.requests[self.path] += 1
            scoring.headers.append({key.lower(): value for key, value in self.headers.items()})
        with suppress(BrokenPipeError, ConnectionResetError):
            if trouble == "drop":
                self.close_connection = True
            elif trouble == "garbage":
                self._send(200, b'{"choices": [{"prom')
            elif isinstance(trouble, int):
                self._send(trouble, b'{"error": "no luck"}')
            else:
                status, content = scoring.reply(self.path, body)
                self._send(status, json.dumps(content).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def scoring_server(scoring: Scoring) -> Iterator[Scoring]:
    """Run it; ``url`` is set."""
    handler = type("Handler", (_Handler,), {"scoring": scoring})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    scoring.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield scoring
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
