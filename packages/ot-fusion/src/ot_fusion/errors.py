"""What can be wrong with a specification, a map or a solve; shapes and data have the core's errors."""

from fusion_core.errors import DataError, InputError, ShapeError

__all__ = ["DataError", "IllegalMapError", "InputError", "ShapeError", "SolverError", "SpecError"]


class SpecError(InputError):
    """A specification does not describe its model.

    A tensor without spaces, an axis in two, an unknown operation.
    """


class IllegalMapError(InputError):
    """A map that would change the function, where only legal ones were allowed."""


class SolverError(InputError):
    """A transport problem that cannot be solved as it stands, or a solver that did not converge."""
