"""``python -m demo.distill.server MODEL``: a model behind the OpenAI protocol, as small as it can be.

It stands for whatever serves the sources of a real distillation, which is a program of its own on another machine.
Requests that arrive together are answered in one batch. An answer's draws depend on the request's seed alone.
"""

import json
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH = 64
GATHERING = 0.005  # seconds that the first request of a batch waits for others


@dataclass(frozen=True)
class Request:
    """The part of a chat completion's request that this server reads."""

    prompt: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """An answer, and whether the model ended it (``stop``) or the limit did (``length``)."""

    text: str
    finish: str
    tokens: int


def complete(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", requests: Sequence[Request]
) -> list[Completion]:
    """Answer all requests in one batch, each with its own temperature, top-p, limit and seed."""
    import torch

    inputs = tokenizer([r.prompt for r in requests], padding=True, return_tensors="pt", add_special_tokens=False)
    tokens, mask, cache = inputs.input_ids, inputs.attention_mask, None
    limits = torch.tensor([r.max_tokens for r in requests])
    temperature = torch.tensor([[r.temperature] for r in requests])
    top_p = torch.tensor([[r.top_p] for r in requests])
    draws = torch.stack([torch.rand(int(limits.max()), generator=generator(r.seed)) for r in requests])
    said: list[torch.Tensor] = []
    open_rows = torch.ones(len(requests), dtype=torch.bool)
    with torch.inference_mode():
        while open_rows.any():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            step = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
            tokens, cache = (
                drawn(step.logits[:, -1], temperature, top_p, draws[:, len(said), None]),
                step.past_key_values,
            )
            said.append(tokens[:, 0])
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], 1)
            open_rows &= (tokens[:, 0] != tokenizer.eos_token_id) & (len(said) < limits)
    return [
        completion(row[: request.max_tokens], tokenizer)
        for row, request in zip(torch.stack(said, 1).tolist(), requests, strict=True)
    ]


def generator(seed: int) -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(seed)


def drawn(
    logits: "torch.Tensor", temperature: "torch.Tensor", top_p: "torch.Tensor", draw: "torch.Tensor"
) -> "torch.Tensor":
    """One token for each row of logits [rows, vocabulary]; ``draw`` is uniform in [0, 1). All others are [rows, 1]."""
    probabilities, order = (logits / temperature.clamp(min=1e-6)).softmax(-1).sort(descending=True, stable=True)
    below = probabilities.cumsum(-1) - probabilities  # of all that are more probable
    probabilities = probabilities.where(below < top_p, 0)
    chosen = (probabilities.cumsum(-1) <= draw * probabilities.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    chosen = chosen.clamp(max=logits.shape[-1] - 1).where(temperature > 0, 0)
    return order.gather(-1, chosen)


def completion(tokens: list[int], tokenizer: "PreTrainedTokenizerFast") -> Completion:
    ended = tokenizer.eos_token_id in tokens
    said = tokens[: tokens.index(tokenizer.eos_token_id)] if ended else tokens
    return Completion(
        tokenizer.decode(said, skip_special_tokens=True), "stop" if ended else "length", len(said) + ended
    )


class Desk:
    """A queue of requests. One thread answers all waiting requests as a batch."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"):
        self.model = model
        self.tokenizer = tokenizer
        self.waiting: queue.Queue[tuple[Request, Future[Completion]]] = queue.Queue()
        threading.Thread(target=self._answer, daemon=True).start()

    def ask(self, request: Request) -> Completion:
        """Wait for the answer."""
        future: Future[Completion] = Future()
        self.waiting.put((request, future))
        return future.result()

    def _answer(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while len(batch) < BATCH:
                try:
                    batch.append(self.waiting.get(timeout=GATHERING))
                except queue.Empty:
                    break
            try:
                answers = complete(self.model, self.tokenizer, [request for request, _ in batch])
            except Exception as error:  # whoever asked is told; the others after them are served
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)


class Handler(BaseHTTPRequestHandler):
    """``GET /v1/models`` and ``POST /v1/chat/completions``."""

    protocol_version = "HTTP/1.1"  # connections stay open
    wbufsize = -1  # head and body leave together
    desk: Desk
    name: str

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.name, "object": "model"}]})
        else:
            self._send(404, {"error": {"message": f"Nothing at {self.path}."}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"Nothing at {self.path}."}})
            return
        try:
            request = self._request(json.loads(body))
        except (ValueError, KeyError, TypeError) as error:
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
            return
        answer = self.desk.ask(request)
        message = {"role": "assistant", "content": answer.text}
        self._send(
            200,
            {
                "id": f"chatcmpl-{request.seed}",
                "object": "chat.completion",
                "created": 0,
                "model": self.name,
                "choices": [{"index": 0, "message": message, "finish_reason": answer.finish}],
                "usage": {"prompt_tokens": 0, "completion_tokens": answer.tokens, "total_tokens": answer.tokens},
            },
        )

    def _request(self, asked: dict[str, Any]) -> Request:
        if asked.get("repetition_penalty", 1) != 1:
            raise ValueError("repetition_penalty is not known here")
        return Request(
            prompt=self.desk.tokenizer.apply_chat_template(
                asked["messages"], tokenize=False, add_generation_prompt=True
            ),
            temperature=float(asked.get("temperature", 1)),
            top_p=float(asked.get("top_p", 1)),
            max_tokens=int(asked.get("max_completion_tokens") or asked["max_tokens"]),
            seed=int(asked.get("seed") or 0),
        )

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        """Nothing for each request."""


class Server(ThreadingHTTPServer):
    """A thread for each connection, of which a client opens many at once."""

    daemon_threads = True
    request_queue_size = 128


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--port", default=0, help="0 takes a free one.")
def main(folder: Path, port: int) -> None:
    """Serve the model in FOLDER under the folder's name. The first line of output is the address."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    Handler.desk = Desk(model, AutoTokenizer.from_pretrained(folder))
    Handler.name = folder.name
    server = Server(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
