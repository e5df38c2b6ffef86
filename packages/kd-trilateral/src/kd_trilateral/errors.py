"""The errors of this package beside the core's."""

from __future__ import annotations

from fusion_core.errors import FusionError, InputError


class StateError(InputError):
    """A step was skipped that the method needs first; the message shows the call to make."""


class DivergedError(FusionError):
    """Training left the finite numbers and did not come back."""
