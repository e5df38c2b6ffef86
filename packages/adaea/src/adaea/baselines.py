"""Attacks to compare with. Ens: the same loop with even weights and no filter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from adaea.attack import Attack
from adaea.settings import AdaptiveSettings, EnsembleSettings


@dataclass(frozen=True, eq=False, repr=False)
class Ens(Attack, EnsembleSettings):
    """The even ensemble: every surrogate counts 1/K and no pixel is filtered.

    Takes the arguments of :class:`adaea.AdaEA` but those of AGM and DRF.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(4)]
        >>> _, trace = Ens(nets, steps=1)(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), trace=True)
        >>> trace.weights
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def _adaptive(self) -> AdaptiveSettings:
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(EnsembleSettings)}
        return AdaptiveSettings(common.pop("surrogates"), **common, agm="off", drf="off")
