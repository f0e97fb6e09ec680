"""The calls of one answer, by content: model, settings, conversation and seed. Equal calls have equal replies.

So a step that was changed is made again, and what was made of its drafts, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from mergekit_lite.answers.aggregating.recipe import Aggregate, Kind
from mergekit_lite.answers.aggregating.steps import Call, Drafts
from mergekit_lite.answers.asked_model import AskedModel
from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.prompts import digest_of
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.rows import Message, Prompt, seed_of


@dataclass(eq=False)
class Item:
    """One answer to make, and how far it is."""

    task: Task  # the prompt, and the seed that all of its calls follow from
    models: Mapping[str, str]  # digests of the models' settings, by their names
    drafts: Drafts = ()  # of the layer before
    lost: str = ""  # why there will be no answer
    used: list[str] = field(default_factory=list)  # the calls' keys, in their order
    taught: dict[Kind, list[tuple[tuple[Message, ...], Reply]]] = field(default_factory=dict)  # requests and replies
    _numbers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def task_of(self, call: Call) -> Task:
        """Return the task of a call, whose prompt has the call's key as its id.

        The same request made again gets another seed.
        """
        what = self.models[call.model], digest_of(call.messages)
        seed = seed_of(self.task.seed, *what, self._numbers[what])
        self._numbers[what] += 1
        key = xxh3_128_hexdigest("\x1f".join([*what, str(seed)]).encode())
        self.used.append(key)
        return Task(Prompt(key, call.messages), 0, seed)


def digests(aggregate: Aggregate, folder: Path) -> dict[str, str]:
    """Return a digest of what the replies of each model depend on; paths are taken as from a folder."""
    return {model.name: _digest(model, folder) for model in aggregate.models}


def settings_of(model: AskedModel, folder: Path) -> dict[str, Any]:
    """Return what a model's replies depend on, beside conversation and seed."""
    local = Path(model.model).is_absolute()
    examples = model.examples()
    return {
        "model": Path(os.path.relpath(model.model, folder)).as_posix() if local else model.model,
        "served": model.is_served,
        "engine": model.engine,
        "engine_options": model.engine_options,
        "dtype": model.dtype,
        "system": model.system,
        "in_context": None if examples is None else xxh3_64_hexdigest(examples.encode()),
        "sampling": model.sampling.model_dump(mode="json"),
    }


def _digest(model: AskedModel, folder: Path) -> str:
    return xxh3_64_hexdigest(json.dumps(settings_of(model, folder), sort_keys=True).encode())
