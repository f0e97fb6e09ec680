"""How fast two tokenizers are aligned, in processor time: ``python -m benchmarks.aligning STUDENT TEACHER TEXT``.

STUDENT and TEACHER are folders with tokenizers, TEXT a file of plain text. Ends of tokens, groups, the exact map and
the projection are timed, the best of three, and tokenising beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_lite.answers.loading import tokenizer_of
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.projection import projection
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.alignment.vocabulary import exact_map

RUNS = 3


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("text", type=Path)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    both = [tokenizer_of(options.student), tokenizer_of(options.teacher)]
    ends = []
    for tokenizer in both:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        _told(f"tokenise by {tokenizer.name_or_path}", lambda: tokenizer(text), len(ids))  # noqa: B023
        ends.append(_told("  ends of tokens", lambda: response_ends(tokenizer, ids, text), len(ids)))  # noqa: B023
    if None in ends:
        raise SystemExit("a tokenizer changes this text")
    _told("groups", lambda: groups(*ends), sum(map(len, ends)))
    sizes = " × ".join(f"{len(tokenizer):,}" for tokenizer in both)
    _told(f"exact map of {sizes}", lambda: exact_map(*both))
    _told(f"projection of {sizes}", lambda: projection(*both))


def _told(what: str, run: Callable[[], Any], tokens: int = 0) -> Any:
    """Print the least processor time of some runs, or the tokens in a second of it; return the last result."""
    least, result = float("inf"), None
    for _ in range(RUNS):
        start = time.process_time()
        result = run()
        least = min(least, time.process_time() - start)
    print(f"{what:60} {f'{tokens / least:12,.0f} tokens/s' if tokens else f'{least:12.1f} s'}", flush=True)
    return result


if __name__ == "__main__":
    main()
