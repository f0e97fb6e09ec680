"""What a model would score on a whole benchmark, from its results on a hundred items of it (tinyBenchmarks).

Maia Polo et al. 2024, arXiv 2402.14992. Item response theory says how likely a model of the abilities θ (D,) gets item
i right, with the item's a_i and b_i from hundreds of other models:

    P_i(θ) = σ(Σ_d clip(a_id θ_d − b_id, ±30))

θ is that of the highest likelihood of the results y on the items that were asked. Of each scenario there are then

    IRT    = Σ w_i y_i over its asked items, weights w from clustering (anchor points)
    p-IRT  = λ₀ mean(c_i y_i, asked) + (1 − λ₀) mean(c_i P_i, not asked)        λ₀ = 100 / its number of items
    gp-IRT = λ IRT + (1 − λ) p-IRT                                              λ is published for each scenario

c_i = N / (S n) balances a scenario of N items with S parts, for the items of a part of n. The authors' released
function sets it for the last part of each scenario alone, and leaves 1 elsewhere: ``as_released`` does so.

Their parameters are a pickle, which could run code when it is read. ``convert`` reads it as plain data, of which
numbers, arrays and containers are known, and writes an .npz, which is all that ``Benchmark.read`` opens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.answers.intervals import Floats
from mergekit_lite.checkpoint.formats.plain_pickle import Function, Rebuilt, load
from mergekit_lite.errors import RunError, UnreadableError, UsageError, nearest
from mergekit_lite.input_files import read_bytes

CLIP, ASKED = 30.0, 100  # ASKED: in λ₀, whatever the number that was asked
FLAT = 1e-8  # of the likelihood's slope
STEPS = 200

Indices = NDArray[np.int64]


class Scenario(NamedTuple):
    """A benchmark within a benchmark."""

    parts: tuple[Indices, ...]  # the places of its items, by sub-scenario
    weights: Floats  # (n,) of its asked items, in their order
    share: float  # λ

    @property
    def items(self) -> Indices:
        """The places of its items."""
        return np.concatenate(self.parts)


class Estimates(NamedTuple):
    """Estimates of a scenario's score, from 0 to 1."""

    irt: float
    p_irt: float
    gp_irt: float


class Benchmark(NamedTuple):
    """The items of a benchmark, and which of them are asked."""

    a: Floats  # (D, N)
    b: Floats  # (D, N)
    asked: Indices  # (n,) places of the items, in the order of results
    scenarios: Mapping[str, Scenario]

    def chances(self, ability: Floats) -> Floats:
        """Return the probability of each item being right, (N,), for abilities (D,)."""
        return _sigmoid(np.clip(self.a * ability[:, None] - self.b, -CLIP, CLIP).sum(0))

    def ability(self, results: Floats) -> Floats:
        """Return the abilities (D,) of the highest likelihood of results (n,), from 0 to 1, on the asked items.

        Newton's method, damped where the likelihood has no curvature. Where all results are what one direction of
        ability says, the likelihood has no maximum: then it stops where it is flat, and chances are 0 or 1.
        """
        a, b = self.a[:, self.asked], self.b[:, self.asked]
        theta = np.zeros(len(a))

        def loss(at: Floats) -> float:
            z = np.clip(a * at[:, None] - b, -CLIP, CLIP).sum(0)
            return float((np.logaddexp(0, z) - results * z).sum())

        damping = 1e-6
        for _ in range(STEPS):
            inside = a * (np.abs(a * theta[:, None] - b) < CLIP)
            p = _sigmoid(np.clip(a * theta[:, None] - b, -CLIP, CLIP).sum(0))
            slope = inside @ (p - results)
            if np.abs(slope).max() < FLAT:
                break
            curvature = (inside * (p * (1 - p))) @ inside.T
            step = np.linalg.solve(curvature + damping * np.eye(len(a)), -slope)
            if loss(theta + step) <= loss(theta):
                theta, damping = theta + step, max(damping / 10, 1e-12)
            elif damping > 1e12:
                break
            else:
                damping *= 10
        return theta

    def estimates(self, results: Sequence[float] | Floats, as_released: bool = False) -> dict[str, Estimates]:
        """Return the estimates of each scenario.

        Args:
            results: on the asked items, in their order, each from 0 to 1.
            as_released: balance the last part of a scenario alone, as the authors' function.

        Raises:
            UsageError: they are not as many as the asked items, or not from 0 to 1.
        """
        y = np.asarray(results, dtype=np.float64)
        if y.shape != self.asked.shape:
            raise UsageError(f"{self.asked.size} items are asked, in a fixed order, and there are {y.size} results.")
        if not ((y >= 0) & (y <= 1)).all():
            raise UsageError(f"Results are from 0 to 1, got {y[~((y >= 0) & (y <= 1))][0]:g}.")
        chances, said = self.chances(self.ability(y)), np.zeros(self.a.shape[1])
        said[self.asked] = y
        return {name: self._of(scenario, said, chances, as_released) for name, scenario in self.scenarios.items()}

    def _of(self, scenario: Scenario, said: Floats, chances: Floats, as_released: bool) -> Estimates:
        items = scenario.items
        balance = np.ones(self.a.shape[1])
        for part in scenario.parts[-1:] if as_released else scenario.parts:
            balance[part] = items.size / (len(scenario.parts) * part.size)
        asked = self.asked[np.isin(self.asked, items)]
        others = items[~np.isin(items, self.asked)]
        known = ASKED / items.size
        irt = float(scenario.weights @ said[asked])
        guessed = float((balance * chances)[others].mean()) if others.size else 0.0
        p_irt = known * float((balance * said)[asked].mean()) + (1 - known) * guessed
        return Estimates(irt, p_irt, scenario.share * irt + (1 - scenario.share) * p_irt)

    @classmethod
    def read(cls, path: Path, name: str) -> Benchmark:
        """Read a benchmark of a file that ``convert`` wrote.

        Raises:
            UnreadableError: it is no such file.
            UsageError: it has no such benchmark.
        """
        content = BytesIO(read_bytes(path))
        try:
            with np.load(content, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                if name not in about:
                    raise UsageError(
                        f"{path} has no benchmark {name!r}.{nearest(name, about)} It has: {', '.join(about)}"
                    )
                scenarios = {
                    scenario: Scenario(
                        tuple(file[f"{name}/{number}/part{part}"] for part in range(parts)),
                        file[f"{name}/{number}/weights"],
                        share,
                    )
                    for number, (scenario, parts, share) in enumerate(about[name])
                }
                return cls(file[f"{name}/a"], file[f"{name}/b"], file[f"{name}/asked"], scenarios)
        except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile) as error:
            raise UnreadableError(
                path, "is no file that `mergekit-lite estimate convert` wrote, or is damaged"
            ) from error


