"""What an attack did at every step, and where it stopped."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusion_core.checkpoint import PathLike, atomic_write
from fusion_core.errors import DataError
from fusion_core.plotting import axes_or_new
from fusion_core.results import Result, plain


@dataclass(frozen=True, slots=True, eq=False)
class AttackState(Result):
    """Where an attack stopped: all that the next step needs, so that it can go on elsewhere.

    Attributes:
        images: iterate, ``(batch, channels, height, width)``, as the loop holds it.
        momentum: of the update rule; 0 where there is none.
        variance: of the variance term; 0 where there is none.
        weights: in use, ``(surrogates,)`` or ``(surrogates, batch)``.
        targets: classes attacked, ``(batch,)``.
        generator: state of the random stream, uint8.
        step: steps done.
    """

    images: Float[Tensor, "batch channels height width"]
    momentum: Float[Tensor, "batch channels height width"]
    variance: Float[Tensor, "batch channels height width"]
    weights: Float[Tensor, "surrogates *batch"]
    targets: Int[Tensor, " batch"]
    generator: Tensor
    step: Tensor

    @classmethod
    def load(cls, path: PathLike) -> AttackState:
        """Read what ``save`` wrote as ``.npz``.

        Raises:
            DataError: no such file, or no state.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(*(torch.from_numpy(arrays[name].copy()) for name in names))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path} is no state of an attack: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Trace(Result):
    """Every step of one attack on one batch; the first axis of each array is the step.

    Attributes:
        weights: of the surrogates, ``(steps, surrogates)``, or ``(steps, surrogates, batch)`` per image.
        kept: share of pixels that the filter let move, ``(steps, batch)`` in [0, 1].
        losses: cross-entropy of the attacked label, ``(steps, surrogates, batch)``, at the evaluated point.
        keep: bool ``(steps, batch, 1, height, width)``, the filter itself; True = moved.
        still: bool ``(steps, batch)``: no gradient was left for that image, so only momentum moved it.
        targets: classes attacked, ``(batch,)``: the true ones, or the wanted ones of a targeted attack.
        names: of the surrogates.
        state: for going on; saved by itself, not with the trace.

    Example:
        >>> from torch import nn
        >>> from adaea import AdaEA
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
        >>> _, trace = AdaEA(nets, steps=4)(torch.rand(5, 3, 2, 2), torch.arange(5) % 3, trace=True)
        >>> trace.weights.shape, trace.kept.shape, trace.losses.shape
        (torch.Size([4, 2]), torch.Size([4, 5]), torch.Size([4, 2, 5]))
    """

    weights: Float[Tensor, "steps surrogates *batch"]
    kept: Float[Tensor, "steps batch"]
    losses: Float[Tensor, "steps surrogates batch"]
    keep: Bool[Tensor, "steps batch 1 height width"]
    still: Bool[Tensor, "steps batch"]
    targets: Int[Tensor, " batch"]
    names: tuple[str, ...]
    state: AttackState

    def to_dict(self) -> dict[str, Any]:
        """All but the state, in JSON form."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "state"}

    def rows(self) -> list[dict[str, Any]]:
        """One row per step and surrogate: mean weight and loss, kept share, images without gradient."""
        weights = self.weights.double()
        weights = weights.mean(-1) if weights.dim() == 3 else weights
        losses, kept = self.losses.double().mean(-1), self.kept.double().mean(-1)
        still = self.still.sum(-1).tolist()
        columns = zip(weights.tolist(), losses.tolist(), kept.tolist(), still, strict=True)
        return [
            {"step": t, "surrogate": name, "weight": w[k], "loss": loss[k], "kept": share, "still": count}
            for t, (w, loss, share, count) in enumerate(columns)
            for k, name in enumerate(self.names)
        ]

    def to_dataframe(self) -> Any:
        """:meth:`rows` as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from fusion_core.report import dataframe

        return dataframe(self.rows())

    def save(self, path: PathLike) -> None:
        """Write ``.npz``, ``.safetensors``, ``.json`` or, a row per line, ``.jsonl``; whole or not at all."""
        if Path(path).suffix == ".jsonl":
            with atomic_write(path, "w") as file:
                file.writelines(json.dumps(plain(row)) + "\n" for row in self.rows())
            return
        _Arrays(*(getattr(self, f.name) for f in dataclasses.fields(_Arrays))).save(path)

    def plot(self, ax: Any = None) -> Any:
        """Draw the weights over the steps.

        Args:
            ax: matplotlib axes; new ones by default.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        ax = axes_or_new(ax, "adaea")
        weights = self.weights.detach().double().cpu()
        weights = weights.mean(-1) if weights.dim() == 3 else weights
        for name, line in zip(self.names, weights.T.tolist(), strict=True):
            ax.plot(range(1, len(line) + 1), line, label=name)
        ax.set(xlabel="step", ylabel="weight", ylim=(0, 1))
        ax.legend()
        return ax


@dataclass(frozen=True, slots=True, eq=False)
class _Arrays(Result):
    weights: Tensor
    kept: Tensor
    losses: Tensor
    keep: Tensor
    still: Tensor
    targets: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """One step as it happened, for the function given as ``on_step``; tensors of the loop, not copies.

    Attributes:
        step: its number from 0.
        point: where the gradients were taken, ``(batch, channels, height, width)``.
        gradients: of each surrogate's objective, ascent, ``(surrogates, batch, channels, height, width)``.
        losses: cross-entropy, ``(surrogates, batch)``.
        weights: ``(surrogates,)`` or ``(surrogates, batch)``.
        score: map of the filter, ``(batch, 1, height, width)``; 1 everywhere where the filter is off.
        keep: the filter.
        fused: gradient of the ensemble's objective, before variance term and filter.
        images: the iterate after the step.
    """

    step: int
    point: Tensor
    gradients: Tensor
    losses: Tensor
    weights: Tensor
    score: Tensor
    keep: Tensor
    fused: Tensor
    images: Tensor
