"""DBNet++: find text in photographs and scans by differentiable binarization and adaptive scale fusion."""

__version__ = "0.1.0"

__all__ = ["__version__"]
