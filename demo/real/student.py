"""The student: the released model without some of its layers, with its tokenizer.

Layers in a row from the middle are left out: without them the model is hurt less than without every other one.
"""

import sys
from pathlib import Path

from demo.real.plan import LEFT_OUT


def cut(whole: Path, output: Path) -> None:
    """Write a model of transformers without the layers of ``LEFT_OUT``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = output.with_name(f"{output.name}.partial")
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    layers = [layer for number, layer in enumerate(model.model.layers) if number not in LEFT_OUT]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(whole).save_pretrained(partial)
    partial.rename(output)  # what has its name is complete


if __name__ == "__main__":
    cut(Path(sys.argv[1]), Path(sys.argv[2]))