def convert(pickled: Path, path: Path) -> list[str]:
    """Write the parameters of the authors' ``tinyBenchmarks.pkl`` as an .npz; returns the benchmarks' names.

    Raises:
        CheckpointError: the pickle can't be read, names more than arrays, or holds something else.
        UsageError: there is such a file.
        RunError: it can't be written.
    """
    content = read_bytes(pickled)
    about: dict[str, list[tuple[str, int, float]]] = {}
    arrays: dict[str, Any] = {}
    found = load(pickled, content, ARRAYS)
    try:
        for name, bench in found.items():
            benchmark = _benchmark(bench)
            arrays |= {f"{name}/a": benchmark.a, f"{name}/b": benchmark.b, f"{name}/asked": benchmark.asked}
            about[name] = [(key, len(each.parts), each.share) for key, each in benchmark.scenarios.items()]
            for number, each in enumerate(benchmark.scenarios.values()):
                arrays[f"{name}/{number}/weights"] = each.weights
                arrays |= {f"{name}/{number}/part{place}": part for place, part in enumerate(each.parts)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(pickled, f"doesn't hold tinyBenchmarks' parameters ({error})") from error
    whole = BytesIO()
    np.savez_compressed(whole, about=np.array(json.dumps(about)), **arrays)
    try:
        with path.open("xb") as file:
            file.write(whole.getvalue())
    except FileExistsError as error:
        raise UsageError(f"{path} exists: give another name, or remove it.") from error
    except OSError as error:
        raise RunError(f"Can't write {path}: {error.strerror}.") from error
    return [*about]


def _benchmark(bench: Mapping[str, Any]) -> Benchmark:
    """Return a benchmark of the authors' dictionary."""
    parameters = bench["irt_parameters"]
    a, b = (np.asarray(parameters[key], dtype=np.float64)[0] for key in ("A", "B"))
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"A and B have the shapes {a.shape} and {b.shape}")
    asked = np.asarray(bench["seen_examples"], dtype=np.int64)
    scenarios = {
        str(name): Scenario(
            tuple(np.asarray(part, dtype=np.int64) for part in bench["subscenarios_position"][name].values()),
            np.asarray(bench["examples_weights"][name], dtype=np.float64),
            float(bench["optimal_lambdas"][name]),
        )
        for name in bench["scenarios_position"]
    }
    for name, scenario in scenarios.items():
        here = int(np.isin(asked, scenario.items).sum())
        if scenario.weights.shape != (here,):
            raise ValueError(f"{name} has {scenario.weights.size} weights for {here} asked items")
        if scenario.items.max() >= a.shape[1] or scenario.items.min() < 0:
            raise ValueError(f"{name} has items beyond the {a.shape[1]:,} that have parameters")
    return Benchmark(a, b, asked, scenarios)


class _Dtype(Rebuilt):
    """What a pickle says of an element type: its code, and in its state the order of bytes."""

    def __init__(self, *arguments: object) -> None:
        self.code = arguments[0] if arguments else None

    @property
    def real(self) -> np.dtype[Any]:
        """The type. Raises ValueError where it isn't of numbers."""
        if not isinstance(self.code, str) or not re.fullmatch(r"[fiub][1248]", self.code):
            raise ValueError(f"elements of the type {self.code!r}")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        return np.dtype(f"{'>' if order == '>' else '<'}{self.code}")


class _Array(Rebuilt):
    """What a pickle says of an array: (version, shape, type, whether columns come first, elements)."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the array; ``numpy.asarray`` calls this."""
        if not isinstance(self.state, tuple) or len(self.state) != 5 or not isinstance(self.state[2], _Dtype):
            raise ValueError("an array without shape, type or elements")
        _, shape, kind, columns_first, elements = self.state
        array: NDArray[Any] = np.frombuffer(elements, kind.real).reshape(shape, order="F" if columns_first else "C")
        return array if dtype is None else array.astype(dtype)


def _scalar(kind: object, element: object) -> float:
    if not isinstance(kind, _Dtype) or not isinstance(element, bytes):
        raise ValueError("a number without type or bytes")
    return float(np.frombuffer(element, kind.real)[0])


# Numpy's names, and what stands for them: nothing of numpy is called by the pickle.
ARRAYS: dict[tuple[str, str], Callable[..., object] | None] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): None,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): Function(lambda *given: _Array()) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): Function(_scalar) for core in ("core", "_core")},
}


def _sigmoid(score: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -score)))
