"""SynthText's ``gt.mat`` by scipy, run as a script of its own: ``matfile.py GT.MAT OUT.NPZ``.

On a damaged file scipy's reader may reach beyond its memory, which ends the process. So it is not the user's:
what is read comes back in plain arrays, and this module imports nothing of the package.
"""

import json
import sys
import warnings
from typing import Any

import numpy as np


def read(path: str) -> dict[str, Any]:
    """The words of every picture.

    Args:
        path: of a MATLAB file with the cells ``imnames``, ``wordBB`` (2 x 4 x words each) and ``txt``.

    Returns:
        ``names`` and ``words`` (texts of each picture, without spaces) as the UTF-8 bytes of JSON, ``counts``
        int64 (pictures,), ``boxes`` float64 (all boxes, 4, 2).

    Raises:
        Exception: what scipy raises, or ValueError for cells that do not fit; the message says which.
    """
    from scipy import io

    with warnings.catch_warnings():  # of formats that nobody writes; what is there is checked below
        warnings.simplefilter("ignore", UserWarning)
        record = io.loadmat(path, variable_names=["imnames", "wordBB", "txt"])
    cells = [np.asarray(record[key]).ravel() for key in ("imnames", "wordBB", "txt")]
    if not len(cells[0]) == len(cells[1]) == len(cells[2]):
        raise ValueError(f"it has {len(cells[0])} names and {len(cells[1])} boxes")
    names: list[str] = []
    words: list[list[str]] = []
    boxes = [np.zeros((0, 4, 2))]
    for number, (name, cell, text) in enumerate(zip(*cells, strict=True), 1):
        box = np.asarray(cell, np.float64)
        if box.ndim == 2:  # a single word
            box = box[:, :, None]
        if box.ndim != 3 or box.shape[:2] != (2, 4):
            raise ValueError(f"picture {number}: wordBB has shape {box.shape}, wanted 2 x 4 x words")
        names.append(str(np.asarray(name).ravel()[0]))
        words.append([word for line in np.asarray(text).ravel() for word in str(line).split()])
        boxes.append(box.transpose(2, 1, 0))
    return {
        "names": np.frombuffer(json.dumps(names).encode(), np.uint8),
        "words": np.frombuffer(json.dumps(words).encode(), np.uint8),
        "counts": np.array([len(box) for box in boxes[1:]], np.int64),
        "boxes": np.concatenate(boxes),
    }


if __name__ == "__main__":
    try:
        np.savez(sys.argv[2], **read(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - told by the process that asked
        words = " ".join(str(error).split())[:300]
        sys.stdout.write(words if type(error) is ValueError else f"{type(error).__name__} {words}")
        sys.exit(1)
