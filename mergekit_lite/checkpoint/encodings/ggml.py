"""Tensors in the block formats of ggml (``Q4_K``, ``Q8_0`` …), dequantised by the ``gguf`` package of llama.cpp.

A block is a fixed number of bytes for a fixed number of elements of a row; rows are whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from types import ModuleType

from mergekit_lite.checkpoint.encodings.pieces import pieces
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import Block, Encoding, TensorSpec
from mergekit_lite.deferred import np, torch
from mergekit_lite.errors import CheckpointError

TOGETHER = 1 << 17  # elements dequantised at a time: the package takes some forty bytes of memory for each


@dataclass(frozen=True, slots=True)
class GgmlBlocks(Encoding):
    """Blocks of ``elements`` elements in ``nbytes`` bytes each; the values are float32."""

    type: str  # ggml's name of the format
    elements: int
    nbytes: int
    rows: tuple[int, ...] = ()  # which rows of the stored matrix the tensor's are, where it has not just them

    def fill(self, spec: TensorSpec, reader: Reader, start: int, out: memoryview) -> None:
        """Read whole blocks, and dequantise them."""
        for begin, piece in pieces(start, out, spec.dtype):
            for done in range(0, piece.numel(), TOGETHER):
                part = piece[done : done + TOGETHER]
                self._fill_part(spec, reader, begin + done, part)

    def stored_dtype(self, spec: TensorSpec) -> str:
        """Return ggml's name of the format."""
        return self.type

    def stored_bytes(self, spec: TensorSpec, count: int) -> int:
        """Return the bytes of as many blocks as ``count`` elements take."""
        return -(-count // self.elements) * self.nbytes

    @property
    def block(self) -> Block:
        """The block, as one of a single row."""
        return 1, self.elements

    @property
    def key(self) -> tuple[object, ...]:
        """The format, and the rows."""
        return (self.type, self.rows) if self.rows else (self.type,)

    def _fill_part(self, spec: TensorSpec, reader: Reader, start: int, out: torch.Tensor) -> None:
        first, last = start // self.elements, -(-(start + out.numel()) // self.elements)
        stored = np.empty((1, (last - first) * self.nbytes), dtype=np.uint8)
        self._fill_blocks(spec, reader, first, stored.data.cast("B"))
        library = gguf_library()
        # Codes that a damaged file holds may be NaN or too large: that is for those who look at values to say.
        with np.errstate(all="ignore"):
            values = library.dequantize(stored, library.GGMLQuantizationType[self.type])
        skipped = start - first * self.elements
        out.copy_(torch.from_numpy(values).view(-1)[skipped : skipped + out.numel()])

    def _fill_blocks(self, spec: TensorSpec, reader: Reader, first: int, out: memoryview) -> None:
        """Read stored blocks from number ``first`` on: those of single rows by one call, in the file's order."""
        if not self.rows:
            reader.fill(spec.file, spec.offset + first * self.nbytes, out, spec.name)
            return
        row = spec.shape[-1] // self.elements  # blocks
        parts: list[tuple[int, memoryview]] = []
        while out:
            number, skipped = divmod(first, row)
            count = min(row - skipped, len(out) // self.nbytes)
            parts.append((spec.offset + (self.rows[number] * row + skipped) * self.nbytes, out[: count * self.nbytes]))
            first, out = first + count, out[count * self.nbytes :]
        reader.fill_parts(spec.file, sorted(parts, key=itemgetter(0)), spec.name)


def gguf_library() -> ModuleType:
    """Return the ``gguf`` package. Raises CheckpointError where it isn't installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "GGUF files are read by the gguf package, which isn't installed: pip install 'mergekit-lite[gguf]'"
        ) from error
    library: ModuleType = gguf
    return library
