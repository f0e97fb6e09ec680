"""Schema of a manifest that is read back. Until it is checked it may be damaged or forged."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mergekit_lite.checkpoint.folder import MAX_FILE_NAME, is_weight_name
from mergekit_lite.checkpoint.parts import FOLDER
from mergekit_lite.errors import CheckpointError, MergekitLiteError, listing
from mergekit_lite.input_files import json_object, read_bytes
from mergekit_lite.output.manifest import SEAL, seal, text_of
from mergekit_lite.output.workspace import manifest_path
from mergekit_lite.plain_text import is_plain_line

DIGEST = 32  # hexadecimal digits
MAX_TEXT = 1000  # characters of a name or path
MAX_SIZE = 2**63 - 1


def _printable(text: str) -> str:
    if len(text) > MAX_TEXT or not is_plain_line(text):
        raise ValueError(f"should be at most {MAX_TEXT:,} printable characters")
    return text


def _weight_path(path: str) -> str:
    folder, _, name = path.rpartition("/")
    if not is_weight_name(name) or not (path == name or FOLDER.fullmatch(folder)):
        raise ValueError("should be the name of a file of weights, in no folder but that of a part of the model")
    return path


def _file_name(name: str) -> str:
    if any(len(part.encode()) > MAX_FILE_NAME for part in _printable(name).split("/")):
        raise ValueError(f"should be the name of a file, of at most {MAX_FILE_NAME} bytes")
    return name


def _distinct(files: list[RecordedFile]) -> list[RecordedFile]:
    if len({file.name for file in files}) < len(files):
        raise ValueError("should name each file once")
    return files


ShortText = Annotated[str, AfterValidator(_printable)]
Digest = Annotated[str, Field(pattern=f"^[0-9a-f]{{{DIGEST}}}$")]
DigestChain = Annotated[str, Field(pattern=f"^([0-9a-f]{{{DIGEST}}})+$")]  # one after the other
Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]


class _Recorded(BaseModel):
    """Part of a manifest: no value is converted, none is changed, unknown keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class RecordedInputFile(_Recorded):
    """One file of weights of an input."""

    name: ShortText
    size: Size
    header_xxh3_128: Digest
    etag: ShortText = ""  # of a file that was read by range from elsewhere


class RecordedAddend(_Recorded):
    """An adapter or a task vector that was added to an input."""

    reference: ShortText
    revision: ShortText | None
    scale: float
    rebase: bool


class RecordedInput(_Recorded):
    """One input model."""

    reference: ShortText
    revision: ShortText | None
    base: ShortText | None = None
    added: list[RecordedAddend] = []
    files: list[RecordedInputFile]
    made_of: list[RecordedInput] = []  # of a document's result: the models that it is made of
    made_while_read: list[ShortText] = []  # then, the documents whose results were made while they were read


class RecordedFile(_Recorded):
    """One file of weights of the output; the digest is of its bytes around the tensors."""

    name: Annotated[str, AfterValidator(_weight_path)]
    size: Size
    frame_xxh3_128: Digest


class RecordedSpans(_Recorded):
    """Digests of a tensor's spans, in the output and in each input."""

    output: DigestChain
    inputs: list[Annotated[str, Field(pattern=f"^([0-9a-f]{{{DIGEST}}})*$")]]


class RecordedTensor(_Recorded):
    """Digests of one tensor; ``merged`` elements if the rest was copied."""

    output: Digest
    inputs: list[Digest]
    spans: RecordedSpans | None = None
    merged: Size | None = None


class Manifest(_Recorded):
    """The part of a manifest that verification needs."""

    version: ShortText
    torch: ShortText
    device: Literal["cpu", "cuda"] = "cpu"
    plan: Digest
    recipe: dict[str, Any]
    seed: int
    shard_size: Annotated[int, Field(gt=0, le=MAX_SIZE)] | None
    copy_code: bool = False
    inputs: list[RecordedInput]
    files: Annotated[list[RecordedFile], Field(min_length=1), AfterValidator(_distinct)]
    beside: dict[Annotated[str, AfterValidator(_file_name)], Digest]
    tensors: dict[ShortText, RecordedTensor]
    effect: dict[str, Any]

    @cached_property
    def models(self) -> list[RecordedInput]:
        """The inputs; instead of documents' results the models that those are made of."""
        models = [model for source in self.inputs for model in (source.made_of or [source])]
        return list({model.reference: model for model in models}.values())

    @property
    def references(self) -> list[str]:
        """References of the models."""
        return [source.reference for source in self.models]

    @property
    def fused(self) -> set[str]:
        """The documents whose results were made while they were read."""
        return {name for source in self.inputs for name in source.made_while_read}


def read_manifest(output: Path) -> tuple[Manifest, bool]:
    """Read the manifest of an output.

    Returns:
        The manifest; and True if it is as it was written, to the byte and by its own digest.

    Raises:
        MergekitLiteError: there is no manifest, or it can't be used; every problem is named.
    """
    path = manifest_path(output)
    if not path.exists():
        raise CheckpointError(
            f"{path}: is missing. Without it nothing is known of how {output.name} was made: it is not an output of "
            "mergekit_lite, or the manifest was lost. Make it again."
        )
    written = read_bytes(path)
    content = json_object(path, written)
    if "tuned" in content:
        raise MergekitLiteError(
            f"{path}: is of vector extract, whose outputs verify can't make again. What holds the vector to the models "
            "is to apply it to its base and compare: vector apply BASE VECTOR -o OUT, then compare TUNED OUT."
        )
    if "combines" in content or "intruders_of" in content:
        raise MergekitLiteError(
            f"{path}: is of an adapter, which verify can't make again. The command that made it, with --resume, "
            "holds its bytes to this manifest: it leaves them as they are, or says that they are not its result."
        )
    try:
        as_written = written == text_of(content).encode()
        return Manifest.model_validate(content), as_written and content.get(SEAL) == seal(content)
    except ValidationError as wrong:
        errors = wrong.errors(include_url=False, include_input=False)
        problems = [f"{'.'.join(map(_shown, error['loc']))}: {error['msg']}" for error in errors]
    raise MergekitLiteError(
        listing(f"{path}: is damaged, forged, or of a version before this check; make the output again", problems)
    )


def _shown(part: object) -> str:
    """Return part of a key's path as text that is short and safe to print."""
    text = str(part)
    return text if is_plain_line(text) and len(text) < 200 else ascii(text[:80])
