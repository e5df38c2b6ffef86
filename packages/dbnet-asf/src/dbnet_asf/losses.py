"""The losses of DBNet: the authors' eight, and the paper's own (section 2.3).

Sums run over the whole batch. Everything is computed in float32 or wider, also under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dbnet_asf.config import LossName
from dbnet_asf.model.dbnet import DBOutput
from dbnet_asf.reduction import Reduction
from dbnet_asf.targets import Targets
from fusion_core.errors import ConfigError, ShapeError, check_range

Map = Float[Tensor, "batch height width"]
Parts = dict[str, Tensor]
NAMES: tuple[str, ...] = get_args(LossName)
_EPS = 1e-6
_RATIO = 3.0  # hard negatives to one positive


def balanced_bce(
    logits: Map, gt: Map, mask: Map, *, ratio: float = _RATIO, reduction: Reduction | None = None
) -> Float[Tensor, ""]:
    """Binary cross-entropy over all positives and the ``ratio`` times as many hardest negatives.

    Args:
        logits: before the sigmoid.
        gt: 1 inside text, 0 outside.
        mask: 1 where it counts.
        ratio: negatives to one positive; they are chosen over the whole batch.
        reduction: over processes; this process alone by default.

    Returns:
        A number >= 0; 0 without text (DBNet, equation 6 with mining).
    """
    reduction = reduction or Reduction()
    loss = binary_cross_entropy_with_logits(logits, gt, reduction="none")
    positive, negative = gt * mask, (1 - gt) * mask
    wanted, there = reduction.total(positive.sum()), reduction.total(negative.sum())
    count = torch.minimum(there, (wanted * ratio).floor())
    hard = reduction.top_sum((loss * negative).flatten(), count)
    return (reduction.total((loss * positive).sum()) + hard) / (wanted + count + _EPS)


def dice(
    prediction: Map, gt: Map, mask: Map, *, weight: Tensor | None = None, reduction: Reduction | None = None
) -> Float[Tensor, ""]:
    """One minus the overlap 2 |A B| / (|A| + |B|) of a map with the truth.

    Args:
        prediction: in [0, 1].
        gt: 1 inside text, 0 outside.
        mask: 1 where it counts.
        weight: multiplies the mask.
        reduction: over processes.

    Returns:
        A number in [0, 1]; 1 with no gradient where the mask is empty.
    """
    total = (reduction or Reduction()).total
    mask = mask if weight is None else mask * weight
    both = total((prediction * gt * mask).sum())
    return 1 - 2 * both / (total((prediction * mask).sum()) + total((gt * mask).sum()) + _EPS)


def masked_l1(
    thresh: Map, thresh_map: Map, thresh_mask: Map, *, reduction: Reduction | None = None
) -> Float[Tensor, ""]:
    """Mean distance of the threshold map from its label where it counts; 0 where that is nowhere."""
    total = (reduction or Reduction()).total
    count = total(thresh_mask.sum())
    return total(((thresh - thresh_map).abs() * thresh_mask).sum()) / count.clamp(min=1)


def mined_l1(
    thresh: Map,
    thresh_map: Map,
    thresh_mask: Map,
    *,
    ratio: float = _RATIO,
    reduction: Reduction | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean L1 inside the mask, and of the hardest pixels outside it; both 0 where the mask is empty."""
    reduction = reduction or Reduction()
    inside = masked_l1(thresh, thresh_map, thresh_mask, reduction=reduction)
    outside = 1 - thresh_mask
    wanted = reduction.total(thresh_mask.sum())
    count = torch.minimum(reduction.total(outside.sum()), (wanted * ratio).floor())
    hard = reduction.top_sum(((thresh - thresh_map).abs() * outside).flatten(), count)
    return inside, hard / count.clamp(min=1)


