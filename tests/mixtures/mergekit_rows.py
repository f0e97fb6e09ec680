"""Prints the rows that mergekit 0.1.5 makes of the prompts in ``test_routers.py``: the constants there.

In an environment with mergekit 0.1.5, from this repository's root: ``python -m tests.mixtures.mergekit_rows FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.mixtures.models import settled_model, write
from tests.mixtures.test_routers import KINDS, PROMPTS, STYLES


def main(folder: Path) -> None:
    """Write the models and print, for each kind, mode, layer and expert, the first numbers of the row."""
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert
    from mergekit.moe.router import get_gate_params
    from transformers import AutoTokenizer

    experts = [Expert(source_model="a", positive_prompts=list(positive), negative_prompts=list(negative) or None)
               for positive, negative in PROMPTS]  # fmt: skip
    for kind in KINDS:
        place = write(settled_model(kind), folder / kind, STYLES[kind])
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokenizer.padding_side = "left"
        tokenizer.pad_token_id = tokenizer.bos_token_id or tokenizer.eos_token_id
        for mode in ("hidden", "hidden_last", "hidden_avg", "cheap_embed"):
            rows = get_gate_params(ModelReference.parse(str(place)), tokenizer, experts, mode, device="cpu")
            shown = [[[round(float(x), 4) for x in row[:3]] for row in layer] for layer in rows]
            print(f'    ("{kind}", "{mode}"): {shown},')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
