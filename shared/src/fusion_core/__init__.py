"""The thin core under the fusion packages: what at least two of them need, and nothing else.

``import fusion_core`` loads the errors and the lazy export table only; every other module is imported by
its own name (``from fusion_core.device import resolve_device``), so that a package pays for what it uses.
"""

from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FusionError,
    FusionWarning,
    InputError,
    MissingExtraError,
    NonFiniteError,
    ShapeError,
    StoreError,
    require_extra,
)
from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FusionError",
    "FusionWarning",
    "InputError",
    "MissingExtraError",
    "NonFiniteError",
    "ShapeError",
    "StoreError",
    "__version__",
    "lazy_exports",
    "require_extra",
]