class DBLoss:
    """A loss of DBNet by name, called on the network's output and the labels.

    Args:
        alpha: weight of the probability map's cross-entropy; None takes 5 (the authors' code), and 1 for
            ``loss="paper"``. ``L1LeakyDiceLoss`` weighs missed text by it.
        beta: weight of the threshold map's L1 distance.
        loss: which; the authors' names, or ``"paper"``: cross-entropy on both maps.
        global_ohem: sums and hard negatives over all processes of ``torch.distributed``, so that many
            processes give the gradients of one; within each process otherwise, as the authors do.

    Raises:
        ConfigError: unknown name, or a negative weight.

    Example:
        >>> word = [[8, 8], [56, 8], [56, 24], [8, 24]]
        >>> from dbnet_asf.targets import make_targets
        >>> targets = Targets.stack([make_targets([word], None, (32, 64))])
        >>> half = torch.full((1, 1, 32, 64), 0.5)
        >>> total, parts = DBLoss()(DBOutput.from_maps(half, half), targets)
        >>> {name: round(value.item(), 3) for name, value in parts.items()}
        {'bce_loss': 0.693, 'thresh_loss': 0.79, 'l1_loss': 0.121}
    """

    def __init__(
        self,
        alpha: float | None = None,
        beta: float = 10.0,
        loss: LossName = "L1BalanceCELoss",
        *,
        global_ohem: bool = False,
    ) -> None:
        if loss not in NAMES:
            raise ConfigError(f"loss is {loss!r}, wanted one of {list(NAMES)}")
        self.loss = loss
        self.alpha = check_range(
            "alpha", (1.0 if loss == "paper" else 5.0) if alpha is None else alpha, 0, float("inf")
        )
        self.beta = check_range("beta", beta, 0, float("inf"))
        self.global_ohem = global_ohem

    def __call__(self, output: DBOutput, targets: Targets) -> tuple[Float[Tensor, ""], Parts]:
        """The loss and its parts, detached, by the authors' names.

        Args:
            output: of the network in training mode; a network without a threshold head gives the bare
                cross-entropy with the default loss.
            targets: of the same size.

        Raises:
            ShapeError: sizes differ.
            ConfigError: the loss needs a threshold map that the output does not have.
        """
        with torch.autocast(output.prob.device.type, enabled=False):
            terms = _Terms(output, targets, self.alpha, self.beta, Reduction(self.global_ohem))
            if terms.thresh is None and self.loss == "L1BalanceCELoss":
                total, parts = terms.bce(), {}
                parts = {"bce_loss": total}
            else:
                total, parts = _LOSSES[self.loss](terms)
            total = terms.reduction.scale(total)
        return total, {name: value.detach() for name, value in parts.items()}


