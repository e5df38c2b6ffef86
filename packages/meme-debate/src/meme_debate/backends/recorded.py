"""Debates from a file instead of a model."""

from __future__ import annotations

import os

from fusion_core.errors import DataError
from meme_debate.meme import Debate, Meme, load_debates


class RecordedBackend:
    """Gives the debates of a ``debates.jsonl``; no model is asked.

    Args:
        path: the file.

    Raises:
        InputError: no such file.
        DataError: a record that is no debate.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.model = "recorded"
        self._debates = {debate.id: debate for debate in load_debates(path)}

    def debate(self, meme: Meme) -> Debate:
        """The recorded debate about a meme.

        Raises:
            DataError: there is none.
        """
        try:
            return self._debates[meme.id]
        except KeyError:
            raise DataError(f"{self.path} has no debate about meme {meme.id!r}") from None
