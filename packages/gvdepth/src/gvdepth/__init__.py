"""GVDepth: metric depth from one camera on a ground vehicle, by probabilistic fusion of two cues."""

__version__ = "0.1.0"

__all__ = ["__version__"]
