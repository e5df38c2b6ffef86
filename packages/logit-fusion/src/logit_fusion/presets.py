"""The static ancestors of dynamic fusion, as settings: one fixed strength, no search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusion_core.errors import InputError
from logit_fusion.config import FusionConfig

__all__ = ["PRESETS", "Preset", "preset_settings"]


@dataclass(frozen=True)
class Preset:
    """A published static rule.

    Args:
        alpha: strength of the shift expert - base.
        paper: where it is from, and what its members are called there.
        plausibility: tokens below this share of the large model's greatest probability are forbidden.
    """

    alpha: float
    paper: str
    plausibility: float = 0.0


PRESETS: dict[str, Preset] = {
    "proxy-tuning": Preset(1.0, "Liu et al. 2024: tuned proxy, untuned proxy"),
    "eft": Preset(1.0, "Mitchell et al. 2023, emulated fine-tuning: small fine-tuned, small reference"),
    "dexperts": Preset(2.0, "Liu et al. 2021: expert, and the anti-expert as the base"),
    "contrastive": Preset(
        0.5,
        "O'Brien and Lewis 2023 after Li et al.: the large model itself, and the amateur as the base",
        0.1,
    ),
}


def preset_settings(name: str | None, settings: FusionConfig) -> FusionConfig:
    """Settings with a preset's strength.

    Args:
        name: of the preset; None leaves the settings as they are.
        settings: the rest.

    Raises:
        InputError: no such preset.

    Example:
        >>> preset_settings("dexperts", FusionConfig()).alpha
        2.0
    """
    if name is None:
        return settings
    if name not in PRESETS:
        raise InputError(f"preset is {name!r}, wanted one of {', '.join(PRESETS)}")
    found = PRESETS[name]
    changes: dict[str, Any] = {"alpha": found.alpha, "plausibility": found.plausibility}
    return settings.replace(**changes)
