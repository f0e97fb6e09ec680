"""Files that mean harm, or are damaged. Each builder writes into a folder and returns the reference to open.

Compare https://github.com/huggingface/safetensors/tree/main/attacks.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

Builder = Callable[[Path], Path]
GOOD = save({"a": torch.ones(4), "b": torch.ones(2, 3)})


def safetensors(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header (text, bytes, or what JSON makes of it), whatever it says."""
    raw = (
        header
        if isinstance(header, bytes)
        else header.encode()
        if isinstance(header, str)
        else json.dumps(header).encode()
    )
    path = folder / "model.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: Any = (4,), begin: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


ENTRY = json.dumps(entry())
ENTRY_OF_A = json.dumps({"a": entry()})


def headers() -> dict[str, Builder]:
    """Safetensors files whose header lies."""

    def lies(header: object, size: int = 16, **options: Any) -> Builder:
        return lambda folder: safetensors(folder, header, bytes(size), **options)

    two = {"a": entry(), "b": entry(begin=16, end=32)}
    cases = {
        "length beyond the file": lies({"a": entry()}, length=10_000),
        "length of 2^64 - 1": lies({"a": entry()}, length=2**64 - 1),
        "length zero": lies({"a": entry()}, length=0),
        "overlap": lies(two | {"b": entry(begin=8, end=24)}, 24),
        "same bytes twice": lies({"a": entry(), "b": entry()}),
        "out of range": lies({"a": entry(begin=16, end=32)}),
        "reversed offsets": lies({"a": entry(begin=16, end=0)}),
        "hole": lies(two | {"b": entry(begin=20, end=36)}, 36),
        "hole at the beginning": lies({"a": entry(begin=4, end=20)}, 20),
        "data after the last tensor": lies({"a": entry()}, 17),
        "data without tensors": lies({}),
        "data cut short": lies(two, 31),
        "no data": lies({"a": entry()}, 0),
        "a name twice": lies(f'{{"a":{ENTRY},"a":{ENTRY}}}'),
        "a key twice": lies('{"a":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}}'),
        "negative offset": lies({"a": entry(begin=-16, end=0)}),
        "huge offsets": lies({"a": entry(begin=2**63, end=2**63 + 16)}),
        "endless offset": lies(ENTRY_OF_A.replace("16]", f"16{'0' * 4000}]")),
        "more digits than Python converts": lies(ENTRY_OF_A.replace("16]", f"16{'0' * 9000}]")),
        "float offset": lies({"a": entry(begin=0.0, end=16.0)}),
        "infinite offset": lies(ENTRY_OF_A.replace("16]", "1e999]")),
        "NaN offset": lies(ENTRY_OF_A.replace("16]", "NaN]")),
        "three offsets": lies({"a": entry() | {"data_offsets": [0, 8, 16]}}),
        "no offsets": lies({"a": {"dtype": "F32", "shape": [4]}}),
        "more keys": lies({"a": entry() | {"stride": [1]}}),
        "shape larger than the data": lies({"a": entry((5,))}),
        "shape smaller than the data": lies({"a": entry((3,))}),
        "negative shape": lies({"a": entry((-4,))}),
        "two negative sizes": lies({"a": entry((-2, -2))}),
        "boolean shape": lies({"a": entry((True, 4))}),
        "float shape": lies({"a": entry((4.0,))}),
        "text shape": lies({"a": entry("4")}),
        "nested shape": lies({"a": entry(([4],))}),
        "shape null": lies({"a": entry(None)}),
        "product beyond 64 bits": lies({"a": entry((2**32, 2**32, 2**32), 0, 2**63 - 1)}),
        "product that wraps to the right size": lies({"a": entry((2**62 + 1, 4))}),
        "endless product": lies({"a": entry((10**4000,) * 16)}),
        "endless shape": lies({"a": entry((1,) * 1_000_000)}),
        "dtype unknown": lies({"a": entry(dtype="F33")}),
        "dtype endless": lies({"a": entry(dtype="F" * 1_000_000)}),
        "dtype a list": lies({"a": entry(dtype=["F32"] * 100_000)}),
        "header a list": lies([entry()]),
        "header text": lies('"a"'),
        "header null": lies("null"),
        "header empty": lies(""),
        "header blank": lies("    "),
        "header cut": lies('{"a":{"dtype":"F32"'),
        "header no UTF-8": lies(b'{"\xff":1}'),
        "header UTF-16": lies(json.dumps({"a": entry()}).encode("utf-16")),
        "header with a mark of order": lies("\ufeff" + json.dumps({"a": entry()})),
        "header deep": lies("[" * 1_000_000),
        "entry deep": lies('{"a":' * 100_000),
        "entry a number": lies({"a": 4}),
        "entry null": lies({"a": None}),
        "metadata a list": lies({"a": entry(), "__metadata__": ["x"]}),
        "metadata with numbers": lies({"a": entry(), "__metadata__": {"x": 1}}),
        "name endless": lies({"a" * 1_000_000: entry()}),
        "name endless and twice": lies('{"NAME":1,"NAME":1}'.replace("NAME", "a" * 1_000_000)),
        "name with terminal codes": lies({"\x1b[2J\x1b]0;owned\x07": entry()}),
        "name with a new line": lies({"a\nERROR: all is lost": entry()}),
        "name with half a character": lies(f'{{"\\ud800":{ENTRY}}}'),
        "many tensors, each damaged": lies({f"layers.{n}.{'w' * 80}": entry((3,)) for n in range(100_000)}),
        "empty file": lambda folder: written(folder / "model.safetensors", b""),
        "seven bytes": lambda folder: written(folder / "model.safetensors", b"\1" * 7),
        "no safetensors at all": lambda folder: written(folder / "model.safetensors", b"<!DOCTYPE html><html>" * 10),
        "header over 100 MB": header_over_100_megabytes,
    }
    for size in (1, 8, 9, len(GOOD) // 2, len(GOOD) - 1):
        cases[f"cut at {size}"] = lambda folder, size=size: written(folder / "model.safetensors", GOOD[:size])
    return cases


def header_over_100_megabytes(folder: Path) -> Path:
    """Sparse on disk: the file is long enough for what its header claims."""
    path = folder / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 100_000_100)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def many_tensors(folder: Path, count: int = 100_000) -> Path:
    """A sound file with very many tensors."""
    header = {f"model.layers.{n}.mlp.weight": entry((1,), 4 * n, 4 * n + 4) for n in range(count)}
    return safetensors(folder, header, bytes(4 * count))


