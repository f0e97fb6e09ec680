"""Headers of safetensors files beside the format's own library: what it refuses is refused here, in every mutation."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.fuzz_headers import STRICTER, case, differences, library_takes, reason_of
from tests.hostile.make_hostile import entry, safetensors

CASES = 10_000
EMPTY = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def test_ten_thousand_mutations(tmp_path: Path) -> None:
    """Any number more: ``python -m tests.fuzz_headers 100000 7``."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    assert list(differences(CASES, seed, tmp_path)) == []


def test_the_mutations_are_of_all_sorts(tmp_path: Path) -> None:
    """Else the test above would prove little: some files are taken by both, some by the library alone, some by none."""
    chance = random.Random(7)
    path = tmp_path / "x.safetensors"
    outcomes = set()
    for _ in range(300):
        path.write_bytes(content := case(chance))
        outcomes.add((reason_of(path) is None, library_takes(content)))
    assert outcomes == {(True, True), (False, True), (False, False)}


REFUSED_BY_BOTH = {
    "a product hidden by a zero": {"a": entry((2**63 - 1, 2**32, 0), 0, 0)},
    "half a surrogate pair in a key": {"a": entry((0,), 0, 0), "__metadata__": {"\ud800": "x"}},
    "half a surrogate pair in a value": {"a": entry((0,), 0, 0), "__metadata__": {"x": "\ud800"}},
    "-0 as a size": '{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
    "-0 as an offset": '{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}',
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_what_only_looks_sound(tmp_path: Path, name: str) -> None:
    path = safetensors(tmp_path, REFUSED_BY_BOTH[name])
    assert reason_of(path) is not None and not library_takes(path.read_bytes())


def test_a_minus_and_a_zero_in_a_name(tmp_path: Path) -> None:
    assert reason_of(safetensors(tmp_path, {"layer-0.w": entry()}, bytes(16))) is None


def test_every_difference_that_is_meant_occurs(tmp_path: Path) -> None:
    """A row of the table that no file needs would only hide a fault."""
    meant = (
        {"a": entry((0,), 0, 0) | {"stride": [1]}},
        f"{{{EMPTY},{EMPTY}}}",
        {"a": entry((0,) * 17, 0, 0)},
        {"\x1b[2J": entry((0,), 0, 0)},
        {"a": entry((0,), 0, 0), "__metadata__": None},
        {"a": entry((0,), 0, 0, "F4")},
        {"a": entry((0, 2**62, 2**62), 0, 0)},
        EMPTY.join(['{"x-0":', "}"]).replace('"a":', "").replace("[0,0]", '[0,0],"x":-1'),
    )
    used = set()
    for header in meant:
        path = safetensors(tmp_path, header)
        assert library_takes(path.read_bytes()), header
        reason = reason_of(path)
        assert reason is not None
        used |= {known for known in STRICTER if re.match(known, reason)}
    assert used == set(STRICTER)
