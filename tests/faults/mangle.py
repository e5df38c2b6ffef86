"""Garbage of every kind, drawn by Hypothesis: random, cut, flipped, or well-formed and wrong inside."""

from __future__ import annotations

import copy
import gzip
import io
import json
import struct
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

DEEP = 20_000


@dataclass(frozen=True)
class Garbage:
    """What a file is replaced by.

    Args:
        how: in words, for the report.
        data: the bytes; None makes a folder of the file's name, or takes the file away.
    """

    how: str
    data: bytes | None

    def __repr__(self) -> str:
        head = b"" if self.data is None else self.data[:80]
        return f"Garbage({self.how}, {0 if self.data is None else len(self.data)} bytes, {head!r})"


NUMBERS: list[Any] = [
    0,
    -1,
    1,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    10**400,
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "1",
    "nan",
    "/",
    "../../x",
    "a\0b",
    "\ud800",
    "ä" * 300,
    "x" * 20_000,
    [],
    {},
    [[]],
    [None],
    [0] * 5000,
    {"": 0},
    {"a": {"b": []}},
    ["x"],
    [1, "x", None],
]
TOKENS = [
    "",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 400,
    "-1",
    "0",
    "x",
    '"',
    "'",
    "1,2",
    "\t",
    "\0",
    "ä",
    "[",
    "{}",
]


def known_bytes(valid: bytes) -> list[Garbage]:
    """What lies in place of files, by experience."""
    text = valid.decode("latin-1")
    fixed = {
        "nothing": b"",
        "zeros": b"\0" * 4096,
        "a Git LFS pointer": b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 12\n",
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "UTF-16": text.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + valid,
        "Latin-1": "é\xff".encode("latin-1") + valid,
        "gzip": gzip.compress(valid),
        "an empty zip": zipped({}),
        "a foreign zip": zipped({"a.txt": b"x"}),
        "a pickle of code": b"cposix\nsystem\n(S'false'\ntR.",
        "null": b"null",
        "a list": b"[]",
        "an object": b"{}",
        "a number": b"1e999",
        "text": b'"x"',
        "deep lists": b"[" * DEEP + b"]" * DEEP,
        "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "one long line": b"a" * 3_000_000,
        "twice": valid + valid,
        "Windows lines": valid.replace(b"\n", b"\r\n"),
        "a long number": b"9" * 5000,
    }
    made = [Garbage(how, data) for how, data in fixed.items()]
    return [*made, Garbage("a folder", None), Garbage("not there", None)]


def whole_bytes(valid: bytes) -> st.SearchStrategy[Garbage]:
    """Bytes that have little or nothing to do with the format."""
    drawn = st.binary(max_size=400).map(lambda data: Garbage("random bytes", data))
    return st.one_of(st.sampled_from(known_bytes(valid)), drawn, cut(valid), flipped(valid), spliced(valid))


