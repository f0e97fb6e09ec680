"""A transplant in one call: what the command ``tokenizer transplant`` does, for Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.engine.run import Finished, RunOptions, run
from mergekit_lite.options import named_options
from mergekit_lite.transplanting.planning import SPARSE, Method, plan_transplant

if TYPE_CHECKING:
    from typing_extensions import Unpack


@named_options
def transplant(
    model: str | Path,
    donor: str | Path,
    output: str | Path,
    *,
    method: Method = "omp",
    k: int = SPARSE,
    pad_to_multiple_of: int | None = None,
    shard_size: int | None = None,
    copy_code: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Make ``model`` with the tokenizer of ``donor``.

    Rows of tokens that both have are the model's. The others are made of the rows of shared tokens, embedding and head
    each for itself (arXiv 2506.06607). How well known tokens are rebuilt is on the output's card.

    Args:
        model: any reference; it gives all weights but those of the vocabulary.
        donor: the model whose tokenizer the output has; its hidden size may be another.
        output: a folder.
        method: ``omp``, the sum of k shared rows that in the donor is nearest to the token's, found by orthogonal
            matching pursuit; ``nearest``, the mean of the k nearest shared rows, weighted by their inverse distance in
            the donor; ``subword``, the mean of the pieces that the model's own tokenizer cuts the token into;
            ``mean``, the mean of all shared rows.
        k: of ``omp`` and ``nearest``.
        pad_to_multiple_of: as many rows as the tokens take, and up to a multiple; by default as many as the donor has.
            Rows without a token are the mean of the shared ones.
        shard_size: most bytes of data in one file; by default the shards of ``model``.
        copy_code: copy the code of its own that a model in a folder has (``auto_map`` in its config); it is not run.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: an option is wrong, or the output exists.
        CheckpointError: a model can't be opened.
        PlanError: models and tokenizers don't allow it; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    from mergekit_lite.transplanting.leave_out import tried  # with torch

    planned, _ = tried(
        plan_transplant(
            model,
            donor,
            output,
            method=method,
            k=k,
            pad_to_multiple_of=pad_to_multiple_of,
            shard_size=shard_size,
            copy_code=copy_code,
        )
    )
    return run(planned, **run_options)
