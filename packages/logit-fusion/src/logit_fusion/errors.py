"""The package's names for what can be wrong with members, vocabularies and logits."""

from fusion_core.errors import FusionWarning, InputError, NonFiniteError

__all__ = [
    "ContextLengthError",
    "EmptySupportError",
    "NonFiniteLogitsError",
    "UnpairedExpertWarning",
    "VocabularyMismatchError",
]


class VocabularyMismatchError(InputError):
    """Members do not share a vocabulary, or their logits do not have one size."""


class EmptySupportError(InputError):
    """No token of a row is allowed by the mask and finite in every member."""


class ContextLengthError(InputError):
    """A sequence is longer than a member can read; the message names the member."""


class NonFiniteLogitsError(NonFiniteError):
    """A member's logits hold NaN or +inf; the message names the member and the row."""


class UnpairedExpertWarning(FusionWarning):
    """Base and expert do not look like a model and its fine-tune."""
