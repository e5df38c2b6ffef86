"""The package's names for what can be wrong with cameras, geometry and calibration."""

from fusion_core.errors import InputError

__all__ = ["CalibrationError", "CameraError", "GeometryError"]


class CameraError(InputError):
    """A camera's numbers are impossible, unknown, or do not fit the image."""


class GeometryError(InputError):
    """The ground cannot be seen where the method needs it."""


class CalibrationError(InputError):
    """A calibration file cannot be read, or the data do not determine the calibration."""
