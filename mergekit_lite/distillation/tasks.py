"""What a source is asked, and what it has answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mergekit_lite.answers.aggregating.messages import Draft
from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import Key
from mergekit_lite.distillation.recipe.schema import RecipeSource


@dataclass(frozen=True)
class SourceTasks:
    """A source, all answers it has to give, and the ledger of those it gave."""

    source: RecipeSource
    tasks: tuple[Task, ...]  # that can be asked
    ledger: Ledger[Key]
    lost: Mapping[Key, str] = field(default_factory=dict)  # why some can't be asked for
    drafts: Mapping[Key, Draft] = field(default_factory=dict)  # that an aggregate begins with