def folders() -> dict[str, Builder]:
    """Model folders whose index or links lead elsewhere. Each has a sound ``secret.safetensors`` beside the folder."""

    def index(target: object, name: str = "a") -> Builder:
        def build(folder: Path) -> Path:
            model, _ = beside_a_secret(folder)
            (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: target}}))
            return model

        return build

    def link(name: str, to: str) -> Builder:
        def build(folder: Path) -> Path:
            model, _ = beside_a_secret(folder)
            (model / name).symlink_to(to)
            return model

        return build

    def fifo(folder: Path) -> Path:
        model, _ = beside_a_secret(folder)
        os.mkfifo(model / "model.safetensors")
        return model

    def directory(folder: Path) -> Path:
        model, _ = beside_a_secret(folder)
        (model / "model.safetensors").mkdir()
        return model

    def linked_config(folder: Path) -> Path:
        model, _ = beside_a_secret(folder)
        (model / "model.safetensors").write_bytes(GOOD)
        (folder / "config.json").write_text("{}")
        (model / "config.json").symlink_to("../config.json")
        return model

    def endless_index(folder: Path) -> Path:
        model, _ = beside_a_secret(folder)
        path = model / "model.safetensors.index.json"
        path.touch()
        os.truncate(path, 200_000_000)
        return model

    return {
        "index to the parent": index("../secret.safetensors"),
        "index far out": index("../../../../../../etc/passwd"),
        "index to an absolute path": index("/etc/passwd.safetensors"),
        "index in disguise": index("./../secret.safetensors"),
        "index through a folder": index("sub/../../secret.safetensors"),
        "index with backslashes": index("..\\secret.safetensors"),
        "index with a zero": index("secret\0.safetensors"),
        "index with half a character": index("\ud800.safetensors"),
        "index with terminal codes": index("\x1b[2J.safetensors"),
        "index with an endless name": index("x" * 5000 + ".safetensors"),
        "index with a very long name": index("x" * 250 + ".safetensors"),
        "index to no weights": index("config.json"),
        "index to dots": index(".."),
        "index to nothing": index(""),
        "index to a number": index(3),
        "index to a list": index(["x"] * 10_000),
        "index to an object": index({"file": "secret.safetensors"}),
        "index with an endless tensor": index("../x.safetensors", "a" * 1_000_000),
        "index with many bad files": lambda folder: _many_bad(beside_a_secret(folder)[0]),
        "endless index": endless_index,
        "weights linked to the parent": link("model.safetensors", "../secret.safetensors"),
        "weights linked to a device": link("model.safetensors", "/dev/zero"),
        "weights linked in a circle": link("model.safetensors", "model.safetensors"),
        "weights linked to nothing": link("model.safetensors", "nothing"),
        "index linked to the parent": link("model.safetensors.index.json", "../secret.safetensors"),
        "unusual name linked to the parent": link("weights.pt", "../secret.safetensors"),
        "config linked to the parent": linked_config,
        "weights that are a pipe": fifo,
        "weights that are a folder": directory,
    }


