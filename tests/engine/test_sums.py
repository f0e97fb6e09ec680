"""Sums over sections of a group of tensors: what travels between processes, and how they are added up."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest

from mergekit_lite.engine.tensor_merge import Section, Sums, add_to


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_sums_that_travelled_are_those_that_did_not(dtype: type) -> None:
    """Counts of any density, in any order; sums of floats stay apart."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = np.random.default_rng(seed)
    here: dict[Section, np.ndarray] = {}
    there: dict[Section, np.ndarray] = {}
    for number, density in enumerate((0.0, 0.001, 0.2, 0.3, 1.0, 0.001)):
        part = (draw.integers(1, 9, (3, 5000)) * (draw.random((3, 5000)) < density)).astype(dtype)
        section = (number, 0, 8)
        travelled = pickle.loads(pickle.dumps(Sums({section: part})))
        again = pickle.loads(pickle.dumps(travelled))
        if dtype is np.int64 and density < 0.01:
            assert len(pickle.dumps(travelled)) < part.nbytes / 50
        add_to(here, part.copy(), section, (0, 0, 8))
        add_to(there, again[section], section, (0, 0, 8))
    assert here.keys() == there.keys() and len(here) == (1 if dtype is np.int64 else 6)
    for section, total in here.items():
        np.testing.assert_array_equal(total, there[section])
        assert total.dtype == there[section].dtype == dtype
