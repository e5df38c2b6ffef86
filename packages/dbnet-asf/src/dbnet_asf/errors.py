"""The package's names for what can be wrong with pictures and annotations."""

from fusion_core.errors import DataError

__all__ = ["AnnotationError"]


class AnnotationError(DataError):
    """A line of an annotation file, or a polygon, cannot be used; file and line are named."""
