"""Declarations of architectures: written by hand, read from a model, proved numerically."""
