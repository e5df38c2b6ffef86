"""Readers of public data sets, and synthetic scenes: ``datasets.icdar2015("ic15/train")``."""

from .data.dataset import (
    Example,
    Preparation,
    Rendered,
    TextDataset,
    TrainingSet,
    icdar2015,
    load,
    paddleocr,
    rendered,
    synthtext,
    totaltext,
)
from .data.formats import Sample

__all__ = [
    "Example",
    "Preparation",
    "Rendered",
    "Sample",
    "TextDataset",
    "TrainingSet",
    "icdar2015",
    "load",
    "paddleocr",
    "rendered",
    "synthtext",
    "totaltext",
]
