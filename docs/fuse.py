"""Write the costs in ``docs/fuse.md`` from the code's own figures: ``python -m docs.fuse``."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mergekit_lite.answers.logprobs import LOGITS_AT_ONCE
from mergekit_lite.distillation.teaching.encoding import encode
from mergekit_lite.distillation.teaching.rows import TaughtRow

PAGE = Path(__file__).with_suffix(".md")
SECTION = re.compile(r"(?<=\n\| kept of each position \|).*?(?=\n\nIn words)", re.DOTALL)
VOCABULARIES = {"Llama 3": 128_256, "Qwen3": 151_936, "Gemma 3": 262_144}
KEPT = {0: "`top: 0`: the token's log p", 10: "`top: 10`, as FuseLLM", 32: "`top: 32`", 128: "`top: 128`, the default"}
PARAMETERS = 8e9  # of each teacher, and of the student
ROWS, PROMPT, RESPONSE = 95_000, 300, 600  # FuseChat's dialogues, and tokens of each as we take it
FLOPS = 400e12  # of a GPU in a second, in bf16 on such work
SPELLED = 5  # bytes of text of a token


def bytes_per_token(top: int, vocabulary: int) -> float:
    """Return the bytes that a position of a response takes in the files of the stage ``teach``."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(vocabulary, top, replace=False) for _ in range(RESPONSE)]).reshape(RESPONSE, top)
    log_probs = -np.sort(rng.gamma(2, 2, (RESPONSE, top)), axis=1) - np.log(max(top, 1))
    row = TaughtRow(
        key="",
        tokens=rng.integers(0, vocabulary, RESPONSE, dtype=np.int32),
        ends=np.arange(1, RESPONSE + 1, dtype=np.int32) * SPELLED,
        log_probs=-rng.gamma(1, 1, RESPONSE).astype(np.float32),
        top_ids=ids.astype(np.int32),
        top_log_probs=log_probs.astype(np.float32),
    )
    return len(encode(row, vocabulary)) / RESPONSE


def storage() -> list[tuple[str, ...]]:
    """Return the rows of the table of what is stored."""
    rows = []
    for top, kept in KEPT.items():
        found = [bytes_per_token(top, vocabulary) for vocabulary in VOCABULARIES.values()]
        whole = ROWS * RESPONSE * found[list(VOCABULARIES).index("Qwen3")]
        rows.append((kept, *(f"{each:.0f}" for each in found), f"{whole / 1e9:.1f} GB"))
    dense = 2 * VOCABULARIES["Qwen3"]
    rows.append(
        (
            "all of it, in bf16",
            *(f"{2 * size:,}" for size in VOCABULARIES.values()),
            f"{ROWS * RESPONSE * dense / 1e12:.0f} TB",
        )
    )
    return rows


def passes() -> list[tuple[str, ...]]:
    """Return the rows of the table of passes and memory."""
    tokens, said = ROWS * (PROMPT + RESPONSE), ROWS * RESPONSE
    weights, state = 2 * PARAMETERS, 16 * PARAMETERS
    chunk = f"{4 * LOGITS_AT_ONCE / 1e9:.2f} GB of logits"
    scored = 2 * PARAMETERS * tokens
    trained = 8 * PARAMETERS * tokens
    drawn = 2 * PARAMETERS * said

    def row(what: str, formula: str, flops: float, memory: str) -> tuple[str, ...]:
        return what, formula, f"{flops / 1e18:.1f} EFLOP, {flops / FLOPS / 3600:.1f} h", memory

    return [
        row(
            "a teacher scores all rows, once",
            "2 · P · tokens",
            scored,
            f"{weights / 1e9:.0f} GB, and {chunk}; no cache",
        ),
        row(
            "an epoch of `fuse` (or SFT)", "8 · P · tokens", trained, f"{state / 1e9:.0f} GB over all GPUs, and {chunk}"
        ),
        row(
            "`pairwise` of 3 teachers, an epoch each",
            "3 · 8 · P · tokens",
            3 * trained,
            "the same, one after the other",
        ),
        row(
            "a round of `on_policy`",
            "2 · P · responses + (2 + 2 + 8) · P · tokens",
            drawn + 2 * scored + trained,
            f"the student's, and the teacher's {weights / 1e9:.0f} GB or its server",
        ),
    ]


def table(*rows: tuple[str, ...]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def costs() -> str:
    """Return both tables."""
    heads = ("kept of each position", *(f"{name}, bytes a token" for name in VOCABULARIES), "all rows, Qwen3")
    stored = table(heads, ("---", *("---:",) * 4), *storage())
    heads = ("what", "arithmetic (P parameters)", "all rows, 8 B", "memory")
    return f"{stored}\n\n{table(heads, ('---',) * 4, *passes())}"


def page() -> str:
    """Return the page as it is, with the costs as the code has them."""
    text = PAGE.read_text(encoding="utf-8")
    return SECTION.sub(lambda _: costs().removeprefix("| kept of each position |"), text, count=1)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
