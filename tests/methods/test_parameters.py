"""What is read from a method's signature: kinds, defaults and ranges."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest

from mergekit_lite.errors import UsageError
from mergekit_lite.methods.parameters import (
    Bounds,
    Count,
    NotNegative,
    Parameter,
    PerInput,
    PerModel,
    Share,
    of_signature,
    resolved,
)


def toy(
    *,
    t: float,
    n: Count = 3,
    on: bool = True,
    lambda_: Annotated[float, Bounds(-1, 1)] = 0.5,
    how: bool | Literal["l1", "density"] = True,
    density: PerModel[Share] = (1.0,),
    weight: PerInput[NotNegative],
) -> None: ...


def test_parameters_from_a_signature() -> None:
    assert list(of_signature(toy).values()) == [
        Parameter("t", required=True),
        Parameter("n", (int,), 3, bounds=Bounds(0)),
        Parameter("on", (bool,), True),
        Parameter("lambda", (float,), 0.5, bounds=Bounds(-1, 1)),
        Parameter("how", (bool, str), True, choices=("l1", "density")),
        Parameter("density", (float,), 1.0, each="model", bounds=Bounds(0, 1)),
        Parameter("weight", (float,), required=True, each="input", bounds=Bounds(0)),
    ]


def test_what_a_message_asks_for() -> None:
    assert {name: parameter.expected for name, parameter in of_signature(toy).items()} == {
        "t": "a number",
        "n": "a whole number from 0 on",
        "on": "true or false",
        "lambda": "a number from -1 to 1",
        "how": "true or false or one of 'l1', 'density'",
        "density": "a number from 0 to 1",
        "weight": "a number from 0 on",
    }


def test_values_are_spread_and_converted() -> None:
    given = {"t": 1, "n": 2.0, "lambda": -1, "density": [0, 1], "weight": 2}
    assert resolved(toy, given, models=2, has_base=True) == {
        "t": 1.0,
        "n": 2,
        "on": True,
        "lambda_": -1.0,
        "how": True,
        "density": (0.0, 1.0),
        "weight": (2.0, 2.0, 2.0),
    }


@pytest.mark.parametrize("name", ["n", "lambda", "density", "weight"])
@pytest.mark.parametrize("off", [-2, [0, -2], True, "x", float("inf")])
def test_what_is_out_of_range_is_refused(name: str, off: object) -> None:
    with pytest.raises(UsageError, match=f"{name}: expected "):
        resolved(toy, {"t": 1, "weight": 1, name: off}, models=2, has_base=False)


def test_an_annotation_that_says_nothing() -> None:
    def odd(*, x: list[int]) -> None: ...

    with pytest.raises(TypeError, match=r"x: no parameter of a method can be list\[int\]"):
        of_signature(odd)
