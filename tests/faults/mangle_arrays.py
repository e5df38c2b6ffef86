"""Garbage of NumPy's files, drawn by Hypothesis: other arrays, headers that lie, and bombs."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from faults.mangle import Garbage, whole_bytes, zipped


def arrays_file(valid: bytes) -> st.SearchStrategy[Garbage]:
    """An ``.npy`` or ``.npz`` with arrays of other kinds and shapes, headers that lie, and bombs."""
    import numpy as np

    found = np.load(io.BytesIO(valid), allow_pickle=False)
    single = isinstance(found, np.ndarray)
    arrays = {"arr": found} if single else {name: found[name] for name in found.files}

    def write(made: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        if single:
            np.save(buffer, made["arr"], allow_pickle=True)
        else:
            np.savez(buffer, **made)
        return buffer.getvalue()

    def changes(array: Any) -> dict[str, Callable[[], Any]]:
        return {
            "empty": lambda: array.reshape(-1)[:0],
            "a scalar": lambda: array.reshape(-1)[:1].reshape(()),
            "one dimension more": lambda: array[None],
            "flat": lambda: array.reshape(-1),
            "complex": lambda: np.zeros(array.shape, complex),
            "text": lambda: np.full(array.shape, "x"),
            "bool": lambda: np.zeros(array.shape, bool),
            "uint64": lambda: np.full(array.shape, 2**64 - 1, np.uint64),
            "objects": lambda: np.array([{}, None], object),
            "float16": lambda: np.zeros(array.shape, np.float16),
            "NaN": lambda: np.full(array.shape, np.nan),
            "infinity": lambda: np.full(array.shape, -np.inf),
            "negative": lambda: np.full(array.shape, -1),
            "huge": lambda: np.full(array.shape, 1e30),
            "one row less": lambda: array[:-1] if array.ndim else array,
            "dates": lambda: np.zeros(array.shape, "M8[s]"),
            "records": lambda: np.zeros(2, [("a", "f4"), ("b", "S3")]),
            "big-endian": lambda: array.astype(array.dtype.newbyteorder(">")),
            "Fortran order": lambda: np.asfortranarray(array),
            "zero wide": lambda: np.zeros((3, 0, 0), np.float32),
        }

    def change(name: str, how: str) -> Garbage:
        return Garbage(f"{name}: {how}", write({**arrays, name: changes(arrays[name])[how]()}))

    names = st.sampled_from(sorted(arrays))
    kinds = st.sampled_from(sorted(changes(next(iter(arrays.values())))))
    lost = names.map(
        lambda name: Garbage(f"without {name}", write({k: v for k, v in arrays.items() if k != name}))
    )
    lie = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    lie += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
    first = sorted(arrays)[0]
    bombs = [Garbage("a header of terabytes", lie if single else zipped({f"{first}.npy": lie}))]
    if not single:
        head = lie.replace(b"(1000000, 1000000)", b"(20000, 25000)    ")
        bombs.append(Garbage("a bomb of 2 GB", _bomb(f"{first}.npy", head, 2_000_000_000 + len(head))))
    made = st.builds(change, names, kinds)
    return st.one_of(
        made, made, made, st.sampled_from(bombs), lost if not single else made, whole_bytes(valid)
    )


_KEPT: dict[tuple[str, int], bytes] = {}


def _bomb(name: str, head: bytes, size: int) -> bytes:
    """A small zip whose one entry unpacks to ``size`` bytes, zeros behind a head; made once."""
    if (name, size) not in _KEPT:
        buffer, block, left = io.BytesIO(), b"\0" * 2**22, size - len(head)
        with (
            zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
            file.open(name, "w") as entry,
        ):
            entry.write(head)
            while left > 0:
                entry.write(block[: min(left, len(block))])
                left -= len(block)
        _KEPT[name, size] = buffer.getvalue()
    return _KEPT[name, size]
