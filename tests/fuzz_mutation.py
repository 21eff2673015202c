"""Files made wrong: bytes, lines, values of JSON, and headers of safetensors, changed by chance."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

WORDS = [
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b"\xed\xa0\x80", b"\n", b"\r\n", b"\t"),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b":",
        b",",
        b"-",
        b"#",
        b"&a",
        b"*a",
        b"!!x",
        b"{{",
        b"{%",
    ),
    *(b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"-0.0", b"9" * 400, b"1" * 30),
    *(b"\\ud800", b"\\u0000", b"../../x", b"/etc/passwd", b"\x1b[31m", b"\xe2\x80\xae", b"=" * 300),
    *(b"[" * 200, b'{"a":' * 200, b"%s%n", b"${HOME}", b"~", b"| a |", b"---\n", b"...\n", b"? "),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, "", "a", "0", "1e999", "auto", "none", "\0"),
    *(
        "\ud800",
        "\u202e",
        "a" * 5000,
        "../../x",
        "/etc/passwd",
        "{{ 1 }}",
        "\x1b[31m",
        "cpu",
        "nan",
    ),
    *([], {}, [None], [[]], {"a": None}, {"": 1}, [1, "a"], [0] * 50, {"number": "NaN"}, [[[[]]]]),
    {"number": []},
]


def bytes_changed(whole: bytes, rng: Random, begin: int = 0) -> bytes:
    """``whole`` with one to four changes behind ``begin``."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randint(min(begin, len(data)), len(data))
        end = min(len(data), at + rng.choice([1, 2, 8, 64, 1024]))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice([1, 2, 20])
            case 4:
                data[at:at] = rng.choice(WORDS)
            case 5:
                data[at : at + 8] = struct.pack(
                    "<Q", rng.choice([0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1, len(data)])
                )
            case 6:
                del data[at:]
            case _:
                other = rng.randint(0, len(data))
                data[at:end] = data[other : other + end - at]
    return bytes(data)


def lines_changed(whole: bytes, rng: Random) -> bytes:
    """Lines left out, doubled, exchanged, or put together."""
    lines = whole.splitlines(keepends=True) or [b""]
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = lines[at].rstrip(b"\r\n")
        case _:
            lines[at] = rng.choice([b"  ", b"\t", b"- ", b"# "]) + lines[at]
    return b"".join(lines)


def value_changed(value: Any, rng: Random) -> Any:
    """A value of JSON with one to three of the values in it changed, left out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(["", "a", "__class__", "path", key + "x"])] = holder[key]
            case 2 if isinstance(holder, list):
                holder.extend([holder[key]] * rng.choice([1, 10]))
            case 3:
                other, name = rng.choice(places)
                # One of the places may lie in what was changed.
                holder[key] = copy.deepcopy(other[name]) if name in _keys(other) else None
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        for key in _keys(value):
            yield value, key
            yield from _places(value[key])


def json_changed(whole: bytes, rng: Random) -> bytes:
    """A JSON text, changed as values or as bytes."""
    if rng.random() < 0.3:
        return bytes_changed(whole, rng)
    return json.dumps(value_changed(json.loads(whole), rng)).encode()


def jsonl_changed(whole: bytes, rng: Random) -> bytes:
    """A text of JSON lines: one of them changed, or lines, or bytes."""
    if rng.random() < 0.4:
        return rng.choice([bytes_changed, lines_changed])(whole, rng)
    lines = whole.splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(lines))
        try:
            lines[at] = json.dumps(value_changed(json.loads(lines[at]), rng)).encode()
        except ValueError:
            continue
    return b"\n".join(lines) + b"\n"


def text_changed(whole: bytes, rng: Random) -> bytes:
    return rng.choice([bytes_changed, bytes_changed, lines_changed])(whole, rng)


def safetensors_changed(whole: bytes, rng: Random) -> bytes:
    """The header changed as JSON, with its length made right again; or bytes of it."""
    [length] = struct.unpack("<Q", whole[:8])
    if rng.random() < 0.3:
        changed = bytes_changed(whole[: 8 + length], rng)
        return changed + whole[8 + length :]
    if rng.random() < 0.1:
        return bytes_changed(whole, rng)
    header = json.dumps(value_changed(json.loads(whole[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]
