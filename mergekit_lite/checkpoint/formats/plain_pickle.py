"""Pickles of strangers as plain data: no class or function that they name is looked up, imported or called.

Checkpoints of trainers are pickles of classes of torch, DeepSpeed and the user. Those that say where weights lie become
the few kinds of data below. Every other one is refused, or becomes an ``Unknown``, which holds nothing. Instructions
that take as much memory as a number in the file says, or use what other programs registered, are refused beforehand.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.errors import CheckpointError, shortened

# Runs of the instructions that may stand in a pickle, by the form of their argument (``pickletools`` lists them). A
# place in the memo, for which the interpreter takes memory, is below four millions.
NO_ARGUMENT = rb"[(012NQR)\]abdelstu}\x81\x85-\x89\x8f-\x94]"
FIXED = rb"[\x80Khq].|M..|[Jj].{4}|[G\x95].{8}|r..[\x00-\x3f]\x00"
LINES = rb"[FILSVg][^\n]*\n|p[0-9]{1,6}\n|c[^\n]*\n[^\n]*\n"
COUNTED = rb"[U\x8cC\x8a](?:" + b"|".join(b"\\x%02x.{%d}" % (length, length) for length in range(256)) + b")"
RUN = re.compile(b"(?:" + b"|".join((NO_ARGUMENT, FIXED, COUNTED, LINES)) + b"){0,1000}", re.DOTALL)
LENGTHS = {b"T": 4, b"X": 4, b"B": 4, b"\x8b": 4, b"\x8d": 8, b"\x8e": 8}  # bytes of the length of an argument
STOP = b"."
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
}  # fmt: skip


class Rebuilt:
    """An object of a known class: its state, as it was pickled, and nothing of the class."""

    state: object = None

    def __init__(self, *arguments: object) -> None:
        """Take whatever the class would."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute; None where it has none of this name."""
        return self.state.get(name) if isinstance(self.state, Mapping) else None


class Key(Rebuilt):
    """An object of a known class that is the key of a dictionary."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._compared == other._compared

    def __hash__(self) -> int:
        return hash(self._compared)

    @property
    def _compared(self) -> tuple[object, object]:
        return self.get("fqn"), self.get("offset")


class Unknown:
    """An object of any other class, of which nothing is kept."""

    def __init__(self, *arguments: object, **named: object) -> None:
        """Take whatever the class would."""

    def __call__(self, *arguments: object) -> Unknown:
        """Stand for the result of a method as well."""
        return Unknown()

    def __setitem__(self, key: object, value: object) -> None:
        """Keep nothing."""

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""

    def append(self, value: object) -> None:
        """Keep nothing."""

    extend = update = add = append


class Dictionary(dict[Any, Any]):
    """A dictionary of some class: what is in it, without its order or defaults."""

    def __init__(self, *arguments: object) -> None:
        items = arguments[0] if arguments and isinstance(arguments[0], dict | list | tuple) else ()
        super().__init__(items)

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of a torch file: the name of its record, and the dtype that its class says, if it says one."""

    record: str
    dtype: str | None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a torch file: where its elements lie, in elements of its dtype."""

    record: str
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Known = Mapping[tuple[str, str], Callable[..., object] | None]


def load(where: object, content: bytes, known: Known, *, others: bool = False) -> Any:
    """Return what a pickle describes, as plain data.

    Args:
        where: the file, for errors.
        content: the pickle.
        known: what stands for a class or function, by its module and name, besides torch's tensors and dtypes.
        others: take ``Unknown`` for all others; else they are refused.

    Raises:
        CheckpointError: it is damaged or forged, or names a class that is refused.
    """
    try:
        _check_instructions(content)
        return _Loader(content, known, others).load()
    except _RefusedError as error:
        raise CheckpointError(
            f"{where}: names {shortened(str(error), 120)}, which is no part of such a file. Nothing in it was run. "
            "The file is forged, or another version of the program wrote it."
        ) from error
    except Exception as error:  # a damaged or forged pickle makes the interpreter raise nearly anything
        why = shortened(str(error) if str(error).isprintable() else type(error).__name__, 120)
        raise CheckpointError(f"{where}: is no pickle that can be read ({why}). Nothing in it was run.") from error


class _RefusedError(Exception):
    """A class or function that no such file names."""


def _check_instructions(content: bytes) -> None:
    """Raise ValueError where an instruction is none that may stand in a pickle, or its argument isn't all there."""
    position = 0
    while True:
        run = RUN.match(content, position)
        assert run is not None  # it matches nothing as well
        if run.end() > position:
            position = run.end()
            continue
        code = content[position : position + 1]
        if code == STOP:
            return
        if code not in LENGTHS:
            raise ValueError(f"byte {position:,} is no instruction that is expected")
        begin = position + 1 + LENGTHS[code]
        position = begin + int.from_bytes(content[position + 1 : begin], "little")
        if position > len(content):
            raise ValueError("it is cut short")


class _Loader(pickle.Unpickler):
    """Python's interpreter of pickles, without its powers."""

    def __init__(self, content: bytes, known: Known, others: bool) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._known = known
        self._others = others

    def find_class(self, module: str, name: str) -> object:
        """Return what stands for a class or function; nothing is imported."""
        if (module, name) in TORCH:
            return TORCH[module, name]
        if module == "torch" and name in dtypes.BY_NAME:
            return name
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if (module, name) in self._known:
            return self._known[module, name]
        if self._others:
            return Unknown
        raise _RefusedError(ascii(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor lies in."""
        kind, dtype, record, _, _ = pid
        if kind != "storage" or not isinstance(record, str) or not (dtype is None or isinstance(dtype, str)):
            raise ValueError("a storage that is none")
        return Storage(record, dtype)


class Function:
    """What stands for a function: it is called with the arguments that were pickled, and has no state."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *arguments: object) -> object:
        """Return what stands for the function's result."""
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("a state for a function")


def _naturals(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _tensor(storage: object, start: object, shape: object, strides: object, *rest: object) -> StoredTensor:
    """Return a tensor as ``torch._utils._rebuild_tensor_v2`` is called for it, or ``_v3``, whose rest has a dtype."""
    dtype = storage.dtype if isinstance(storage, Storage) else None
    if dtype is None:
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else None
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without storage, shape or strides")
    if dtype is None or not _naturals(start, *shape, *strides) or len(shape) != len(strides) or len(shape) > 16:
        raise ValueError("a tensor without dtype, or whose shape and strides are none")
    assert isinstance(start, int)
    return StoredTensor(storage.record, dtype, start, shape, strides)


def _first(first: object, *others: object) -> object:
    """Return a parameter's tensor, or anything that is wrapped with more of it."""
    return first


def _of_type(rebuild: object, kind: object, arguments: object, state: object) -> object:
    """Return a tensor that has attributes of its own, without them, as ``_rebuild_from_type_v2`` is called for it."""
    return rebuild(*arguments) if isinstance(rebuild, Function) and isinstance(arguments, tuple) else Unknown()


TORCH: Known = {
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): Unknown,
    ("torch.storage", "UntypedStorage"): None,  # which has no dtype
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_of_type),
    ("collections", "OrderedDict"): Dictionary,
}
