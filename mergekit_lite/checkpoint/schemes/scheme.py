"""What a scheme of quantised weights is: it recognises its tensors by names, dtypes, shapes and the config."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError

ORIGINAL = "Use the checkpoint that it was made from"


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's files hold and its config says, as the schemes look at it.

    Attributes:
        tensors: those that no scheme before has recognised, by name.
        config: ``config.json``; empty where there is none.
        reader: reads the few numbers that a scheme needs to know shapes.
    """

    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    reader: Reader = field(default_factory=Reader)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The section about quantisation of the config, or of its text model's config; empty where it has none."""
        known = [
            section.get(key) for section in self._sections for key in ("quantization_config", "compression_config")
        ]
        return next((section for section in known if isinstance(section, Mapping)), {})

    @property
    def method(self) -> str | None:
        """What that section calls the method, in lower case."""
        method = self.quantization.get("quant_method")
        return str(method).lower() if method else None

    @property
    def dtype(self) -> str | None:
        """The dtype of floats that the config names, or that of its text model."""
        named = [section.get(key) for section in self._sections for key in ("dtype", "torch_dtype")]
        known = [str(name).removeprefix("torch.") for name in named]
        return next((name for name in known if name in dtypes.FLOATS), None)

    @property
    def _sections(self) -> list[Mapping[str, Any]]:
        return [self.config, *(value for value in self.config.values() if isinstance(value, Mapping))]

    def without(self, names: Collection[str]) -> Stored:
        """Return the same without some tensors."""
        return replace(self, tensors={name: spec for name, spec in self.tensors.items() if name not in names})

    def content(self, spec: TensorSpec) -> bytes:
        """Return all bytes of a small tensor. Raises RunError where the file can't be read."""
        content = bytearray(spec.numel * dtypes.size(spec.dtype))
        spec.fill(self.reader, 0, memoryview(content))
        return bytes(content)

    def written_as(self, dtype: str) -> str | None:
        """Return the dtype that values of ``dtype`` take in an output: the config's, else bfloat16 for float32."""
        written = self.dtype or ("bfloat16" if dtype == "float32" else dtype)
        return None if written == dtype else written


class Quantised(NamedTuple):
    """One quantised tensor: the stored ones that it is made of, and what it stands for.

    Attributes:
        codes: the name of the tensor that holds its codes, in whose place it is shown.
        parts: what each of its other tensors is ("scale"), by name.
        shown: what it stands for; or what is wrong with it, as text.
    """

    codes: str
    parts: Mapping[str, str]
    shown: TensorSpec | str


Scheme = Callable[[Stored], Iterator[Quantised]]


def quantised(codes: str, parts: Mapping[str, str], show: Callable[[], TensorSpec]) -> Quantised:
    """Return a quantised tensor as ``show`` makes it, or with the message of the CheckpointError that it raises."""
    try:
        return Quantised(codes, parts, show())
    except CheckpointError as error:
        return Quantised(codes, parts, str(error))


def part(
    stored: Stored, codes: str, name: str, what: str, kinds: Collection[str], *shapes: tuple[int, ...]
) -> TensorSpec:
    """Return a part of a quantised tensor, of one of these dtypes and, if any are given, shapes.

    Raises CheckpointError where it is missing, or isn't as expected.
    """
    spec = stored.tensors.get(name)
    expected = " or ".join(kinds) + (f" of shape {' or '.join(map(str, dict.fromkeys(shapes)))}" if shapes else "")
    if spec is None:
        raise CheckpointError(
            f"{codes}: its {what} {name} is missing (expected {expected}). If it is in another file, name the folder."
        )
    if spec.dtype not in kinds or not spec.is_plain or (shapes and spec.shape not in shapes):
        raise CheckpointError(
            f"{codes}: its {what} {name} is {spec.dtype} of shape {spec.shape}, expected {expected}. {ORIGINAL}."
        )
    return spec
