"""Attacks as the command line writes them: ``ens``, ``adaea``, ``adaea+mi+di``, ``adaea+linear``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusion_core.errors import ConfigError

BASES = ("ens", "adaea")
MOMENTUM = 0.9


def _parts() -> dict[str, tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Word -> (what it sets, help, settings); words that set the same thing exclude each other."""
    from adaea.transforms import DI, SI, TI, Admix
    from adaea.updates import Momentum, Nesterov, Variance

    return {
        "mi": ("update", "momentum 0.9", lambda: {"update": [Momentum(MOMENTUM)]}),
        "ni": ("update", "Nesterov look-ahead", lambda: {"update": [Nesterov()]}),
        "vmi": ("variance", "variance tuning", lambda: {"update": [Variance()]}),
        "di": ("di", "random resize and pad", lambda: {"transforms": [DI()]}),
        "ti": ("ti", "smoothed gradients", lambda: {"transforms": [TI()]}),
        "si": ("si", "five scales", lambda: {"transforms": [SI()]}),
        "admix": ("si", "scales mixed with other images", lambda: {"transforms": [Admix()]}),
        "linear": ("agm", "AGM from gradients, no extra forwards", lambda: {"agm": "linear"}),
        "per-sample": ("agm", "weights per image", lambda: {"agm": "per_sample"}),
        "linear-per-sample": ("agm", "both", lambda: {"agm": "linear_per_sample"}),
        "no-agm": ("agm", "even weights", lambda: {"agm": False}),
        "no-drf": ("drf", "no filter", lambda: {"drf": False}),
        "official-drf": ("drf", "the authors' filter with its defect", lambda: {"drf": "official"}),
        "loss": ("fusion", "fuse losses", lambda: {"fusion": "loss"}),
        "probs": ("fusion", "fuse probabilities", lambda: {"fusion": "probs"}),
    }


def parse_attack(words: str, **settings: Any) -> Any:
    """The attack that a word of the command line names.

    Args:
        words: ``ens`` or ``adaea``, then parts joined by ``+``: mi, ni, vmi, di, ti, si, admix, linear,
            per-sample, no-agm, no-drf, official-drf, loss, probs.
        **settings: of :class:`~adaea.attack.AdaEA`; parts of the word go first.

    Returns:
        An attack without surrogates.

    Raises:
        ConfigError: an unknown word, or two that exclude each other.

    Example:
        >>> parse_attack("adaea+mi", steps=3).steps
        3
    """
    from adaea.attack import AdaEA
    from adaea.baselines import Ens

    base, *names = words.lower().strip().split("+")
    parts = _parts()
    if base not in BASES:
        raise ConfigError(f"attack is {words!r}, wanted ens or adaea, with parts such as adaea+mi+di")
    chosen: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name in names:
        if name not in parts:
            raise ConfigError(f"attack is {words!r}: no part {name!r}; there are {', '.join(parts)}")
        kind, _, build = parts[name]
        if kind in chosen:
            raise ConfigError(f"attack is {words!r}: {chosen[kind]} and {name} exclude each other")
        chosen[kind] = name
        for key, value in build().items():
            found[key] = [*found.get(key, []), *value] if isinstance(value, list) else value
    if base == "ens" and (clash := {"agm", "drf"} & chosen.keys()):
        raise ConfigError(
            f"attack is {words!r}: ens has even weights and no filter, so no {chosen[clash.pop()]}"
        )
    return (Ens if base == "ens" else AdaEA)(**{**settings, **found})


def parse_attacks(words: str, **settings: Any) -> dict[str, Any]:
    """Several attacks, separated by commas, by their words.

    Raises:
        ConfigError: none, one twice, or a bad word.

    Example:
        >>> list(parse_attacks("ens,adaea+linear"))
        ['ens', 'adaea+linear']
    """
    names = [word.strip().lower() for word in words.split(",") if word.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"attacks is {words!r}, wanted different words separated by commas, such as ens,adaea"
        )
    return {name: parse_attack(name, **settings) for name in names}
