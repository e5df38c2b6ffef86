"""Every single change of a file that is a document, one after the other: what drawing at random may miss."""

from __future__ import annotations

import copy
import json
import struct
import tomllib
from collections.abc import Iterator
from typing import Any

from faults.mangle import TOKENS, Garbage, as_json, known_bytes

FEW = 24
"""Of a longer dictionary only some names are changed, of a list the first entry: the others are alike."""
VALUES: list[Any] = [
    *(-1, 0, 0.5, 1e-320, 1e308, float("nan"), 2**31, 2**63),
    *(None, True, "", "1", "../../x", "a\0b", "\ud800", "ä" * 300),
    *([], {}, [[]]),
]
"""One of each sort of what :mod:`faults.mangle` draws."""


def every(kind: str, valid: bytes) -> Iterator[Garbage]:
    """All that is known to be wrong in place of a file, then each place of its document with each value.

    Args:
        kind: of :data:`faults.garbage.KINDS`; those that are no documents give the first alone.
        valid: the file.
    """
    yield from known_bytes(valid)
    if kind == "json":
        for how, made in changes(json.loads(valid), VALUES):
            yield Garbage(how, as_json(made))
    elif kind == "json lines":
        yield from _lines(valid)
    elif kind == "toml":
        import tomli_w

        for how, made in changes(
            tomllib.loads(valid.decode()),
            [value for value in VALUES if value not in (None, "\ud800")],
        ):
            yield Garbage(how, tomli_w.dumps(made if isinstance(made, dict) else {"x": made}).encode())
    elif kind == "yaml":
        yield from _yaml(valid)
    elif kind == "fields":
        yield from _fields(valid)
    elif kind == "safetensors":
        yield from _safetensors(valid)


def changes(document: Any, values: list[Any]) -> Iterator[tuple[str, Any]]:
    """A document with one thing in it changed, in every way.

    Args:
        document: nested dictionaries, lists and scalars.
        values: what takes the place of each entry.
    """
    for place in _places(document):
        for value in values:
            yield f"{list(place)} = {str(value)[:30]!r}", _put(document, place, value)
        if place:
            yield f"without {list(place)}", _without(document, place)


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    if isinstance(value, dict):
        names = list(value)
        for name in names if len(names) <= FEW else [*names[:4], names[-1]]:
            yield from _places(value[name], (*here, name))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*here, 0))


def _put(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    made = copy.copy(document)
    made[place[0]] = _put(document[place[0]], place[1:], value)
    return made


def _without(document: Any, place: tuple[Any, ...]) -> Any:
    made = copy.copy(document)
    if place[1:]:
        made[place[0]] = _without(document[place[0]], place[1:])
    else:
        del made[place[0]]
    return made


def _lines(valid: bytes) -> Iterator[Garbage]:
    lines = valid.splitlines()
    for at in (len(lines) - 1,):
        known = [(garbage.how, garbage.data) for garbage in known_bytes(lines[at])]
        wrong = [(how, data) for how, data in known if data not in (None, lines[at])]
        wrong += [(how, as_json(made)) for how, made in changes(json.loads(lines[at]), VALUES)]
        for how, line in wrong:
            yield Garbage(f"line {at + 1}: {how}", b"\n".join([*lines[:at], line, *lines[at + 1 :]]) + b"\n")


def _yaml(valid: bytes) -> Iterator[Garbage]:
    import yaml

    body = "\n".join(line for line in valid.decode().splitlines() if not line.startswith("%"))
    try:
        plain = yaml.safe_load(body.replace("!!opencv-matrix", ""))
    except yaml.YAMLError:
        yield from _fields(valid)
        return
    for how, made in changes(plain, [value for value in VALUES if value not in ("a\0b", "\ud800")]):
        yield Garbage(how, yaml.safe_dump(made, allow_unicode=True).encode())


def _fields(valid: bytes) -> Iterator[Garbage]:
    lines = valid.decode("utf-8", "replace").splitlines() or [""]
    places = range(len(lines)) if len(lines) <= FEW // 2 else [0, 1, 2, len(lines) - 1]
    for at in places:
        mark = next((mark for mark in ("\t", ",", ";", " ") if mark in lines[at]), ",")
        parts = lines[at].split(mark)
        for column in range(len(parts)):
            for token in TOKENS:
                line = mark.join([*parts[:column], token, *parts[column + 1 :]])
                data = "\n".join([*lines[:at], line, *lines[at + 1 :]]).encode()
                yield Garbage(f"line {at + 1}, field {column}: {token[:20]!r}", data)
        for how, some in (("without", []), ("twice", [lines[at], lines[at]])):
            yield Garbage(f"{how} line {at + 1}", "\n".join([*lines[:at], *some, *lines[at + 1 :]]).encode())


def _safetensors(valid: bytes) -> Iterator[Garbage]:
    length = struct.unpack("<Q", valid[:8])[0]
    header = json.loads(valid[8 : 8 + length])
    first = next((name for name in header if name != "__metadata__"), None)
    few = {name: header[name] for name in ("__metadata__", first) if name in header}
    for how, part in changes(few, VALUES):
        if isinstance(part, dict):
            head = {name: entry for name, entry in header.items() if name not in few} | part
            text = as_json(head)
            text += b" " * (-len(text) % 8)
            yield Garbage(how, struct.pack("<Q", len(text)) + text + valid[8 + length :])
