"""Draw ``gradients.png`` from the examples of ``docs/recipes.md``: ``python -m docs.images.make_gradients``.

The numbers are what ``resolve`` gives for a model of 16 layers, not a formula of their own.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from mergekit_lite.recipe import outputs, parse, resolve

HERE = Path(__file__).parent
LAYERS = 16
OUTSIDE = (-2, LAYERS + 1, LAYERS + 3)  # where embeddings, norm and head are drawn
INSIDE = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{rest}.weight" for layer in range(LAYERS) for rest in INSIDE),
    "model.norm.weight",
    "lm_head.weight",
]
COLOURS = {"": "#0072b2", "self_attn": "#0072b2", "mlp": "#d55e00", "input_layernorm": "#009e73"}


def main() -> None:
    """Two panels: a gradient alone, and gradients with filters."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), sharey=True, layout="constrained")
    draw(left, "gradient.yml", {"": "all tensors"})
    draw(right, "filters.yml", {"self_attn": "self_attn", "mlp": "mlp", "input_layernorm": "all others (here: norms)"})
    left.set(title="t: [0, 0.5, 0.5, 1]", ylabel="t")
    right.set_title("a gradient for self_attn, one for mlp, 0.5 for all others")
    figure.suptitle(f"One parameter along the {LAYERS} layers of a model")
    figure.savefig(HERE / "gradients.png", dpi=110)


def draw(axes: Axes, example: str, groups: dict[str, str]) -> None:
    """Draw what one recipe gives: lines over the layers, squares outside them."""
    found = values(example)
    for part, label in groups.items():
        inside = [found[f"model.layers.{layer}.{part or 'mlp'}"] for layer in range(LAYERS)]
        axes.plot(range(LAYERS), inside, "o-", markersize=4, color=COLOURS[part], label=label)
    outside = [found[name] for name in ("model.embed_tokens", "model.norm", "lm_head")]
    axes.plot(OUTSIDE, outside, "s", color="#555555", label="outside the layers")
    places = [OUTSIDE[0], *range(0, LAYERS, 3), *OUTSIDE[1:]]
    axes.set_xticks(places, ["embed", *map(str, range(0, LAYERS, 3)), "norm", "head"])
    axes.tick_params("x", labelsize=8)
    axes.set(xlabel="layer", ylim=(-0.05, 1.32), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", ncols=2)


def values(example: str) -> dict[str, float]:
    """Return t of every tensor, by the first parts of its name."""
    text = (HERE.parent / "recipes.md").read_text(encoding="utf-8")
    yaml = re.search(rf"```yaml\n(# {re.escape(example)}\n.*?)```", text, re.DOTALL)
    assert yaml is not None, f"docs/recipes.md has no {example}"
    recipe = parse(yaml[1])
    made = outputs(recipe.slices, dict.fromkeys(recipe.models, NAMES)).tensors
    found = {}
    for output, numbers in zip(made, resolve(recipe, made).numbers, strict=True):
        name = output.spot.name.removesuffix(".weight")
        key = ".".join(name.split(".")[:4])
        found[key] = float(numbers.shared["t"] or 0) if numbers else 0.0
    return found


if __name__ == "__main__":
    main()
