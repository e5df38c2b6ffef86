"""Reports that draw their own pictures when they are saved."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace

from fusion_core.errors import MissingExtraError
from fusion_core.report import Figure, Report

__all__ = ["DrawnReport"]


@dataclass(frozen=True, kw_only=True)
class DrawnReport(Report):
    """A report with a method :meth:`draw`; :meth:`save` draws what is not drawn yet."""

    def draw(self, directory: str | os.PathLike[str]) -> list[Figure]:  # noqa: ARG002
        """Draw the pictures into a directory (extra ``plot``)."""
        return []

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write report and pictures; without matplotlib the report alone."""
        with tempfile.TemporaryDirectory() as place:
            try:
                figures = list(self.figures) or self.draw(place)
            except MissingExtraError:
                figures = []
            Report.save(replace(self, figures=figures), directory)
