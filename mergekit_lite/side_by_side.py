"""Requests made side by side, in threads that nobody waits for once the answers are of no use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def side_by_side(ask: Callable[[Item], Answer], items: Collection[Item], threads: int) -> list[Answer]:
    """Return what ``ask`` returns for each item, in their order; up to a number of ``threads`` ask at once.

    What it raises for one of them ends it, as Ctrl-C does: an executor would wait until those that are being asked have
    answered, for minutes where a server is silent.
    """
    waiting: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    heard: queue.SimpleQueue[tuple[int, Answer | None, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def work() -> None:
        while not over.is_set():
            try:
                number, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                heard.put((number, ask(item), None))
            except BaseException as error:
                heard.put((number, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    found: dict[int, Answer] = {}
    try:
        while len(found) < len(items):
            number, answer, error = _next(heard)
            if error is not None:
                raise error
            found[number] = answer  # type: ignore[assignment]
    finally:
        over.set()
    return [found[number] for number in range(len(items))]


def _next(heard: queue.SimpleQueue[Answer]) -> Answer:
    while True:
        try:
            return heard.get(timeout=1.0)  # on Windows Ctrl-C has to wait for the end of a wait
        except queue.Empty:
            continue
