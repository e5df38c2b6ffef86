"""Dynamic logits fusion: small experts steer a large language model while it decodes."""

__version__ = "0.1.0"

__all__ = ["__version__"]
