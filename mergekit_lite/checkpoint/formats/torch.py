"""The places of the tensors in a ``.pt``, ``.pth`` or ``.bin`` file that ``torch.save`` wrote.

Such a file is a zip without compression:

    NAME/data.pkl        a pickle: the saved object, in which a tensor is a storage's key, an offset, sizes and strides
    NAME/data/KEY        the bytes of one storage, which several tensors may share
    NAME/byteorder, …    short notes

The pickle is only ever read by torch's own restricted loader (``weights_only=True``), onto the ``meta`` device: it
yields names, shapes and each storage's offset in the file without touching a weight. Each offset is then checked
against the zip's own records, and the weights are read like any other file's.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.strided import Strided
from mergekit_lite.checkpoint.formats.header import Header, WeightFile, check_name
from mergekit_lite.checkpoint.tensor import PLAIN, TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.errors import CheckpointError, listing, nearest, shortened
from mergekit_lite.input_files import opened

SUFFIXES = (".bin", ".pt", ".pth")
MODEL_NAMES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
ADAPTER_NAMES = ("adapter_model.bin",)
NESTS = ("state_dict", "model", "module", "state")  # keys that training programs put a model's weights under
MAX_NESTING = 4
ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30  # of a zip record, before its name and extra field
ALLOCATOR = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")  # would allocate as much as the pickle names


def read_header(path: Path, within: str = "") -> Header:
    """Find every tensor of a torch file, or of what it holds under the keys ``within``, which have dots between them.

    Raises:
        CheckpointError: no torch zip file, refused by the restricted loader, or without one clear mapping of tensors.
    """
    pickled, records = _check_container(path)
    content = _load_meta(path, pickled)
    # Go down to the mapping that holds the weights, and note what is passed on the way.
    nest: tuple[str, ...] = ()
    others: list[str] = []
    for part in within.split(".") if within else ():
        if not isinstance(content, Mapping) or not isinstance(content.get(part), Mapping):
            raise _no_mapping(path, within, nest, part, content)
        others += [".".join((*nest, _label(other))) for other in content if other != part]
        nest, content = (*nest, part), content[part]
    while (key := _nest_key(path, nest, content)) is not None and len(nest) < MAX_NESTING:
        others += [".".join((*nest, _label(other))) for other in content if other != key]
        nest, content = (*nest, key), content[key]
    tensors = _tensors(content)
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no dictionary of tensors (neither bare nor under {', '.join(NESTS)}). "
            "Save the model's state_dict."
        )
    others += [".".join((*nest, _label(key))) for key in content if key not in tensors]
    specs = [_spec(path, name, tensor, records) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: spec.offset)
    file = WeightFile.identify(path, pickled)
    return Header(file, {spec.name: spec for spec in specs}, nest=nest, left_out=tuple(others))


def _check_container(path: Path) -> tuple[bytes, dict[int, int]]:
    """Return a zip's pickle, and each record's length in bytes by its data's offset, if it is as torch writes it."""
    try:
        with opened(path) as file:
            if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                raise zipfile.BadZipFile("no zip file")
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                members = {entry.filename.partition("/")[2]: entry for entry in entries}
                if len(members) != len(entries):
                    raise zipfile.BadZipFile("two records have the same name")
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                    raise CheckpointError(f"{path}: is a compressed zip; torch.save never writes one. Refused.")
                if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                    raise CheckpointError(
                        f"{path}: was written on a big-endian machine. Save it again on a little-endian one."
                    )
                return archive.read(members["data.pkl"]), dict(_record(file, entry) for entry in entries)
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


