"""Where the tensors lie in a ``.pt``, ``.pth`` or ``.bin`` file that ``torch.save`` wrote.

The pickle inside is only ever read by torch's own restricted loader (``weights_only=True``), onto the ``meta`` device: it yields
names, shapes and each storage's offset in the file without touching a weight. The weights are then read like any other file's.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.tensor import TensorSpec, WeightFile
from mergekit_lite.errors import CheckpointError

if TYPE_CHECKING:
    import torch

NESTS = ("state_dict", "model", "module", "state")


def read_layout(path: Path) -> tuple[WeightFile, dict[str, TensorSpec], tuple[str, ...], list[str]]:
    """Find every tensor of a torch file.

    Returns:
        The file's identity, its tensors by name in the order of their bytes, the keys they are nested under (``("model",)`` for
        ``{"model": {...}}``), and the names of what else the file holds and this package leaves out (an epoch, an optimizer).

    Raises:
        CheckpointError: not a torch zip file, refused by the restricted loader, or it holds no dictionary of tensors.
    """
    pickled = _check_container(path)
    content = _load_meta(path)
    nest: tuple[str, ...] = ()
    others: list[str] = []
    while (key := _nest_key(content)) is not None:
        others += [".".join((*nest, str(other))) for other in content if other != key]
        nest, content = (*nest, key), content[key]
    tensors = _tensors(content)
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no dictionary of tensors (neither bare nor under {', '.join(NESTS)}). Save the model's state_dict."
        )
    others += [".".join((*nest, str(key))) for key in content if key not in tensors]
    specs = [_spec(path, name, tensor) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: spec.offset)
    return WeightFile.identify(path, pickled), {spec.name: spec for spec in specs}, nest, others


def _check_container(path: Path) -> bytes:
    """Check the zip around the pickle, and give the pickle's bytes (what identifies the file's structure)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2]: name for name in archive.namelist()}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise CheckpointError(f"{path}: is a compressed zip; torch.save never writes one. Refused.")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(
                    f"{path}: was written on a big-endian machine. Save it again on a little-endian one."
                )
            return archive.read(members["data.pkl"])
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a file that torch.save (1.6 or later) wrote, or cut short. An older one can be converted: "
            f'python -c "import torch; torch.save(torch.load({path.name!r}, weights_only=True), {path.stem + ".new.pt"!r})"'
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


def _load_meta(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, EOFError) as error:
        reason = str(error).strip().splitlines()
        named = next(
            (line for line in reason if "GLOBAL" in line or "Unsupported" in line),
            reason[0] if reason else "damaged",
        )
        raise CheckpointError(
            f"{path}: refused by torch's restricted loader, and nothing in it was run: {named.strip()[:200]}\n"
            "If you trust where the file comes from, keep its tensors only, in an environment you can throw away: "
            f"torch.save(model.state_dict(), 'clean.pt'), or safetensors.torch.save_file(...)."
        ) from error


def _tensors(content: object) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(content, Mapping):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _nest_key(content: object) -> str | None:
    """The key under which the tensors are, or None where they are here already."""
    if not isinstance(content, Mapping) or _tensors(content):
        return None
    return next((key for key in NESTS if isinstance(content.get(key), Mapping)), None)


def _spec(path: Path, name: str, tensor: torch.Tensor) -> TensorSpec:
    import torch

    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if tensor.layout == torch.strided else None
    dtype = dtypes.BY_NAME.get(dtypes.name_of(tensor.dtype))
    if offset is None or dtype is None or tensor.is_quantized:
        raise CheckpointError(
            f"{path}: tensor {name!r} is a {tensor.layout} tensor of {tensor.dtype}, which is not supported. "
            "Save it as a plain dense tensor."
        )
    strides = None if tensor.is_contiguous() else tensor.stride()
    start = offset + tensor.storage_offset() * dtype.size
    spec = TensorSpec(name, dtype.name, tuple(tensor.shape), path, start, strides)
    reach = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and start + reach * dtype.size > path.stat().st_size:
        raise CheckpointError(
            f"{path}: tensor {name!r} reaches past the end of the file. It is cut short: copy it again."
        )
    return spec
