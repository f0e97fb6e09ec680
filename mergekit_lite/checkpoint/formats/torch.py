"""The places of the tensors in a ``.pt``, ``.pth`` or ``.bin`` file that ``torch.save`` wrote.

Such a file is a zip (``torch_zip``) with a pickle; ``state_dict`` finds the weights in what that holds.

The pickle is only ever read by torch's own restricted loader (``weights_only=True``), onto the ``meta`` device: it
yields names, shapes and each storage's offset in the file without touching a weight. Each offset is then checked
against the zip's own records, and the weights are read like any other file's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.formats.header import Header, WeightFile, check_name
from mergekit_lite.checkpoint.formats.state_dict import NESTS, Extent, find_state
from mergekit_lite.checkpoint.formats.torch_zip import Record, read_records, spec_in_record
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.errors import CheckpointError, shortened
from mergekit_lite.input_files import StandIn, opened

SUFFIXES = (".bin", ".pt", ".pth")
MODEL_NAMES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
ADAPTER_NAMES = ("adapter_model.bin",)
ALLOCATOR = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")  # would allocate as much as the pickle names


def read_header(path: Path, within: str = "") -> Header:
    """Find every tensor of a torch file, or of what it holds under the keys ``within``, which have dots between them.

    Raises:
        CheckpointError: no torch zip file, refused by the restricted loader, or without one clear mapping of tensors.
    """
    pickled, records = _check_container(path)
    found = find_state(path, _load_meta(path, pickled), within, _extent, lambda keys: _extraction(path, keys))
    if not found.tensors:
        raise CheckpointError(
            f"{path}: holds no dictionary of tensors (neither bare nor under {', '.join(NESTS)}). "
            "Save the model's state_dict."
        )
    specs = [_spec(path, name, tensor, records) for name, tensor in found.tensors.items()]
    specs.sort(key=lambda spec: spec.offset)
    file = WeightFile.identify(path, pickled)
    return Header(file, {spec.name: spec for spec in specs}, nest=found.nest, left_out=tuple(found.others))


def _check_container(path: Path) -> tuple[bytes, dict[int, Record]]:
    """Return a zip's pickle, and each record by its data's offset, if it is as torch writes it."""
    try:
        with opened(path) as file:
            pickled, records = read_records(file, path)
            return pickled, {record.offset: record for record in records.values()}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged zip makes zipfile raise nearly anything
        raise CheckpointError(
            f"{path}: not a file that torch.save (1.6 or later) wrote, or cut short. An older one can be converted: "
            'python -c "import torch; '
            f'torch.save(torch.load({path.name!r}, weights_only=True), {path.stem + ".new.pt"!r})"'
        ) from error


def _load_meta(path: Path, pickled: bytes) -> Any:
    if ALLOCATOR.search(pickled):
        raise CheckpointError(
            f"{path}: asks for memory beside its tensors (a bytearray), which is refused. Keep tensors only."
        )
    try:
        with opened(path) as file:
            source = file if isinstance(path, StandIn) else path
            return torch.load(source, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged or forged pickle makes the loader raise nearly anything
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        named = next((line for line in reasons if "GLOBAL" in line or "Unsupported" in line), reasons[0]).strip()
        raise CheckpointError(
            f"{path}: refused by torch's restricted loader, and nothing in it was run: {shortened(named, 200)}\n"
            "If you trust where the file comes from, keep its tensors only, in an environment you can throw away: "
            "torch.save(model.state_dict(), 'clean.pt'), or safetensors.torch.save_file(...)."
        ) from error


def _extent(value: object) -> Extent | None:
    """Return the extent of a tensor that torch's loader made; None for anything else."""
    return Extent(tuple(value.shape), value.is_floating_point()) if isinstance(value, torch.Tensor) else None


def _extraction(path: Path, keys: Sequence[str]) -> str:
    """Return how to save what is under these keys in a file of its own."""
    subscripts = "".join(f"[{key!r}]" for key in keys)
    return (
        ', or save them in a file of their own: python -c "import torch; '
        f'torch.save(torch.load({path.name!r}, weights_only=True){subscripts}, {path.stem + ".weights.pt"!r})"'
    )


def _spec(path: Path, name: str, tensor: torch.Tensor, records: Mapping[int, Record]) -> TensorSpec:
    """Return the place of a tensor that torch's loader made, once its storage's record is long enough for it."""
    check_name(path, name)
    # The loader notes where in the file a storage begins.
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if tensor.layout == torch.strided else None
    dtype = dtypes.BY_NAME.get(dtypes.name_of(tensor.dtype))
    if offset is None or dtype is None or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(
            f"{path}: tensor {name!r} is a {tensor.layout} tensor of {tensor.dtype}, or a view that is conjugated or "
            "negated; that is not supported. Save it as a plain dense tensor."
        )
    record = Record(offset, records[offset].length if offset in records else 0)
    return spec_in_record(path, name, dtype.name, tensor.shape, tensor.stride(), int(tensor.storage_offset()), record)
