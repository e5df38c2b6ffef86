"""The settings of an attack: checked, immutable, and writable as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch

from adaea.agm import RATIOS, Ratio
from adaea.budget import NORMS, Norm
from adaea.fusion import FUSIONS, Fusion
from adaea.losses import LOSSES, Loss
from adaea.surrogates import Devices, Surrogates, name_surrogates
from adaea.targets import RULES, Target
from adaea.transforms import DI, SI, TI, Admix
from adaea.updates import Momentum, Nesterov, Variance
from fusion_core.device import resolve_dtype
from fusion_core.errors import LARGEST, ConfigError, check_range

Agm = Literal["exact", "per_sample", "linear", "linear_per_sample", "off"]
Drf = Literal["symmetric", "official", "off"]
Start = Literal["normal", "projected", "uniform"]
Transform = DI | SI | Admix | TI
Update = Momentum | Nesterov | Variance
AGMS = ("exact", "per_sample", "linear", "linear_per_sample", "off")
DRFS = ("symmetric", "official", "off")
STARTS = ("normal", "projected", "uniform")
PARTS: Mapping[str, Any] = {part.__name__: part for part in (DI, SI, Admix, TI, Momentum, Nesterov, Variance)}


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, wanted one of {list(choices)}")


def _parts(name: str, value: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    listed = () if value is None else tuple(value) if isinstance(value, list | tuple | str) else (value,)
    for part in listed:
        if not isinstance(part, kinds):
            raise ConfigError(f"{name} holds {part!r}, wanted {', '.join(kind.__name__ for kind in kinds)}")
    if len({type(part) for part in listed}) < len(listed):
        raise ConfigError(f"{name} holds {list(listed)}, wanted at most one part of each kind")
    return listed


@dataclass(frozen=True, eq=False, repr=False)
class EnsembleSettings:
    """What every ensemble attack has; see :class:`adaea.AdaEA` for the meaning of each field."""

    surrogates: Surrogates | None = None
    _: KW_ONLY
    eps: float = cast("float", None)
    alpha: float = cast("float", None)
    steps: int = 10
    update: Update | Sequence[Update] | None = ()
    transforms: Transform | Sequence[Transform] | None = ()
    fusion: Fusion = "logits"
    loss: Loss = "ce"
    norm: Norm = "linf"
    targeted: bool = False
    target: Target = "label"
    start: Start = "normal"
    noise: float = 0.001
    final_step: float | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    devices: Devices | None = None
    seed: int = 0

    _unwritten: ClassVar[tuple[str, ...]] = ("surrogates", "devices")

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)
        _choice("norm", self.norm, NORMS)
        # Of the paper's eps 8/255 a quarter is a step; for l2 the same share of 3.0 (at 224 pixels).
        put("eps", (8 / 255 if self.norm == "linf" else 3.0) if cast("Any", self.eps) is None else self.eps)
        default = 2 / 255 if self.norm == "linf" else max(self.eps / 4, 1e-12)
        put("alpha", default if cast("Any", self.alpha) is None else self.alpha)
        if not 0 <= self.eps <= LARGEST:
            raise ConfigError(f"eps is {self.eps!r}, wanted a number >= 0 such as 8/255")
        check_range("alpha", self.alpha, 0.0, open=True)
        check_range("noise", self.noise, 0.0)
        if self.final_step is not None:
            check_range("final_step", self.final_step, 0.0, open=True)
        if isinstance(self.steps, bool) or not 1 <= self.steps <= LARGEST or int(self.steps) != self.steps:
            raise ConfigError(f"steps is {self.steps!r}, wanted an integer of at least 1")
        _choice("fusion", self.fusion, FUSIONS)
        _choice("loss", self.loss, list(LOSSES))
        _choice("start", self.start, STARTS)
        if isinstance(self.target, str):
            _choice("target", self.target, RULES)
            put("targeted", bool(self.targeted) or self.target != "label")
        else:
            put("targeted", True)
        low, high = self.bounds
        if not low < high:
            raise ConfigError(f"bounds are {self.bounds!r}, wanted (low, high) such as (0.0, 1.0)")
        put("bounds", (float(low), float(high)))
        put("update", _parts("update", self.update, (Momentum, Nesterov, Variance)))
        put("transforms", _parts("transforms", self.transforms, (DI, SI, Admix, TI)))
        if self.part(Momentum) and self.part(Nesterov):
            raise ConfigError("update holds Momentum and Nesterov, wanted one of them")
        if self.part(SI) and self.part(Admix):
            raise ConfigError(
                "transforms hold SI and Admix, wanted one of them: Admix(scales=) scales by itself"
            )
        if self.surrogates is not None:
            name_surrogates(self.surrogates)

    def part(self, kind: type[Any]) -> Any:
        """The part of that kind, or None."""
        chosen = (*cast("tuple[Any, ...]", self.update), *cast("tuple[Any, ...]", self.transforms))
        return next((part for part in chosen if isinstance(part, kind)), None)

    def with_(self, **changes: Any) -> Self:
        """A copy with other settings; another ``norm`` brings its own default ``eps`` and ``alpha``.

        Raises:
            ConfigError: an unknown setting, or a value that it does not take.

        Example:
            >>> from adaea import AdaEA
            >>> AdaEA().with_(steps=3).steps
            3
        """
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(changes.keys() - known):
            raise ConfigError(f"there is no setting {unknown[0]!r}, wanted one of {sorted(known)}")
        if changes.get("norm", self.norm) != self.norm:
            changes = {"eps": None, "alpha": None} | changes
        if "target" in changes and "targeted" not in changes:
            changes["targeted"] = False  # follows from the target
        if changes.get("targeted") is False and "target" not in changes:
            changes["target"] = "label"
        return dataclasses.replace(self, **changes)

    def config(self) -> dict[str, Any]:
        """The settings as JSON values, without surrogates and devices; :meth:`from_config` reads them.

        Raises:
            ConfigError: ``target`` is a function, which JSON does not hold.

        Example:
            >>> from adaea import AdaEA, Momentum
            >>> AdaEA(update=Momentum(1.0)).config()["update"]
            [{'part': 'Momentum', 'mu': 1.0}]
        """
        if callable(self.target):
            raise ConfigError("target is a function, which a config cannot hold; wanted a rule or a class")
        found: dict[str, Any] = {"attack": type(self).__name__}
        for field in dataclasses.fields(self):
            if field.name in self._unwritten:
                continue
            value = getattr(self, field.name)
            if field.name in ("update", "transforms"):
                value = [{"part": type(part).__name__, **dataclasses.asdict(part)} for part in value]
            found[field.name] = list(value) if isinstance(value, tuple) else value
        return found

    @classmethod
    def from_config(cls, config: Mapping[str, Any], surrogates: Surrogates | None = None) -> Self:
        """The attack that :meth:`config` described.

        Args:
            config: the mapping; ``attack`` has to be this class.
            surrogates: to bind.

        Raises:
            ConfigError: another attack, an unknown setting or an unknown part.
        """
        values = dict(config)
        if (name := values.pop("attack", cls.__name__)) != cls.__name__:
            raise ConfigError(f"attack is {name!r}, wanted {cls.__name__!r}")
        for field in ("update", "transforms"):
            if field in values:
                values[field] = [_read_part(part) for part in values[field] or ()]
        if "bounds" in values:
            values["bounds"] = tuple(values["bounds"])
        known = {field.name for field in dataclasses.fields(cls)} - set(cls._unwritten)
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"there is no setting {unknown[0]!r}, wanted one of {sorted(known)}")
        return cls(surrogates, **values)

    def __repr__(self) -> str:
        plain = type(self)()
        names = [field.name for field in dataclasses.fields(self) if field.name not in self._unwritten]
        changed = [f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) != getattr(plain, n)]
        models = [] if self.surrogates is None else [repr(list(name_surrogates(self.surrogates)))]
        return f"{type(self).__name__}({', '.join(models + changed)})"


def _read_part(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    values = dict(cast("Mapping[str, Any]", part))
    name = values.pop("part", None)
    if name not in PARTS:
        raise ConfigError(f"part is {name!r}, wanted one of {sorted(PARTS)}")
    try:
        return PARTS[name](**values)
    except TypeError as error:
        raise ConfigError(f"part {name}: {error}") from error


@dataclass(frozen=True, eq=False, repr=False)
class AdaptiveSettings(EnsembleSettings):
    """What AdaEA has beyond :class:`EnsembleSettings`."""

    _: KW_ONLY
    beta: float = 10.0
    eta: float = -0.3
    agm: Agm | bool = "exact"
    agm_every: int = 1
    agm_transform: bool = False
    agm_dtype: str | torch.dtype | None = None
    agm_batch_size: int | None = None
    ratio: Ratio = "given"
    drf: Drf | bool = "symmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        put = lambda name, value: object.__setattr__(self, name, value)
        if isinstance(self.agm, bool):
            put("agm", "exact" if self.agm else "off")
        if isinstance(self.drf, bool):
            put("drf", "symmetric" if self.drf else "off")
        _choice("agm", self.agm, AGMS)
        _choice("drf", self.drf, DRFS)
        _choice("ratio", self.ratio, RATIOS)
        check_range("beta", self.beta, 0.0)
        check_range("eta", self.eta, -math.inf, math.inf)
        check_range("agm_every", self.agm_every, 0)
        if self.agm_batch_size is not None:
            check_range("agm_batch_size", self.agm_batch_size, 1)
        if self.agm_dtype is not None:
            put("agm_dtype", str(resolve_dtype(self.agm_dtype)).removeprefix("torch."))
        if self.linear and self.loss != "ce":
            raise ConfigError(
                f"loss is {self.loss!r}, wanted 'ce' with agm={self.agm!r}, which reuses its gradients"
            )
        if self.agm_transform and not self.part(DI):
            raise ConfigError("agm_transform is True, wanted DI among the transforms to draw from")
        if self.agm_transform and self.linear:
            raise ConfigError(f"agm_transform is True, wanted agm='exact' or 'per_sample', got {self.agm!r}")

    @property
    def linear(self) -> bool:
        """The loss matrix is taken to first order."""
        return self.agm in ("linear", "linear_per_sample")

    @property
    def per_sample(self) -> bool:
        """Weights are per image."""
        return self.agm in ("per_sample", "linear_per_sample")
