"""What llm-blender 0.0.2 says of the tiny ranker of the tests, as ``tests/answers/scorers/pair_rm.json`` has it.

    python -m venv oracle && oracle/bin/pip install llm-blender==0.0.2 "transformers<4.45" torch
    oracle/bin/python -m parity.pair_rm > tests/answers/scorers/pair_rm.json

The release needs a transformers of its time. Both of its readers are asked: ``Blender``, which reads PairRM's own
layout, and the class for transformers that is published beside PairRM-hf.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import llm_blender
import torch
from llm_blender.blender.blender_utils import get_pair_from_conv, tokenize_pair
from llm_blender.gpt_eval.utils import get_ranks_from_cmps, get_ranks_from_scores, get_scores_from_cmps
from llm_blender.pair_ranker.pairrm import DebertaV2PairRM
from transformers import AutoTokenizer

from tests.answers.scorers import pair_ranker as tiny

CASES = (
    ("What is one and one?", ["It is two.", "two", "One and one is the number three, or so I think."]),
    ("Sing!", ["la la", "No.", "I can not sing, for I have no voice; but here is a song.", "la [SEP] la", "la la la"]),
    ("Is this the question that is much longer than all of the tokens that it may have here?", ["yes", "it is one"]),
    ("Hm", ["a\nb\nc", f"{'the ' * 60}end"]),
)
TURNS = ("Sing one song", "la la", "And one more?")
LAST = ("er, the la la", "No.")


def main() -> None:
    """Print what the oracle says of each case."""
    with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
        ranker = tiny.write_ranker(Path(place) / "ranker", str(tiny.write_backbone(Path(place) / "backbone")))
        blender = llm_blender.Blender()
        blender.loadranker(str(ranker), device="cpu")
        found = [_case(blender, *case) for case in CASES]
        turns = _turns(blender)
        same = _class_for_transformers(tiny.write_for_transformers(Path(place) / "hf"))
    print(json.dumps({"cases": found, "turns": turns, "class": same}, indent=1))


def _case(blender: llm_blender.Blender, source: str, candidates: list[str]) -> dict[str, object]:
    batch = blender.ranker_collator([{"source": source, "candidates": candidates}])
    with torch.no_grad():
        logits = blender.ranker._full_predict(**batch)["logits"].numpy()
    scores = get_scores_from_cmps(logits)
    assert (scores == blender.rank([source], [candidates], return_scores=True, batch_size=1)).all()
    return {
        "source": source,
        "candidates": candidates,
        "logits": logits[0].tolist(),
        "scores": scores[0].tolist(),
        "ranks": get_ranks_from_scores(scores)[0].tolist(),
        "ranks by wins": get_ranks_from_cmps(logits, "max_wins")[0].tolist(),
    }


def _turns(blender: llm_blender.Blender) -> dict[str, object]:
    roles = ("USER", "ASSISTANT")
    both = [[{"role": roles[n % 2], "content": text} for n, text in enumerate((*TURNS, last))] for last in LAST]
    source, (first,), (second,) = get_pair_from_conv([both[0]], [both[1]])
    logit = blender.compare_conversations([both[0]], [both[1]], return_logits=True)
    return {"turns": TURNS, "last": LAST, "source": source[0], "read": [first, second], "difference": logit.item()}


def _class_for_transformers(folder: Path) -> list[object]:
    """Return the logit of the first two candidates of each case, by the class and its way to write pairs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DebertaV2PairRM.from_pretrained(folder).eval()
    most, each = tiny.LENGTHS.values()
    found = []
    for source, (first, second, *_) in CASES:
        read = tokenize_pair(tokenizer, [source], [first], [second], source_max_length=most, candidate_max_length=each)
        with torch.no_grad():
            found.append(model(read["input_ids"], read["attention_mask"]).logits.item())
    return found


if __name__ == "__main__":
    main()
