"""The package's names for what can go wrong in a debate, beside the core's."""

from fusion_core.errors import FusionError, FusionWarning, StoreError

__all__ = ["BackendError", "DebateWarning", "PromptVersionError"]


class BackendError(FusionError):
    """A language model could not be asked; the message says what to set or to start."""


class PromptVersionError(StoreError):
    """A file or cache was made with other prompts than this version writes."""


class DebateWarning(FusionWarning):
    """Something in memes or debates was left out or mended; the message counts it."""