def _record(file: IO[bytes], entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the offset in the file at which the data of a zip record begins, and how many bytes it has."""
    # The lengths of name and extra field are read from the record itself: the directory's may be others.
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != ZIP_MAGIC or entry.compress_size != entry.file_size:
        raise zipfile.BadZipFile("the directory and a record don't agree")
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + LOCAL_HEADER_BYTES + name_length + extra_length, entry.file_size


def _load_meta(path: Path, pickled: bytes) -> Any:
    if ALLOCATOR.search(pickled):
        raise CheckpointError(
            f"{path}: asks for memory beside its tensors (a bytearray), which is refused. Keep tensors only."
        )
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged or forged pickle makes the loader raise nearly anything
        reasons = str(error).strip().splitlines() or [type(error).__name__]
        named = next((line for line in reasons if "GLOBAL" in line or "Unsupported" in line), reasons[0]).strip()
        raise CheckpointError(
            f"{path}: refused by torch's restricted loader, and nothing in it was run: {shortened(named, 200)}\n"
            "If you trust where the file comes from, keep its tensors only, in an environment you can throw away: "
            "torch.save(model.state_dict(), 'clean.pt'), or safetensors.torch.save_file(...)."
        ) from error


def _label(key: object) -> str:
    """Return how a key of a pickled dictionary is shown; only text is safe to print."""
    return shortened(key, 80) if isinstance(key, str) and key.isprintable() else f"<{type(key).__name__}>"


def _tensors(content: object) -> dict[str, torch.Tensor]:
    """Return the tensors of a mapping by name, not those in mappings within it."""
    if not isinstance(content, Mapping):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _nest_key(path: Path, nest: tuple[str, ...], content: object) -> str | None:
    """Return the key under which the weights are, or None where they are here already.

    What the mappings hold decides, as a file may keep a loss beside its model. Weights in several places are refused.
    """
    if not isinstance(content, Mapping):
        return None
    loose = list(_tensors(content).values())
    nested = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
    held = {key: _held(value) for key, value in nested.items()}
    # A mapping of vectors is a model only under a known name: others are losses, counters, states of random generators.
    weights = [key for key, tensors in held.items() if _holds_weights(tensors, 1 if key in NESTS else 2)]
    if not weights:
        return None if loose else next((key for key in NESTS if key in nested), None)
    numbers = sum(each.numel() for each in held[weights[0]])
    floats = sum(each.numel() for each in loose if each.is_floating_point())
    here = _holds_weights(loose, 2) or (bool(loose) and floats >= numbers)
    if len(weights) > 1 or here:
        _refuse_choice(path, nest, weights, here)
    check_name(path, weights[0])
    return weights[0]


def _held(content: Mapping[object, object], depth: int = 1) -> list[torch.Tensor]:
    """Return the tensors of a mapping, and of those nested in it under the known names."""
    tensors = list(_tensors(content).values())
    for key in NESTS if depth < MAX_NESTING else ():
        if isinstance(inner := content.get(key), Mapping):
            tensors += _held(inner, depth + 1)
    return tensors


def _holds_weights(tensors: Sequence[torch.Tensor], dimensions: int) -> bool:
    """Return whether one of the tensors is a matrix, or a floating-point one of at least ``dimensions``."""
    return any(each.dim() >= (dimensions if each.is_floating_point() else 2) for each in tensors)


def _no_mapping(path: Path, within: str, nest: tuple[str, ...], key: str, content: object) -> CheckpointError:
    mapping = content if isinstance(content, Mapping) else {}
    known = [_label(other) for other, value in mapping.items() if isinstance(value, Mapping)]
    where = f"under {'.'.join(nest)}" if nest else "at its top level"
    return CheckpointError(
        f"{path}:{within}: the file has no mapping {key!r} {where}.{nearest(key, known)} "
        f"It has {', '.join(known) or 'none'}."
    )


def _refuse_choice(path: Path, nest: tuple[str, ...], keys: Sequence[str], here: bool) -> None:
    places = ["the top level" if not nest else f"under {'.'.join(nest)}"] if here else []
    places += [f"under {'.'.join((*nest, _label(key)))}" for key in keys]
    subscripts = "".join(f"[{key!r}]" for key in map(_label, (*nest, keys[0])))
    named = ".".join((*nest, _label(keys[0])))
    raise CheckpointError(
        listing(f"{path}: holds weights in several places, and it is not clear which are meant", places)
        + f"\nName those you mean, such as {path}:{named}, or save them in a file of their own: "
        'python -c "import torch; '
        f'torch.save(torch.load({path.name!r}, weights_only=True){subscripts}, {path.stem + ".weights.pt"!r})"'
    )


def _spec(path: Path, name: str, tensor: torch.Tensor, records: Mapping[int, int]) -> TensorSpec:
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
    start = tensor.storage_offset() * dtype.size
    # The distance from the first element to the one behind the last, by the strides, which a forged file chooses.
    reach = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and start + reach * dtype.size > records.get(offset, 0):
        raise CheckpointError(
            f"{path}: tensor {name!r} takes bytes {start:,} to {start + reach * dtype.size:,} of a record of "
            f"{records.get(offset, 0):,}. The file is damaged or forged, or its zip isn't torch's."
        )
    encoding = PLAIN if tensor.is_contiguous() else Strided(tensor.stride())
    return TensorSpec(name, dtype.name, tuple(tensor.shape), path, offset + start, encoding)
