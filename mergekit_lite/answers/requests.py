"""The body of a request: what the sampling says, less what a server turned out to refuse.

A server that refuses a parameter by name (HTTP 400 or 422) gets requests without it, if nobody asked for that
parameter: temperature, top_p and seed have defaults of ours. ``max_tokens`` becomes ``max_completion_tokens`` where a
server asks for that. A parameter that the user did set is not left out: then the source can't be asked.

Where a conversation ends with the beginning of the answer, the server is told to go on from there, as vLLM, SGLang and
llama.cpp's server are told. One that refuses this can't be asked either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.rows import Message, given_text

LIMITS = ("max_tokens", "max_completion_tokens")
CONTINUING = {"continue_final_message": True, "add_generation_prompt": False}  # keys of a chat template, too
OURS = ("model", "messages", "seed", "n", "stream")  # keys that a recipe's ``extra_body`` can't have
NOT_PERMITTED = ("extra_forbidden", "unsupported_parameter", "unsupported_value", "unknown_parameter")
REFUSAL = re.compile(
    r"unsupported|n[o']t support|not permitted|not allowed|not accept|unknown|unrecogni[sz]ed|unexpected|deprecated",
    re.IGNORECASE,
)


@dataclass
class RequestBody:
    """What requests to one model are made of. What a server refuses is noted here, for all later ones."""

    model: str  # the name it is served under
    sampling: Sampling
    said: Collection[str] | None = None  # the settings that the user made; by default those that the sampling was given
    limit: str = "max_tokens"  # what the server calls the most tokens of an answer
    refused: set[str] = field(default_factory=set)  # parameters that are left out

    def of(self, messages: Sequence[Message], seed: int, answers: int = 1) -> dict[str, Any]:
        """Return the body of a request for one or several answers."""
        sampling = self.sampling
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "seed": seed,
            self.limit: sampling.max_tokens,
            **sampling.model_dump(
                mode="json",
                exclude={"temperature", "top_p", "repetition_penalty", "max_tokens", "extra_body"},
                exclude_none=True,
            ),
        }
        if sampling.temperature > 0 or self.is_set("top_p"):
            asked["top_p"] = sampling.top_p
        if sampling.repetition_penalty != 1:  # not all servers know it
            asked["repetition_penalty"] = sampling.repetition_penalty
        if given_text(messages):
            asked |= CONTINUING
        if answers > 1:
            asked["n"] = answers
        if self.limit == "max_tokens" and "max_completion_tokens" in (sampling.extra_body or ()):
            del asked["max_tokens"]  # it is the same limit: a batch can't find out which one the service takes
        asked |= sampling.extra_body or {}
        return {name: value for name, value in asked.items() if name not in self.refused}

    def is_set(self, name: str) -> bool:
        """Whether the user set this parameter."""
        return name in (self.sampling.model_fields_set if self.said is None else self.said) or name in (
            self.sampling.extra_body or ()
        )

    def adapt(self, name: str) -> str:
        """Change later requests for a parameter that is refused, and return a remark; empty if that is done already."""
        if name == "max_tokens":
            done, self.limit = self.limit != name, "max_completion_tokens"
            return "" if done else "the server calls max_tokens max_completion_tokens"
        done = name in self.refused
        self.refused.add(name)
        return "" if done else f"the server refuses {name!r}, which the recipe doesn't set: it is left out"


def refused_parameter(complaint: bytes, sent: Mapping[str, Any]) -> str | None:
    """Return the parameter of a request that a server's error names as one that it doesn't take; None for none.

    A limit on tokens counts only where the server names the other one: mostly it is too large for one prompt.
    """
    names = [name for name in sent if name not in ("model", "messages", "prompt")]
    text = complaint.decode(errors="replace")
    found = _named(_parsed(text), names) or _worded(text, names)
    if found in LIMITS:
        asks = "max_completion_tokens" not in sent and "max_completion_tokens" in text and REFUSAL.search(text)
        return found if asks else None
    return found


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _named(content: Any, names: Collection[str]) -> str | None:
    """Return the parameter that a structured error names: OpenAI's ``code`` and ``param``, pydantic's ``loc``."""
    if not isinstance(content, dict):
        return None
    error, details = content.get("error"), content.get("detail")
    for each in [error, *(details if isinstance(details, list) else [])]:
        if isinstance(each, dict) and any(each.get(key) in NOT_PERMITTED for key in ("code", "type")):
            loc = each.get("loc")
            for name in (each.get("param"), loc[-1] if isinstance(loc, list) and loc else None):
                if isinstance(name, str) and name in names:
                    return name
    return None


def _worded(text: str, names: Collection[str]) -> str | None:
    """Return the parameter that comes first in an error that says in words that something is not supported."""
    if REFUSAL.search(text) is None:
        return None
    places = {name: match.start() for name in names if (match := re.search(rf"\b{re.escape(name)}\b", text))}
    return min(places, key=lambda name: places[name]) if places else None
