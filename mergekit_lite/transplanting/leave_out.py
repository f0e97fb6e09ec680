"""A leave-out test: tokens that both models know, rebuilt from the others, and held to the rows that they have.

What becomes of these is what becomes of tokens that the model lacks, as far as the two kinds are alike. The mean of all
shared rows is the trivial answer that every method has to beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.encodings.rebuilt import MEAN, NEAREST, OMP, Rebuilt, Sharing, combination
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tokenizer_file import read_tokenizers
from mergekit_lite.engine.pool import tuned_process
from mergekit_lite.pages import markdown
from mergekit_lite.planning import Plan
from mergekit_lite.transplanting.subwords import halves

SUBWORD = "subword"
SAMPLE = 128
LEAST = 8  # tokens; of fewer nothing can be said
COLUMNS = ("tensor", "method", "tokens", "cosine", "error")


@dataclass(frozen=True, slots=True)
class Trial:
    """How well a method rebuilt known rows.

    Attributes:
        tensor: the matrix.
        method: ``omp``, ``nearest``, ``subword`` or ``mean``.
        tokens: how many were left out and rebuilt.
        cosine: mean cosine of a rebuilt row and the one that is there.
        error: mean of ‖rebuilt − row‖ / ‖row‖.
    """

    tensor: str
    method: str
    tokens: int
    cosine: float
    error: float

    @property
    def row(self) -> tuple[str, ...]:
        """Its row of a table with ``COLUMNS``."""
        return self.tensor, self.method, f"{self.tokens:,}", f"{self.cosine:.3f}", f"{self.error:.3f}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def tried(plan: Plan) -> tuple[Plan, list[Trial]]:
    """Return a transplant's plan with the trials of ``leave_out`` on the output's card, and by themselves."""
    trials = leave_out(plan)
    if not trials:
        return plan, trials
    said = "Known tokens, left out and rebuilt from the others: cosine with the row that is there, and relative error."
    return replace(plan, card=(*plan.card, said, markdown.table(COLUMNS, [trial.row for trial in trials]))), trials


def leave_out(plan: Plan, *, sample: int = SAMPLE, seed: int = 0) -> list[Trial]:
    """Rebuild a sample of the tokens that both models of a transplant's plan know, by every method.

    ``subword`` is tried on tokens that its BPE joins of two others: they are the mean of these. Reads the donor's rows
    of shared tokens. Raises RunError where a file can't be read.
    """
    trials: list[Trial] = []
    parts: Mapping[int, tuple[int, int]] | None = None
    with Reader() as reader, tuned_process():
        for job in plan.jobs:
            encoding = job.inputs[0].encoding
            if not isinstance(encoding, Rebuilt) or len(job.shape) < 2 or len(encoding.sharing.rows) < 2 * LEAST:
                continue
            parts = _parts(plan.inputs[0]) if parts is None else parts
            k = min(encoding.k, len(encoding.sharing.rows) - _count(encoding.sharing, sample))
            trials += _of_matrix(job.name, encoding.sharing, k, parts, reader, sample, seed)
    return trials


def _count(sharing: Sharing, sample: int) -> int:
    return min(sample, len(sharing.rows) // 2)


def _of_matrix(
    name: str,
    sharing: Sharing,
    k: int,
    parts: Mapping[int, tuple[int, int]],
    reader: Reader,
    sample: int,
    seed: int,
) -> list[Trial]:
    total = len(sharing.rows)
    left = np.zeros(total, bool)
    left[np.random.default_rng(seed).choice(total, _count(sharing, sample), replace=False)] = True
    others = replace(sharing, rows=sharing.rows[~left], others=sharing.others[~left])
    known = sharing.rows_of_model(reader, sharing.rows[left])
    targets = sharing.rows_of_other(reader, sharing.others[left])
    atoms = others.atoms(reader)
    made = {method: others.summed(reader, combination(method, targets, atoms, k)) for method in (OMP, NEAREST)}
    made[MEAN] = others.mean(reader).expand(len(known), -1)
    trials = [_trial(name, method, known, rows) for method, rows in made.items()]
    numbers = sharing.rows[left].tolist()
    if joined := [at for at, number in enumerate(numbers) if number in parts]:
        first, second = (
            sharing.rows_of_model(reader, np.array([parts[numbers[at]][half] for at in joined], np.int32))
            for half in (0, 1)
        )
        trials.insert(2, _trial(name, SUBWORD, known[joined], (first + second) / 2))
    return trials


def _trial(name: str, method: str, known: torch.Tensor, made: torch.Tensor) -> Trial:
    tiny = torch.finfo(torch.float64).tiny
    cosine = torch.nn.functional.cosine_similarity(known, made, dim=1)
    error = (made - known).norm(dim=1) / known.norm(dim=1).clamp_min(tiny)
    there = known.norm(dim=1) > 0
    return Trial(name, method, len(known), float(cosine[there].mean()), float(error[there].mean()))


def _parts(model: Checkpoint) -> Mapping[int, tuple[int, int]]:
    """Return for each token of the model that a merge makes the two that it is made of."""
    path = small_file(model.tokenizer_folder, "tokenizer.json") if model.tokenizer_folder else None
    [tokenizer] = read_tokenizers([model])
    if path is None or tokenizer is None:
        return {}
    return halves(path, {text: number for number, text in tokenizer.tokens.items()})
