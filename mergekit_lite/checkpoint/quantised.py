"""Show quantised weights as the tensors they stand for, with their scales and tables hidden.

Each scheme is a file in ``schemes``. To add one, write its file and put it into the table here: schemes are asked in
this order, and none sees what one before it has recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.schemes import affine, bitsandbytes, compressed_tensors, float8, modelopt, mxfp4, refused
from mergekit_lite.checkpoint.schemes.scheme import Scheme, Stored
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import refuse

SCHEMES: tuple[Scheme, ...] = (
    affine.recognise,
    mxfp4.recognise,
    compressed_tensors.recognise,
    modelopt.recognise,
    bitsandbytes.recognise,
    refused.by_name,
    float8.recognise,
    refused.strays,
    refused.unclaimed,
)
OF_ACTIVATIONS = (
    ".input_scale", ".input_scale_ub", ".input_zero_point", ".input_global_scale", ".activation_scale", ".output_scale",
    ".output_zero_point",
)  # fmt: skip
OF_CACHE = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")


def dequantised(
    path: Path, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Show the quantised ones of all tensors that a checkpoint's files hold as what they stand for.

    Return the tensors, with quantised weights as floats under their models' names and without their parts; and why each
    part is left out.

    Raises:
        CheckpointError: some tensors are in a scheme that is refused, or their parts don't fit. All are named.
    """
    shown: dict[str, TensorSpec] = {}  # by the name of the codes
    hidden: dict[str, str] = {}
    problems: list[str] = []
    with Reader() as reader:
        stored = Stored(tensors, config or {}, reader)
        for recognise in SCHEMES:
            recognised = list(recognise(stored))
            for tensor in recognised:
                hidden |= {
                    name: f"{what} of {tensor.codes}, applied when that is read" for name, what in tensor.parts.items()
                }
                if isinstance(tensor.shown, str):
                    problems.append(tensor.shown)
                else:
                    shown[tensor.codes] = tensor.shown
            if recognised:
                stored = stored.without({name for tensor in recognised for name in (tensor.codes, *tensor.parts)})
    refuse(path, problems, "quantised weights")
    if shown:
        hidden |= {
            name: "scale of activations or of the cache, which unquantised weights don't use"
            for name in tensors
            if _is_runtime(tensors[name])
        }
    logical = [shown.get(name, spec) for name, spec in tensors.items() if name not in hidden]
    return {spec.name: spec for spec in logical}, hidden


def _is_runtime(spec: TensorSpec) -> bool:
    return spec.name.endswith(OF_ACTIVATIONS) or (spec.name.endswith(OF_CACHE) and spec.numel == 1)
