"""Fuse networks that were trained apart into one, by optimal transport of their neurons.

Names load their module on first use, so ``import ot_fusion`` costs little more than PyTorch.
"""

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

__all__ = ["__version__"]

__getattr__, __dir__ = lazy_exports(__name__, {})