def cut(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A beginning or an end of the file."""
    place = st.integers(0, max(len(valid) - 1, 0))
    return st.one_of(
        place.map(lambda at: Garbage(f"cut at byte {at}", valid[:at])),
        place.map(lambda at: Garbage(f"without the first {at} bytes", valid[at:])),
    )


def flipped(valid: bytes) -> st.SearchStrategy[Garbage]:
    """Some bytes changed, most often near the beginning, where formats keep their headers."""
    near, far = st.integers(0, min(255, max(len(valid) - 1, 0))), st.integers(0, max(len(valid) - 1, 0))

    def flip(changes: list[tuple[int, int]]) -> Garbage:
        data = bytearray(valid)
        for place, value in changes:
            if data:
                data[place] = value
        return Garbage(f"bytes changed at {[place for place, _ in changes]}", bytes(data))

    return st.lists(st.tuples(st.one_of(near, far), st.integers(0, 255)), min_size=1, max_size=6).map(flip)


def spliced(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A piece put in, or taken out."""
    place, size = st.integers(0, len(valid)), st.integers(1, 64)
    return st.one_of(
        st.builds(
            lambda at, piece: Garbage(f"{piece[:20]!r} put in at {at}", valid[:at] + piece + valid[at:]),
            place,
            st.binary(min_size=1, max_size=20),
        ),
        st.builds(
            lambda at, n: Garbage(f"{n} bytes lost at {at}", valid[:at] + valid[at + n :]), place, size
        ),
    )


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [here]
    if isinstance(value, dict):
        for key, entry in value.items():
            found += _places(entry, (*here, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value[:50]):
            found += _places(entry, (*here, index))
    return found


def _changed(document: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None], new: Any) -> Any:
    if not place:
        return new
    made = copy.deepcopy(document)
    parent = made
    for key in place[:-1]:
        parent = parent[key]
    change(parent, place[-1])
    return made


def document(valid: Any, values: list[Any] | None = None) -> st.SearchStrategy[tuple[str, Any]]:
    """A document of plain values with one or two things in it changed.

    Args:
        valid: nested dictionaries, lists and scalars.
        values: what takes the place of an entry.

    Returns:
        Words and document.
    """
    wrong = st.sampled_from(NUMBERS + OTHERS if values is None else values)

    def once(found: tuple[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
        words, inside = found
        # The top is an entry of its own: without weight it would be drawn as often as every leaf.
        places = st.sampled_from(_places(inside))

        def replace(place: tuple[Any, ...], value: Any) -> tuple[str, Any]:
            def put(parent: Any, key: Any) -> None:
                parent[key] = value

            return f"{words}{list(place)} = {str(value)[:30]!r}; ", _changed(inside, place, put, value)

        def remove(place: tuple[Any, ...]) -> tuple[str, Any]:
            def take(parent: Any, key: Any) -> None:
                del parent[key]

            return f"{words}without {list(place)}; ", _changed(inside, place, take, inside)

        def add(place: tuple[Any, ...], value: Any) -> tuple[str, Any]:
            def put(parent: Any, key: Any) -> None:
                if isinstance(parent, dict):
                    parent["not known"] = value
                else:
                    parent.extend([value, *parent])

            return f"{words}more beside {list(place)}; ", _changed(inside, place, put, inside)

        return st.one_of(
            st.builds(replace, places, wrong),
            st.builds(replace, places, wrong),
            st.builds(remove, places),
            st.builds(add, places, wrong),
        )

    first = once(("", valid))
    return st.one_of(first, first.flatmap(once))


def as_json(value: Any) -> bytes:
    """JSON, with what only Python's writer takes: NaN, numbers of any length, lone surrogates."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """JSON with wrong things inside."""
    made = document(json.loads(valid)).map(lambda found: Garbage(found[0], as_json(found[1])))
    return st.one_of(made, made, made, whole_bytes(valid))


def json_lines(valid: bytes) -> st.SearchStrategy[Garbage]:
    """JSON Lines with wrong things in a line."""
    lines = valid.splitlines()
    place = st.integers(0, len(lines) - 1)

    def put(at: int, line: bytes, how: str) -> Garbage:
        return Garbage(f"line {at + 1}: {how}", b"\n".join([*lines[:at], line, *lines[at + 1 :]]) + b"\n")

    def wrong(at: int) -> st.SearchStrategy[Garbage]:
        made = document(json.loads(lines[at])).map(lambda found: put(at, as_json(found[1]), found[0]))
        return st.one_of(made, made, whole_bytes(lines[at]).map(lambda g: put(at, g.data or b"", g.how)))

    made = place.flatmap(wrong)
    return st.one_of(made, made, made, whole_bytes(valid))


def toml_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """TOML with wrong things inside."""
    import tomli_w

    values = [value for value in NUMBERS + OTHERS if value is not None and value != [None]]
    values = [value for value in values if value != [1, "x", None] and value not in ("\ud800", 10**400)]
    found = document(tomllib.loads(valid.decode()), values)

    def write(made: tuple[str, Any]) -> Garbage:
        words, value = made
        return Garbage(words, tomli_w.dumps(value if isinstance(value, dict) else {"x": value}).encode())

    return st.one_of(found.map(write), found.map(write), whole_bytes(valid))


def yaml_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """YAML with wrong things inside, and what only YAML can do."""
    import yaml

    text = valid.decode()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    specials = {
        "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "code": "a: !!python/object/apply:os.getcwd []\n" + body,
        "itself": "a: &a [*a]\n",
        "an unknown tag": "a: !thing 3\n" + body,
        "no anchor": "a: *b\n" + body,
        "tabs": body.replace("  ", "\t"),
        "two documents": body + "\n---\n" + body,
        "a date": "a: 2026-01-01\n" + body,
    }
    known = st.sampled_from([Garbage(how, text.encode()) for how, text in specials.items()])
    try:
        plain = yaml.safe_load(body.replace("!!opencv-matrix", ""))
    except yaml.YAMLError:
        return st.one_of(known, whole_bytes(valid), fields(valid))
    values = [value for value in NUMBERS + OTHERS if value not in ("\ud800", "a\0b")]
    made = document(plain, values).map(
        lambda f: Garbage(f[0], yaml.safe_dump(f[1], allow_unicode=True).encode())
    )
    return st.one_of(made, made, known, whole_bytes(valid))


def fields(valid: bytes) -> st.SearchStrategy[Garbage]:
    """Lines of fields (CSV, TSV, numbers) with fields replaced, lines lost, doubled and torn."""
    lines = valid.decode("utf-8", "replace").splitlines() or [""]
    place = st.integers(0, len(lines) - 1)

    def put(at: int, column: int, token: str) -> Garbage:
        line = lines[at]
        mark = next((mark for mark in ("\t", ",", ";", " ") if mark in line), ",")
        parts = line.split(mark)
        parts[column % len(parts)] = token
        made = [*lines[:at], mark.join(parts), *lines[at + 1 :]]
        return Garbage(
            f"line {at + 1}, field {column % len(parts)}: {token[:20]!r}", "\n".join(made).encode()
        )

    def drop(at: int) -> Garbage:
        return Garbage(f"without line {at + 1}", "\n".join([*lines[:at], *lines[at + 1 :]]).encode())

    def double(at: int) -> Garbage:
        return Garbage(
            f"line {at + 1} twice", "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]).encode()
        )

    replaced = st.builds(put, place, st.integers(0, 40), st.sampled_from(TOKENS))
    return st.one_of(
        replaced, replaced, replaced, st.builds(drop, place), st.builds(double, place), whole_bytes(valid)
    )


def safetensors_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A safetensors file with a wrong header, or with other numbers behind a right one."""
    length = struct.unpack("<Q", valid[:8])[0]
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def build(head: Any, body: bytes) -> bytes:
        text = as_json(head)
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body

    few = {name: header[name] for name in ["__metadata__", *names[:3], *names[-2:]] if name in header}

    def merged(found: tuple[str, Any]) -> Garbage:
        words, part = found
        if not isinstance(part, dict):
            return Garbage(words, build(part, data))
        head = {name: entry for name, entry in header.items() if name not in few or name in part} | part
        return Garbage(words, build(head, data))

    filled = {
        "NaN everywhere": b"\xff" * len(data),
        "zeros everywhere": b"\0" * len(data),
        "large numbers": (b"\x7f\x7f\x7f\x7f" * (len(data) // 4 + 1))[: len(data)],
    }
    known = [Garbage(how, build(header, body)) for how, body in filled.items()]
    if names:
        known.append(Garbage("no tensor", build({"__metadata__": header.get("__metadata__", {})}, b"")))
        one = header[names[0]]["data_offsets"]
        alone = {names[0]: {**header[names[0]], "data_offsets": [0, one[1] - one[0]]}}
        known.append(Garbage("one tensor", build(alone, data[one[0] : one[1]])))
    known.append(Garbage("a long header", struct.pack("<Q", 2**62) + valid[8:]))
    changed = document(few).map(merged)
    return st.one_of(changed, changed, st.sampled_from(known), whole_bytes(valid))
