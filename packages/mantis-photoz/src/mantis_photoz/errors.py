"""The names for what can be wrong with inputs; all are :class:`fusion_core.errors.FusionError`."""

from __future__ import annotations

from fusion_core.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ShapeError

__all__ = [
    "CatalogError",
    "CheckpointError",
    "ConfigError",
    "CutoutError",
    "DataError",
    "DensityError",
    "NonFiniteError",
    "ShapeError",
    "SurveyError",
]


class CatalogError(DataError):
    """A catalogue lacks a column, repeats an id or holds positions that are none."""


class CutoutError(DataError):
    """An image file is missing, cut off, of the wrong band, scale, shape or place."""


class DensityError(DataError):
    """Bin edges or masses do not make a probability density."""


class SurveyError(ConfigError):
    """A survey is unknown or its description does not fit together."""
