"""Wrong numbers of inputs, unknown parameters, values of the wrong kind: told before anything is merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_lite.commands.methods import described
from mergekit_lite.errors import UsageError
from mergekit_lite.methods import METHODS, merge_states, merge_tensors

X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("method", "base", "models", "parameters", "words"),
    [
        ("tise", X, [X], {}, "Did you mean 'ties'"),
        ("ties", None, [X], {"weight": 1}, "ties needs a base"),
        ("passthrough", X, [X], {}, "passthrough has no use for a base"),
        ("passthrough", None, [X, X], {}, "passthrough merges 1 model, got 2"),
        ("model_stock", X, [X], {}, "model_stock merges 2 or more models beside the base, got 1"),
        ("ties", X, [X], {}, "ties needs the parameter 'weight'"),
        ("ties", X, [X], {"weight": 1, "densty": 0.5}, "no parameter 'densty'. Did you mean 'density'"),
        ("sce", X, [X], {"weight": 1}, "sce has no parameter 'weight'"),
        ("ties", X, [X], {"weight": [1, 2]}, "weight: expected one number or 1, one for each model, got 2"),
        ("ties", X, [X], {"weight": "much"}, "weight: expected a number, got 'much'"),
        ("ties", X, [X], {"weight": True}, "weight: expected a number, got True"),
        ("ties", X, [X], {"weight": float("nan")}, "weight: expected a finite number"),
        ("ties", X, [X], {"weight": 1, "normalize": 1}, "normalize: expected true or false, got 1"),
        ("ties", X, [X], {"weight": 1, "trim": "globl"}, "Did you mean 'global'"),
        (
            "ties",
            X,
            [X],
            {"weight": 1, "rescale": 1},
            "rescale: expected true or false or one of 'l1', 'density', got 1",
        ),
        ("ties", X, [X], {"weight": 1, "density": 1.5}, "density: expected a number from 0 to 1, got 1.5"),
        ("breadcrumbs", X, [X], {"weight": 1, "gamma": -1}, "gamma: expected a number from 0 to 1, got -1"),
        ("della", X, [X], {"weight": 1, "density": 0.9}, "probabilities from 0.75 to 1.05"),
        ("karcher", None, [X, X], {"max_iter": 2.5}, "max_iter: expected a whole number from 0 on, got 2.5"),
        ("linear", None, [X, X], {"weight": [1, -1]}, "sum to zero"),
        ("geometric_median", None, [X, X], {"weight": [2, -1]}, "weight: expected a number from 0 on, got -1"),
        ("sce", X, [X], {"select_topk": 2}, "select_topk: expected a number from 0 to 1, got 2"),
        ("varm", X, [X], {"temperature": -1}, "temperature: expected a number from 0 on, got -1"),
        ("nearswap", X, [X], {"t": -1}, "t: expected a number from 0 on, got -1"),
        ("ema", None, [X, X], {"decay": 2}, "decay: expected a number from 0 to 1, got 2"),
        ("linear", None, [X, X.T], {"weight": 1}, r"expected shape \(3, 4\) in every input, got \(4, 3\) in input 1"),
        ("linear", None, [X, X.int()], {"weight": 1}, "int32 can't be merged"),
    ],
)
def test_refused(
    method: str, base: torch.Tensor | None, models: list[torch.Tensor], parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        merge_tensors(method, base, models, **parameters)


def test_all_problems_at_once() -> None:
    with pytest.raises(UsageError) as problem:
        merge_tensors("ties", X, [X], densty=1, normalize="yes")
    for words in ("densty", "needs the parameter 'weight'", "normalize: expected true or false"):
        assert words in str(problem.value)


def test_what_mergekit_takes_without_effect() -> None:
    with_it, without = (merge_tensors("ties", X, [2 * X], weight=1, **more) for more in ({"int8_mask": True}, {}))
    assert torch.equal(with_it, without)


def test_a_tensor_that_a_model_lacks() -> None:
    with pytest.raises(UsageError, match="'b' is not in every model"):
        merge_states("uniform_soup", None, [{"a": X, "b": X}, {"a": X}])


def test_dtypes() -> None:
    low = X.bfloat16()
    assert merge_tensors("uniform_soup", None, [low, low]).dtype == torch.bfloat16
    assert merge_tensors("uniform_soup", None, [low, low.half()]).dtype == torch.float32
    assert merge_tensors("uniform_soup", None, [low, low], dtype=torch.float64).dtype == torch.float64


def test_every_method_says_what_it_does() -> None:
    """Formula, source, a summary, and words on each parameter: that is what the listing shows."""
    for name, method in METHODS.items():
        assert method.formula and method.source, name
        summary, words = described(method)
        assert summary, name
        assert words.keys() == method.parameters.keys() and all(words.values()), name
