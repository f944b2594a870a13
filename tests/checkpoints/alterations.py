"""How a file can be altered, byte by byte and where its structure is; an alteration is a script of numbers, which
hypothesis and atheris can draw, shrink and repeat.
"""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

Script = Sequence[tuple[int, int, int]]
"""Steps (what, where, value), each from 0 to 2³² − 1."""

BYTE_STEPS = 12
NUMBERS = (0, 1, 2, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**64 - 1)
# What a stranger may write where a number, a name or a list belongs.
HOSTILE: tuple[Any, ...] = (
    *NUMBERS, 2**64, 10**40, -1, -(2**63), 0.5, 1e400, float("nan"), True, False, None, "", "x", "1", "..", ".",
    "../../beside", "/tmp/beside", "a/../../beside", "C:\\beside", "\\\\beside", "a\0b", "é\u202e\U0001f600", "\ud800",
    "x" * 5000, [], {}, [[]], [0], [-1], [1, 2], [2**40], [2**31, 2**31], [2**62, 4], [0, 2**62], [1] * 70, [0.5],
    [None], [[0, 1, 1, 1]], [[0, 2**40, 1, 1]], [[0, 1, 2**40, 2]], [[0, 1, 1, 2**40]], [[-1, 1, 1, 1]],
    [[0, 1, -1, 2]], [[0, 1, 1]], [[0, 1, 1, 1], [0, 1, 1, 1]], {"x": 1}, {"kind": "whole", "shape": [2**40]},
    "whole", "rows", "columns", "elements", "all_but", "gap1", "gap8", "gap14", "gap32", "gap33", "update",
    "gradient", "bf16", "fp16", "int8", "exact", "F32", "F16", "BF16", "F64", "I64", "U8", "F4", "BOOL", "C64",
    "float32", "bfloat16",
)  # fmt: skip
AGAIN = "\0again"  # at the end of a key: when it is written the key is there twice
DEEP = 100_000  # nested lists, more than any parser's stack


def altered(data: bytes, script: Script) -> bytes:
    """Bytes after the steps of a script."""
    raw = bytearray(data)
    for what, where, value in script:
        at = where % (len(raw) + 1)
        length = 1 + (value >> 8) % 16
        here = slice(at, at + length)
        match what % BYTE_STEPS:
            case 0 if at < len(raw):
                raw[at] ^= 1 << value % 8
            case 1 if at < len(raw):
                raw[at] = value % 256
            case 2:
                raw[at:at] = value.to_bytes(8, "little")[: value % 8]
            case 3:
                del raw[here]
            case 4:
                raw[at:at] = raw[here]
            case 5:
                del raw[at:]
            case 6:
                raw += bytes([value % 256]) * length
            case 7:
                raw[here] = bytes(len(raw[here]))
            case 8:
                raw[at : at + 8] = struct.pack("<Q", NUMBERS[value % len(NUMBERS)])[: len(raw) - at]
            case 9:
                raw[at : at + 4] = struct.pack("<I", value)[: len(raw) - at]
            case 10:
                source = value % (len(raw) + 1)
                raw[here] = raw[source : source + len(raw[here])]
            case 11 if at < len(raw):
                raw[at] = (raw[at] + (1 if value % 2 else 255)) % 256
    return bytes(raw)


def altered_json(value: Any, script: Script) -> Any:
    """What JSON holds after the steps of a script: places are taken in the order in which they stand."""
    root = {"": copy.deepcopy(value)}
    for what, where, number in script:
        places = list(_places(root))
        parent, key = places[where % len(places)]
        old = parent[key]
        match what % 8:
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(HOSTILE[number % len(HOSTILE)])
            case 3:
                other, name = places[number % len(places)]
                parent[key] = copy.deepcopy(other[name])
            case 4 if isinstance(old, int | float):
                parent[key] = (old + 1, old - 1, -old, old * 2, old + 8, old // 2, float(old))[number % 7]
            case 5 if parent is not root:
                if isinstance(parent, dict):
                    del parent[key]
                else:
                    parent.pop(key)
            case 6 if isinstance(parent, dict) and parent is not root:
                name = HOSTILE[number % len(HOSTILE)]
                parent[(key + AGAIN) if number % 3 == 0 else name if isinstance(name, str) else key + "x"] = old
                if number % 2:
                    parent[key] = copy.deepcopy(HOSTILE[(number >> 8) % len(HOSTILE)])
            case 7:
                other, name = places[number % len(places)]
                parent[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(old)
    return root[""]


def _places(tree: Any) -> Any:
    """(container, key) of every value, from the outermost in."""
    for key in list(tree if isinstance(tree, dict) else range(len(tree))):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def written(value: Any, script: Script) -> bytes:
    """JSON as a stranger may write it: keys twice, NaN, lone surrogates, nested to no end."""
    text = json.dumps(value, indent=2 if script and script[0][1] % 2 else None)
    text = text.replace("\\u0000again", "")
    if script and script[0][0] % 64 == 63:
        text = text.replace(": ", ": " + "[" * DEEP, 1) if script[0][2] % 2 else "[" * DEEP
    return text.encode()


def altered_tensors(data: bytes, script: Script, nested: Sequence[str] = ()) -> bytes:
    """A safetensors file after the steps of a script, most of them in its header, whose length then is right again.

    Args:
        data: The file.
        script: The steps; each says by its number whether it is in the header or anywhere.
        nested: Metadata that are JSON themselves, and altered as such.
    """
    in_header, anywhere = _split(script)
    if in_header:
        (size,) = struct.unpack_from("<Q", data)
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        metadata = header.get("__metadata__", {})
        for name in nested:
            metadata[name] = json.loads(metadata[name])
        header = altered_json(header, in_header)
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        if isinstance(metadata, dict):
            for name in nested:
                if name in metadata and not isinstance(metadata[name], str):
                    metadata[name] = written(metadata[name], in_header).decode()
        text = written(header, ())
        text += b" " * (-len(text) % 8)
        data = struct.pack("<Q", len(text)) + text + body
    return altered(data, anywhere)


def _split(script: Script) -> tuple[Script, Script]:
    """(steps in the structure, steps anywhere)."""
    return [(a >> 1, b, c) for a, b, c in script if a % 2], [(a >> 1, b, c) for a, b, c in script if not a % 2]


def altered_text(value: Any, script: Script) -> bytes:
    """A JSON file after the steps of a script, in what it holds and in its bytes."""
    in_structure, anywhere = _split(script)
    return altered(written(altered_json(value, in_structure), in_structure), anywhere)


def signed(data: bytes) -> bytes:
    """An exact difference with the checksums that its content has, as a stranger would write them; or as it is."""
    try:
        (size,) = struct.unpack_from("<Q", data)
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        about = json.loads(header["__metadata__"]["about"])
        about["checksums"] = {
            name: zlib.crc32(body[slice(*one["data_offsets"])]) for name, one in header.items() if name[0] != "_"
        }
        header["__metadata__"]["about"] = json.dumps(about)
        header["__metadata__"]["checksum"] = str(zlib.crc32(header["__metadata__"]["about"].encode()))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error, RecursionError):
        return data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body
