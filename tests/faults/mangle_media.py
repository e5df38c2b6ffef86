"""Garbage of binary kinds: pictures, tensors in pickles, FITS, HDF5, tables, MATLAB files, databases."""

from __future__ import annotations

import io
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from faults.mangle import Garbage, whole_bytes

_PNG = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int = 8, color: int = 2, body: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return _PNG + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(body)) + _chunk(b"IEND", b"")


def picture(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A picture of another kind or size, one that lies about its size, or a broken one."""
    import numpy as np
    from PIL import Image

    def saved(image: Any, form: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format=form, **options)
        return buffer.getvalue()

    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 4), np.uint8)
    color = Image.fromarray(noise[..., :3])
    made: dict[str, Callable[[], bytes]] = {
        "a PNG of 2^31 by 2^31": lambda: _png(2**31 - 1, 2**31 - 1),
        "a PNG of 60000 by 60000": lambda: _png(60_000, 60_000, 1, 0, b"\0" * 100),
        "a PNG without pixels": lambda: _png(0, 0),
        "a PNG of another depth": lambda: _png(4, 4, 7),
        "a PNG whose pixels are missing": lambda: _png(40, 40, body=b"\0" * 10),
        "a bomb of zeros": lambda: _png(16_000, 12_000, 1, 0, b"\0" * (2001 * 12_000)),
        "one pixel": lambda: saved(Image.new("RGB", (1, 1)), "PNG"),
        "one row": lambda: saved(Image.new("RGB", (9000, 1)), "PNG"),
        "gray": lambda: saved(color.convert("L"), "PNG"),
        "two colors": lambda: saved(color.convert("1"), "PNG"),
        "a palette": lambda: saved(color.convert("P"), "PNG"),
        "alpha": lambda: saved(Image.fromarray(noise), "PNG"),
        "gray with alpha": lambda: saved(color.convert("LA"), "PNG"),
        "16 bits": lambda: saved(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG"),
        "CMYK": lambda: saved(color.convert("CMYK"), "JPEG"),
        "a GIF": lambda: saved(color, "GIF"),
        "a TIFF of NaN": lambda: saved(Image.fromarray(np.full((40, 56), np.nan, np.float32)), "TIFF"),
        "a TIFF of integers": lambda: saved(Image.fromarray(np.full((40, 56), -5, np.int32)), "TIFF"),
        "a JPEG": lambda: saved(color, "JPEG"),
        "a JPEG with wrong EXIF": lambda: saved(color, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        "half a JPEG": lambda: saved(color, "JPEG")[:700],
    }
    known = st.sampled_from(sorted(made)).map(lambda how: Garbage(how, made[how]()))
    return st.one_of(known, whole_bytes(valid))


def pickled(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A file of ``torch.save`` with other things inside."""
    import torch

    found = torch.load(io.BytesIO(valid), map_location="cpu", weights_only=True)

    def write(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    others: dict[str, Callable[[Any], Any]] = {
        "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 1,
        "another shape": lambda t: t[None],
        "empty": lambda t: t.reshape(-1)[:0],
        "int8": lambda t: t.to(torch.int8),
        "complex": lambda t: torch.zeros(t.shape, dtype=torch.complex64),
        "text": lambda _: "x",
        "None": lambda _: None,
        "a list": lambda t: [t],
        "a number": lambda _: 10**400,
        "sparse": lambda t: t.to_sparse(),
    }

    def tensors(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(value, torch.Tensor):
            return [here]
        entries = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        return [place for key, entry in entries for place in tensors(entry, (*here, key))]

    def put(value: Any, place: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
        if not place:
            return change(value)
        made = type(value)(value)
        made[place[0]] = put(value[place[0]], place[1:], change)
        return made

    places = tensors(found)[:200]
    top = {
        "a tensor": torch.zeros(3),
        "a list of tensors": [torch.zeros(3)],
        "an empty state": {},
        "an object": Path("x"),
        "numbers for names": {1: torch.zeros(3)},
        "another state": {"weight": torch.zeros(3, 2)},
        "None": None,
        "a state in a state": {"state_dict": found, "epoch": 3},
        "text": "x",
    }
    whole = st.sampled_from(sorted(top)).map(lambda how: Garbage(how, write(top[how])))
    keys = sorted(map(str, found)) if isinstance(found, dict) else [""]
    lost = st.sampled_from(keys).map(
        lambda name: Garbage(f"without {name}", write({k: v for k, v in found.items() if k != name}))
    )
    extra = st.just(Garbage("one more", write({**found, "more": torch.zeros(2)})))
    options = [whole, whole_bytes(valid), whole_bytes(valid), lost, extra]
    if places:
        change = st.builds(
            lambda place, how: Garbage(f"{list(place)}: {how}", write(put(found, place, others[how]))),
            st.sampled_from(places),
            st.sampled_from(sorted(others)),
        )
        options += [change, change]
    return st.one_of(options)


CARDS: list[Any] = ["x", "", -1, 0, 1e300, 10**12, True, "a" * 60, None, 2.5]


def fits_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A FITS file with other cards or other data."""
    import numpy as np
    from astropy.io import fits

    with fits.open(io.BytesIO(valid)) as units:
        names = [card.keyword for unit in units for card in unit.header.cards if card.keyword]

    def changed(name: str, value: Any) -> Garbage:
        """Cards are changed in place: the library would mend what it writes anew."""
        data = bytearray(valid)
        start = next(
            (at for at in range(0, len(data), 80) if data[at : at + 8].rstrip() == name.encode()), None
        )
        if start is None:
            return Garbage("the same", bytes(data))
        words = {None: "", True: "T"}.get(value, f"'{value}'" if isinstance(value, str) else repr(value))
        data[start : start + 80] = f"{name:8}= {words:>20}".ljust(80)[:80].encode("ascii", "replace")
        return Garbage(f"{name} = {value!r}", bytes(data))

    def without(name: str) -> Garbage:
        data = bytearray(valid)
        for at in range(0, len(data), 80):
            if data[at : at + 8].rstrip() == name.encode():
                data[at : at + 80] = b"COMMENT".ljust(80)
        return Garbage(f"without {name}", bytes(data))

    def filled(how: str) -> Garbage:
        shapes = {"one plane": (7, 7), "no pixel": (0,), "five axes": (1, 2, 1, 4, 4), "one pixel": (1, 1, 1)}
        value = {"NaN": np.nan, "infinity": np.inf}.get(how, 1.0)
        unit = fits.PrimaryHDU(np.full(shapes.get(how, (3, 5, 5)), value, np.float32))
        buffer = io.BytesIO()
        unit.writeto(buffer)
        return Garbage(how, buffer.getvalue())

    known = ("NaN", "infinity", "one plane", "no pixel", "five axes", "one pixel")
    cards = st.builds(changed, st.sampled_from(names), st.sampled_from(CARDS))
    lost = st.sampled_from(names).map(without)
    return st.one_of(cards, cards, lost, st.sampled_from(known).map(filled), whole_bytes(valid))


def hdf5_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """An HDF5 file with datasets and attributes of other kinds, or without them."""
    import h5py
    import numpy as np

    names: list[str] = []
    attributes: list[str] = []
    with h5py.File(io.BytesIO(valid), "r") as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        attributes += list(file.attrs)

    def edit(how: str, change: Callable[[Any], None]) -> Garbage:
        buffer = io.BytesIO(valid)
        with h5py.File(buffer, "r+") as file:
            change(file)
        return Garbage(how, buffer.getvalue())

    def put(name: str, kind: str) -> Garbage:
        def change(file: Any) -> None:
            shape = file[name].shape
            del file[name]
            file[name] = {
                "text": "x",
                "empty": np.zeros(0),
                "NaN": np.full(shape, np.nan),
                "flat": np.zeros(int(np.prod(shape))),
                "integers": np.full(shape, -(2**62)),
                "one dimension more": np.zeros((1, *shape)),
                "strings": [b"\xff"],
            }[kind]

        return edit(f"{name}: {kind}", change)

    def drop(name: str) -> Garbage:
        def change(file: Any) -> None:
            del file[name]

        return edit(f"without {name}", change)

    def attribute(name: str, value: Any) -> Garbage:
        def change(file: Any) -> None:
            file.attrs[name] = value

        return edit(f"attribute {name} = {value!r}"[:60], change)

    kinds = ("text", "empty", "NaN", "flat", "integers", "one dimension more", "strings")
    place = st.sampled_from(names)
    options = [
        st.builds(put, place, st.sampled_from(kinds)),
        place.map(drop),
        whole_bytes(valid),
        whole_bytes(valid),
    ]
    if attributes:
        values = st.sampled_from([0, "", "x", "{}", "[]", "null", '{"a": 1}', 1e300, "[" * 5000])
        options.append(st.builds(attribute, st.sampled_from(attributes), values))
    return st.one_of(options)


def table_file(form: str) -> Callable[[bytes], st.SearchStrategy[Garbage]]:
    """A table in a format of astropy, with other columns.

    Args:
        form: as ``Table.read(format=form)`` calls it.
    """

    def make(valid: bytes) -> st.SearchStrategy[Garbage]:
        import numpy as np
        from astropy.table import Table

        suffix = ".parquet" if form == "parquet" else ""
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            Path(file.name).write_bytes(valid)
            found = Table.read(file.name, format=form)

        # astropy's writer of text in C goes beyond the end of its memory, and the tool dies of it later
        options: Any = {"tabledata_format": "binary2"} if form == "votable" else {}

        def write(table: Any) -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"t{suffix}"
                table.write(path, format=form, **options)
                return path.read_bytes()

        def put(name: str, kind: str) -> Garbage:
            made, count = found.copy(), len(found)
            made[name] = {
                "text": np.full(count, "x"),
                "NaN": np.full(count, np.nan),
                "infinity": np.full(count, np.inf),
                "negative": np.full(count, -1e9),
                "large": np.full(count, 2**62),
                "bool": np.zeros(count, bool),
                "equal": np.full(count, made[name][0]),
                "empty text": np.full(count, ""),
            }[kind]
            return Garbage(f"{name}: {kind}", write(made))

        def edit(how: str) -> Garbage:
            made = {
                "no row": lambda: found[:0],
                "one row": lambda: found[:1],
                "one column": lambda: found[found.colnames[:1]],
                "columns twice as long": lambda: Table({name * 2: found[name] for name in found.colnames}),
            }[how]()
            return Garbage(how, write(made))

        kinds = ("text", "NaN", "infinity", "negative", "large", "bool", "equal", "empty text")
        columns = st.builds(put, st.sampled_from(found.colnames), st.sampled_from(kinds))
        whole = st.sampled_from(("no row", "one row", "one column", "columns twice as long")).map(edit)
        return st.one_of(columns, columns, whole, whole_bytes(valid))

    return make


def matlab_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """A MATLAB file with other variables."""
    import numpy as np
    from scipy import io as scipy_io

    found = {k: v for k, v in scipy_io.loadmat(io.BytesIO(valid)).items() if not k.startswith("__")}
    kinds: dict[str, Any] = {
        "text": "x",
        "empty": np.zeros((0, 0)),
        "NaN": np.full((2, 4, 3), np.nan),
        "a number": 3.0,
        "cells": np.array([[np.zeros((2, 4)), "x"]], object),
        "a struct": {"a": 1},
        "flat": np.zeros(9),
    }

    def put(name: str, kind: str) -> Garbage:
        buffer = io.BytesIO()
        scipy_io.savemat(buffer, {**found, name: kinds[kind]})
        return Garbage(f"{name}: {kind}", buffer.getvalue())

    made = st.builds(put, st.sampled_from(sorted(found)), st.sampled_from(sorted(kinds)))
    return st.one_of(made, whole_bytes(valid))


def database(valid: bytes) -> st.SearchStrategy[Garbage]:
    """An SQLite file with other tables or entries."""

    def edit(how: str, *statements: str) -> Garbage:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.sqlite"
            path.write_bytes(valid)
            base = sqlite3.connect(path)
            for statement in statements:
                base.execute(statement)
            base.commit()
            base.close()
            return Garbage(how, path.read_bytes())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.sqlite"
        path.write_bytes(valid)
        base = sqlite3.connect(path)
        tables = [row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {table: [row[1] for row in base.execute(f"PRAGMA table_info({table})")] for table in tables}
        base.close()
    made = [
        edit(
            "another table", *(f"DROP TABLE {t}" for t in tables), *(f"CREATE TABLE {t} (a)" for t in tables)
        ),
        edit("no table", *(f"DROP TABLE {table}" for table in tables)),
        *(edit(f"without {table}", f"DROP TABLE {table}") for table in tables),
        *(
            edit(f"{table}.{column}: {value}", f"UPDATE OR IGNORE {table} SET {column} = {value}")
            for table in tables
            for column in columns[table]
            for value in ("'x'", "x'00ff'", "7")
        ),
    ]
    return st.one_of(st.sampled_from(made), whole_bytes(valid))
