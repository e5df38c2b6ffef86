"""The package's names for what can be wrong with texts, tokenizers and checkpoints."""

from fusion_core.errors import CheckpointError, InputError

__all__ = ["AlignmentError", "IncompatibleCheckpoints", "UnsupportedTokenizer"]


class AlignmentError(InputError):
    """Two sides that should hold the same text do not."""


class UnsupportedTokenizer(InputError):  # noqa: N818 - the name that the issue gives
    """A tokenizer cannot tell which characters its tokens cover."""


class IncompatibleCheckpoints(CheckpointError):  # noqa: N818 - the name that the issue gives
    """Checkpoints that are to be merged differ in names, shapes or kinds of their tensors."""
