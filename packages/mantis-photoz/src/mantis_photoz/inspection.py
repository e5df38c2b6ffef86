"""What a cutout file or a model holds, in plain values: the verb ``inspect``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.errors import InputError
from mantis_photoz.fits_fast import Image, read_fits
from mantis_photoz.reading import header_bands
from mantis_photoz.wcs import Tan

_FACTS = ("SURVEY", "OBJECT", "EXPTIME", "ZEROPT", "BUNIT", "BSOFTEN", "BOFFSET", "FILTER", "FPA.FILTER")


def inspect(path: str | os.PathLike[str]) -> list[dict[str, Any]] | dict[str, Any]:
    """Rows about the planes of a FITS cutout, or the facts of a model.

    Args:
        path: a FITS file, packed shards, a model's folder, or a model's name.

    Raises:
        CutoutError: a FITS file that is none.
        CheckpointError: no such model.
        InputError: a file that is neither.
    """
    place = Path(path)
    if place.suffix in (".h5", ".hdf5"):
        from mantis_photoz.pack import PackedCutouts

        return PackedCutouts(place).facts()
    if place.is_file():
        if not place.name.endswith((".fits", ".fit", ".fits.gz")):
            raise InputError(f"{place} is neither FITS (.fits), packed cutouts (.h5) nor a model's folder")
        return [row for image in read_fits(place) for row in _planes(image, place.name)]
    return _model(str(path))


def _planes(image: Image, name: str) -> list[dict[str, Any]]:
    tan = Tan.from_header(image.header, image.data.shape, name)
    bands = header_bands(image.header, len(image.data)) or ["?"] * len(image.data)
    rows: list[dict[str, Any]] = []
    for number, plane in enumerate(image.data):
        with np.errstate(invalid="ignore"):  # NaN that signal
            values = plane.astype(np.float64)
        good = values[np.isfinite(values)]
        row: dict[str, Any] = {"extension": image.name or "primary", "plane": number, "band": bands[number]}
        row |= {"height": plane.shape[0], "width": plane.shape[1]}
        if tan is not None:
            middle = tan.to_sky((plane.shape[1] - 1) / 2, (plane.shape[0] - 1) / 2)
            row |= {
                "scale_arcsec": round(tan.scale, 5),
                "mirrored": tan.parity > 0,
                "rotation_deg": round(math.degrees(math.atan2(tan.cd[1], tan.cd[3])), 3),
                "ra": round(middle[0], 6),
                "dec": round(middle[1], 6),
            }
        row |= {"nan": float(np.isnan(values).mean()), "infinite": int(np.isinf(values).sum())}
        words = {"min": np.min, "median": np.median, "max": np.max, "std": np.std}
        row |= {key: float(measure(good)) if good.size else None for key, measure in words.items()}
        row |= {fact.lower(): image.header[fact] for fact in _FACTS if fact in image.header}
        rows.append(row)
    return rows


def _model(name: str) -> dict[str, Any]:
    from fusion_core.checkpoint import digest_state
    from mantis_photoz.loading import load_parts

    found = load_parts(name)
    model, config = found["model"], found["model"].config
    recalibration = found["recalibration"]
    return {
        "name": found["name"],
        "fusion": config.fusion,
        "align": config.align,
        "surveys": ",".join(config.inputs),
        "encoders": ",".join(f"{key}={value}" for key, value in config.encoders.items()),
        "bins": config.bins,
        "z_max": config.z_max,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "digest": digest_state(model.state_dict()),
        "recalibration": getattr(recalibration, "kind", None),
        "out_of_distribution": "ood" in found,
        "training_prior": "train_prior" in found,
        "trained_with": config.data,
    }