class _Terms:
    """The terms that the losses are made of, on float32 (or wider) maps of shape (batch, height, width)."""

    def __init__(
        self, output: DBOutput, targets: Targets, alpha: float, beta: float, reduction: Reduction
    ) -> None:
        size = output.prob.shape[-2:]
        if targets.gt.shape[-2:] != size or targets.gt.numel() != output.prob.numel():
            raise ShapeError(
                f"targets have shape {tuple(targets.gt.shape)}, wanted that of the output "
                f"{(output.prob.shape[0], *size)}"
            )
        self.alpha, self.beta, self.reduction, self.k = alpha, beta, reduction, output.k
        self.logit, self.prob = _flat(output.prob_logit), _flat(output.prob)
        self._thresh = None if output.thresh is None else _flat(output.thresh)
        self._binary = None if output.binary is None else _flat(output.binary)
        dtype = self.prob.dtype
        self.gt, self.mask, self.thresh_map, self.thresh_mask = (
            _flat(getattr(targets, name)).to(dtype) for name in ("gt", "mask", "thresh_map", "thresh_mask")
        )

    @property
    def thresh(self) -> Tensor | None:
        return self._thresh

    @property
    def binary(self) -> Tensor:
        if self._binary is None:
            raise ConfigError(
                "output has no threshold map (an evaluated or fused network); this loss needs training mode"
            )
        return self._binary

    def bce(self, logits: Tensor | None = None) -> Tensor:
        logits = self.logit if logits is None else logits
        return balanced_bce(logits, self.gt, self.mask, reduction=self.reduction)

    def dice(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return dice(x, self.gt, self.mask, weight=weight, reduction=self.reduction)

    def l1(self) -> Tensor:
        self.binary  # noqa: B018 - says what is missing
        thresh = cast("Tensor", self._thresh)
        return masked_l1(thresh, self.thresh_map, self.thresh_mask, reduction=self.reduction)


def _flat(x: Tensor) -> Tensor:
    x = x.reshape(-1, *x.shape[-2:])
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _balance_ce(t: _Terms) -> tuple[Tensor, Parts]:
    bce, thresh, l1 = t.bce(), t.dice(t.binary), t.l1()
    return thresh + t.beta * l1 + t.alpha * bce, {"bce_loss": bce, "thresh_loss": thresh, "l1_loss": l1}


def _l1_dice(t: _Terms) -> tuple[Tensor, Parts]:
    main, thresh, l1 = t.dice(t.prob), t.dice(t.binary), t.l1()
    return main + thresh + t.beta * l1, {"main_loss": main, "thresh_loss": thresh, "l1_loss": l1}


def _full_l1_dice(t: _Terms) -> tuple[Tensor, Parts]:
    main, thresh = t.dice(t.prob), t.dice(t.binary)
    l1, outside = mined_l1(cast("Tensor", t.thresh), t.thresh_map, t.thresh_mask, reduction=t.reduction)
    parts = {"main_loss": main, "thresh_loss": thresh, "l1_loss": l1, "nge_l1_loss": outside}
    return main + thresh + t.beta * (l1 + outside), parts


def _leaky_dice(t: _Terms) -> tuple[Tensor, Parts]:
    total = t.reduction.total
    both = total((t.prob * t.gt * t.mask).sum())
    missed = 1 - both / (total((t.gt * t.mask).sum()) + _EPS)
    excess = 1 - both / (total((t.prob * t.mask).sum()) + _EPS)
    thresh, l1 = t.dice(t.binary), t.l1()
    parts = {"coverage": missed, "excede": excess, "thresh_loss": thresh, "l1_loss": l1}
    return t.alpha * missed + excess + thresh + t.beta * l1, parts


def _dice_only(t: _Terms) -> tuple[Tensor, Parts]:
    loss = t.dice(t.prob)
    return loss, {"dice_loss": loss}


def _bce_only(t: _Terms) -> tuple[Tensor, Parts]:
    loss = t.bce()
    return loss, {"dice_loss": loss}


def _adaptive_dice(t: _Terms) -> tuple[Tensor, Parts]:
    main, thresh = t.dice(t.prob), t.dice(t.binary)
    return main + thresh, {"main_loss": main, "thresh_loss": thresh}


def _bce_mining(t: _Terms) -> tuple[Tensor, Parts]:
    every = binary_cross_entropy_with_logits(t.logit, t.gt, reduction="none")
    low, high = t.reduction.extremes(every)
    weight = 1 + (every - low) / (high - low).clamp(min=1e-12)  # a constant map weighs all alike
    bce, thresh, l1 = t.bce(), t.dice(t.binary, weight), t.l1()
    return thresh + t.beta * l1 + t.alpha * bce, {"bce_loss": bce, "thresh_loss": thresh, "l1_loss": l1}


def _paper(t: _Terms) -> tuple[Tensor, Parts]:
    thresh = t.binary  # says what is missing
    thresh = t.bce(t.k * (t.prob - cast("Tensor", t.thresh)))
    bce, l1 = t.bce(), t.l1()
    parts = {"bce_loss": bce, "thresh_loss": thresh, "l1_loss": l1}
    return bce + t.alpha * thresh + t.beta * l1, parts


_LOSSES: dict[str, Callable[[_Terms], tuple[Tensor, Any]]] = {
    "L1BalanceCELoss": _balance_ce,
    "L1DiceLoss": _l1_dice,
    "FullL1DiceLoss": _full_l1_dice,
    "L1LeakyDiceLoss": _leaky_dice,
    "DiceLoss": _dice_only,
    "BalanceBCELoss": _bce_only,
    "AdaptiveDiceLoss": _adaptive_dice,
    "L1BCEMiningLoss": _bce_mining,
    "paper": _paper,
}
