"""Safetensors headers, mutated by chance: what we make of them beside what the format's own library does.

python -m tests.fuzz_headers 100000 7      (number of cases, seed)
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from mergekit_lite.checkpoint.formats.safetensors import read_header
from mergekit_lite.errors import CheckpointError

# Where we are stricter than the library, by the beginning of our reason, and why. In nothing are we laxer.
STRICTER = {
    r"tensor '.*': its header entry should hold dtype, shape and data_offsets": "the library passes over more keys; "
    "nobody writes them, and another reader may see another meaning in them",
    r"its header names .* twice": "the library lets the last one win, other readers the first",
    r"tensor '.*': shape .* is not a list of at most 16 sizes": "nothing has more than 16 dimensions, and a million of "
    "them keep a reader busy",
    r"a tensor's name .* is longer than 1000 characters or has unprintable ones": "names reach terminals and files",
    r"its header is not valid JSON \(-\d+ is a number below 0\)": "only in keys that the library passes over",
    r"__metadata__ in its header should map text to text": "null stands for no metadata there",
    r"tensor '.*': dtype '(F4|F6_E2M3|F6_E3M2|F8_E4M3FNUZ|F8_E5M2FNUZ)' is not supported": "not read here",
    r"tensor '.*': shape .* is empty, but its other sizes come to more": "the order of the sizes decides "
    "there, and torch can't make such a tensor",
}
CODES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "I64": 8,
         "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}  # fmt: skip
ODD_CODES = (*CODES, "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "f32", "", "X")
ODD_VALUES = (None, True, False, 0, -1, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, 10**30, 1.0,
              0.0, -0.0, 1e3, 1e400, float("nan"), float("inf"), "", "0", "a", [], [0], [[]], {}, {"a": 1}, "\ud800",
              "\x00", "a" * 1001)  # fmt: skip
ODD_NAMES = ("__metadata__", "", "a\nb", "a\x1b[31m", "\u202e", "a" * 1001, "\ud800", "__metadata__ ", "\u00a0")
ODD_SIZES = (2**32, 2**33, 2**62, 2**63 - 1, 3, 0)
Head = dict[str, Any]


def sound(chance: random.Random) -> tuple[Head, int]:
    """A header that is right, and the number of bytes that it describes."""
    head: Head = {"__metadata__": chance.choice([{"format": "pt"}, {}])} if chance.random() < 0.4 else {}
    end = 0
    for number in range(chance.randrange(5)):
        name = chance.choice([f"w.{number}", f"layers.{number}.weight", f"é{number}", f"x:{number}", f"a-0{number}"])
        code = chance.choice(list(CODES))
        shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
        begin = end
        end += CODES[code]
        for size in shape:
            end = begin + (end - begin) * size
        head[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    return head, end


def twist(chance: random.Random, head: Head) -> None:
    """Change one thing in a header."""
    name = chance.choice(list(head) or ["z"])
    entry = head.get(name)
    odd = chance.choice(ODD_VALUES)
    kind = chance.randrange(11)
    if kind == 0:
        head[name] = odd
    elif kind == 1:
        head[chance.choice(ODD_NAMES)] = odd if entry is None else entry
    elif kind == 2:
        head["__metadata__"] = chance.choice([{"a": odd}, {"\ud800": "a"}, odd, {"": ""}, {"a": "b"}])
    elif kind == 3:
        head[name + "2"] = dict(entry) if isinstance(entry, dict) else {}
    elif not isinstance(entry, dict) or "shape" not in entry:
        head[name] = {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    elif kind == 4:
        entry["dtype"] = chance.choice([*ODD_CODES, odd])
    elif kind == 5:
        entry.pop(chance.choice(list(entry)))
    elif kind == 6:
        entry[chance.choice(["extra", "dtype", "shape", "data_offsets", "dType"])] = odd
    elif kind == 7:
        entry["shape"] = chance.choice([{}, {"0": 1}, "1", None, [1.0], [True], ["1"], [[1]], [-0.0], [odd]])
    elif kind == 8:
        entry["shape"] = [chance.choice(ODD_SIZES) for _ in range(chance.randrange(1, 5))] + chance.choice([[], [0]])
    elif kind == 9 and isinstance(entry["shape"], list):
        entry["shape"] = entry["shape"] + [chance.choice([0, 1, 2])] * chance.choice([1, 2, 16, 17, 40])
    elif isinstance(entry.get("data_offsets"), list):
        step = chance.choice([-1, 1, 4])
        entry["data_offsets"] = [each + step if type(each) is int else odd for each in entry["data_offsets"]]


def written(chance: random.Random, head: Head) -> bytes:
    """A header as text, changed as text as well."""
    text = json.dumps(head, ensure_ascii=chance.random() < 0.5, separators=chance.choice([(",", ":"), None]))
    raw = text.encode("utf-8", "surrogatepass")
    place = chance.randrange(len(raw) + 1)
    match chance.randrange(12):
        case 0:
            return raw + chance.choice([b" " * 7, b"\x00", b"\n\n", b"\t", b"{}", b",", b"]", b"\x0c", b"\xa0"])
        case 1:
            return chance.choice([b" ", b"\xef\xbb\xbf", b"\n", b"\t", b"\x00", b"\x0b"]) + raw
        case 2:
            empty = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            more = [b'"__metadata__":{},', b'"__metadata__":{"a":"b","a":"c"},', b'"a":' + empty, b'"a":' + empty * 2]
            return raw[:1] + chance.choice(more) + raw[1:]
        case 3:
            return raw[:place] + bytes([chance.choice([chance.randrange(256), *b'",:[]{}0-.e'])]) + raw[place + 1 :]
        case 4:
            return raw[:place] + raw[place + chance.randrange(1, 6) :]
        case 5:
            spelled = (b"%s.0", b"%se0", b"0%s", b"+%s", b"-%s", b"NaN", b"Infinity", b"1" * 5000)
            spelling = chance.choice(spelled)
            number = re.compile(rb"(?<=[\[,:])\d+")
            return number.sub(lambda m: spelling.replace(b"%s", m[0]), raw, count=chance.randrange(1, 4))
    return raw


def case(chance: random.Random) -> bytes:
    """A file of safetensors, most of them wrong in a thing or two."""
    head, size = sound(chance)
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        twist(chance, head)
    raw = written(chance, head)
    length = len(raw)
    if chance.random() < 0.05:
        length = chance.choice([0, 1, length + 1, 2**31, 2**63, 2**64 - 1, 100_000_001, length // 2])
    content = length.to_bytes(8, "little") + raw + bytes(max(0, size + chance.choice([0] * 12 + [-1, 1, 7])))
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.02 else content


def reason_of(path: Path) -> str | None:
    """Why we refuse a file; None where we take it."""
    try:
        read_header(path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def library_takes(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def differences(cases: int, seed: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what is not as it should be: (what it is, the file)."""
    chance = random.Random(seed)
    path = folder / "x.safetensors"
    for _ in range(cases):
        content = case(chance)
        path.write_bytes(content)
        reason, taken = reason_of(path), library_takes(content)
        if reason is None and not taken:
            yield "taken, and the library refuses it", content
        elif reason is not None and taken and not any(re.match(known, reason) for known in STRICTER):
            yield f"refused for a reason that is not listed: {reason}", content


def main(cases: int, seed: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        kinds: Counter[str] = Counter()
        for what, content in differences(cases, seed, Path(folder)):
            kinds[re.sub(r"\d+|'.*?'", "…", what)[:100]] += 1
            if sum(kinds.values()) <= 20:
                print(f"{what[:300]}\n    {content[:300]!r}")
    print(f"{cases:,} cases, seed {seed}: {dict(kinds) or 'no difference but those that are meant'}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
