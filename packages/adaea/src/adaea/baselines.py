"""Attacks to compare with. Ens: the same loop with even weights and no filter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from adaea.attack import Images, Labels, run_attack
from adaea.draws import Draws
from adaea.loop import OnStep
from adaea.settings import AdaptiveSettings, EnsembleSettings
from adaea.surrogates import Surrogates
from adaea.trace import AttackState, Trace


@dataclass(frozen=True, eq=False, repr=False)
class Ens(EnsembleSettings):
    """The even ensemble: every surrogate counts 1/K and no pixel is filtered.

    Takes the arguments of :class:`adaea.AdaEA` but those of AGM and DRF.

    Example:
        >>> from torch import nn
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(4)]
        >>> _, trace = Ens(nets, steps=1)(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), trace=True)
        >>> trace.weights
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    @overload
    def __call__(
        self,
        images: Images,
        labels: Labels,
        *,
        trace: Literal[False] = False,
        surrogates: Surrogates | None = None,
        state: AttackState | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        images: Images,
        labels: Labels,
        *,
        trace: Literal[True],
        surrogates: Surrogates | None = None,
        state: AttackState | None = None,
        generator: torch.Generator | None = None,
        draws: Draws | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, Trace]: ...

    def __call__(
        self, images: Images, labels: Labels, *, trace: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Trace]:
        """Attack a batch; see :meth:`adaea.AdaEA.__call__`."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(EnsembleSettings)}
        settings = AdaptiveSettings(common.pop("surrogates"), **common, agm="off", drf="off")
        adversarial, found = run_attack(settings, images, labels, trace=trace, **options)
        return adversarial if found is None else (adversarial, found)
