"""Per-sample distillation ratios from trilateral geometry (TGeo-KD)."""

__version__ = "0.1.0"