def _many_bad(model: Path) -> Path:
    weight_map = {f"layers.{n}.{'w' * 100}": f"../{'x' * 300}{n}" for n in range(50_000)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def beside_a_secret(folder: Path) -> tuple[Path, Path]:
    """An empty model folder, and a sound weight file next to it that nothing in it may reach."""
    model = folder / "model"
    model.mkdir()
    return model, written(folder / "secret.safetensors", GOOD)


def hub_cache(folder: Path) -> Path:
    """A snapshot as the hub's cache lays it out: links into ``blobs``. Not hostile at all."""
    blobs = folder / "models--org--name" / "blobs"
    snapshot = folder / "models--org--name" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    written(blobs / "0123abcd", GOOD)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    return snapshot


class Runs:
    """Unpickles by calling a function, as an attacker's object does."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def pickles(touched: Path) -> dict[str, Builder]:
    """Torch files that call a function when a careless loader reads them; what they call would create ``touched``."""
    command = f"touch {touched}"
    evil = Runs(os.system, command)
    tensors = {"a": torch.ones(2)}

    def save_as(content: object, **options: Any) -> Builder:
        def build(folder: Path) -> Path:
            torch.save(content, folder / "x.pt", **options)
            return folder / "x.pt"

        return build

    def with_pickle(pickled: bytes) -> Builder:
        """A sound torch file with its pickle exchanged."""

        def build(folder: Path) -> Path:
            sound = io.BytesIO()
            torch.save(tensors, sound)
            with zipfile.ZipFile(sound) as source, zipfile.ZipFile(folder / "x.pt", "w") as forged:
                for record in source.infolist():
                    content = pickled if record.filename.endswith("data.pkl") else source.read(record)
                    forged.writestr(record.filename, content)
            return folder / "x.pt"

        return build

    def two_pickles(folder: Path) -> Path:
        """Two records of one name: which of them is read is up to the reader."""
        torch.save(tensors, folder / "x.pt")
        with zipfile.ZipFile(folder / "x.pt", "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr("x/data.pkl", pickle.dumps({"model": evil}, protocol=2))
        return folder / "x.pt"

    def disguised(folder: Path) -> Path:
        """A plain pickle with a zip at its end: zip readers see the zip, pickle readers the pickle."""
        sound = io.BytesIO()
        torch.save(tensors, sound)
        return written(folder / "x.pt", pickle.dumps(evil) + sound.getvalue())

    def bare(folder: Path) -> Path:
        return written(folder / "x.pt", pickle.dumps(evil))

    itself: dict[str, Any] = {}
    itself["model"] = itself
    deep: Any = ()
    for _ in range(50):
        deep = (deep, deep)
    return {
        "bare object": save_as(evil),
        "beside tensors": save_as(tensors | {"b": evil}),
        "nested": save_as({"model": tensors, "extra": {"deep": [1, {"er": (evil,)}]}}),
        "as a key": save_as({"model": tensors, evil: 1}),
        "eval": save_as({"model": tensors, "x": Runs(eval, f"__import__('os').system({command!r})")}),
        "legacy": save_as(evil, _use_new_zipfile_serialization=False),
        "newer protocol": save_as({"model": tensors, "x": evil}, pickle_protocol=4),
        "forged pickle": with_pickle(pickle.dumps({"model": evil}, protocol=2)),
        "forged pickle, newer protocol": with_pickle(pickle.dumps({"model": evil})),
        "no pickle": with_pickle(b""),
        "endless memory": with_pickle(pickle.dumps(Runs(bytearray, 10**14), protocol=2)),
        "itself": save_as(itself),
        "doubling": with_pickle(pickle.dumps({"model": deep}, protocol=2)),
        "two pickles": two_pickles,
        "disguised": disguised,
        "bare pickle": bare,
    }
