"""The weights that are made up to measure what a run costs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.methods.tensor_merge import SAMPLE_EVERY, SAMPLE_PIECE
from mergekit_lite.prediction.made_up import DIFFERENT, MadeUpReader


def test_a_sample_of_made_up_weights_meets_different_ones() -> None:
    """Where they repeated with the sample's pieces, it would see the same few again and again."""
    assert math.gcd(DIFFERENT, SAMPLE_PIECE * SAMPLE_EVERY) == 1


def test_made_up_weights_repeat_without_a_seam() -> None:
    """Whatever place a job is given, and whatever is read at once: inputs that belong together stay side by side."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    plain = TensorSpec("any", "bfloat16", (1 << 26,), Path("any"), 0, 1 << 27)
    with MadeUpReader(2) as reader:
        for number, dtype in ((0, "bfloat16"), (1, "float32")):
            spec, period = reader.noise(replace(plain, dtype=dtype), number), DIFFERENT * dtypes.size(dtype)
            first = bytearray(period)
            reader.fill(spec.file, 0, memoryview(first), "any")
            for _ in range(20):
                reader.next_job()
                offset, out = rng.randrange(1 << 27), bytearray(rng.randrange(1, 3 * period))
                reader.fill(spec.file, offset, memoryview(out), "any")
                begin = offset % period
                assert out == (bytes(first) * 5)[begin : begin + len(out)]
