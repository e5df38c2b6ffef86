"""The published loop written down plainly; it ships as ``adaea.plain`` so that ``adaea bench`` has it too."""

from adaea.plain import plain_attack

__all__ = ["plain_attack"]
