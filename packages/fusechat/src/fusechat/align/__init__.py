"""Align the tokens of two tokenizers, and bring distributions from one vocabulary to the other."""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

if TYPE_CHECKING:
    from fusechat.align.inspection import inspect
    from fusechat.align.mapping import VocabularyMap, vocabulary_map
    from fusechat.align.pairs import Pairs, dtw, span
    from fusechat.align.projecting import Projected, project

__all__ = ["Pairs", "Projected", "VocabularyMap", "dtw", "inspect", "project", "span", "vocabulary_map"]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Pairs": "pairs",
        "Projected": "projecting",
        "VocabularyMap": "mapping",
        "dtw": "pairs",
        "inspect": "inspection",
        "project": "projecting",
        "span": "pairs",
        "vocabulary_map": "mapping",
    },
)
