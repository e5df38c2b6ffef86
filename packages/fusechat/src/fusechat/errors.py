"""The package's names for what can be wrong with texts, tokenizers and checkpoints."""

from fusion_core.errors import CheckpointError, InputError

__all__ = ["AlignmentError", "IncompatibleCheckpoints", "UnsupportedTokenizer"]


class AlignmentError(InputError):
    """Two sides that should hold the same text do not."""


class UnsupportedTokenizer(InputError):
    """A tokenizer cannot tell which characters its tokens cover."""


class IncompatibleCheckpoints(CheckpointError):
    """Checkpoints that are to be merged differ in names, shapes or kinds of their tensors."""
