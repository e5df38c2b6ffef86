"""Merging checkpoints of one architecture: VaRM, SCE and the field's other rules, streamed.

Every function takes folders, safetensors files or state dicts and returns a :class:`Merge`:
``.save(folder)``, ``.state_dict()``, ``.weights()``, ``.dry_run()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fusechat.merge.formulas import Measure, Variant
from fusechat.merge.recipes import from_recipe
from fusechat.merge.rules import Dare, Level, Linear, Sce, TaskArithmetic, Ties, Varm
from fusechat.merge.spherical import Gradient, Slerp
from fusechat.merge.streaming import Merge

__all__ = ["Merge", "dare", "from_recipe", "linear", "sce", "slerp", "task_arithmetic", "ties", "varm"]


def linear(
    targets: Sequence[Any],
    *,
    base: Any = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    **options: Any,
) -> Merge:
    """The weighted mean of targets.

    Args:
        targets: folders, files or state dicts.
        base: gives configuration and tokenizer; not merged.
        weights: one per target; equal by default.
        normalize: divide by their sum.
        **options: ``embeddings="common"``, ``chunk``.

    Raises:
        InputError: settings or targets that do not fit; IncompatibleCheckpoints: other names or shapes.

    Example:
        >>> import torch
        >>> linear([{"w": torch.zeros(2)}, {"w": torch.ones(2)}]).state_dict()
        {'w': tensor([0.5000, 0.5000])}
    """
    return Merge.plan(Linear(weights, normalize), targets, base, **options)


def task_arithmetic(
    targets: Sequence[Any],
    *,
    base: Any,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = False,
    **options: Any,
) -> Merge:
    """The pivot plus ``lam`` times the weighted sum of differences (arXiv 2212.04089).

    Args:
        targets: as in :func:`linear`.
        base: the pivot.
        weights: one per target.
        lam: scale.
        normalize: divide by the sum of the weights.
        **options: as in :func:`linear`.
    """
    return Merge.plan(TaskArithmetic(weights, lam, normalize), targets, base, **options)


def varm(
    targets: Sequence[Any],
    *,
    base: Any,
    level: Level = "matrix",
    measure: Measure = "square",
    softmax: bool = False,
    temperature: float = 1.0,
    outside: Literal["matrix", "uniform"] = "matrix",
    zero: Literal["ratio", "uniform"] = "ratio",
    **options: Any,
) -> Merge:
    """VaRM: targets weigh by how much they moved away from the pivot (arXiv 2402.16107).

    Args:
        targets: as in :func:`linear`.
        base: the pivot.
        level: ``matrix``, ``module``, ``layer``, ``model`` or ``element``: over what changes are compared.
        measure: ``square``, ``abs`` or ``signed``.
        softmax: of the changes instead of their ratio.
        temperature: of that softmax.
        outside: tensors outside layers at the levels of layers and modules: their own ratio, or ``uniform``.
        zero: ``uniform``: a tensor that one target left alone is averaged, as in the published code.
        **options: as in :func:`linear`.
    """
    rule = Varm(level, measure, softmax, temperature, outside, zero)
    return Merge.plan(rule, targets, base, **options)


def sce(
    targets: Sequence[Any],
    *,
    base: Any,
    tau: float = 0.1,
    variant: Variant = "paper",
    normalize: bool = True,
    **options: Any,
) -> Merge:
    """SCE: select what varies, calculate weights, erase the minority's signs (arXiv 2408.07990).

    Args:
        targets: as in :func:`linear`.
        base: the pivot.
        tau: kept share of the elements that vary; 1 keeps all.
        variant: ``paper``; ``fusechat`` (the published fork: selection changes the weights only);
            ``mergekit`` (uniform weights where the mean squares are below 1e-6).
        normalize: divide by the weights that agree.
        **options: as in :func:`linear`.

    Example:
        >>> import torch
        >>> base, first, second = ({"w": torch.tensor([x, -x])} for x in (0.0, 1.0, 3.0))
        >>> sce([first, second], base=base, tau=1.0).state_dict()
        {'w': tensor([ 2.8000, -2.8000])}
    """
    return Merge.plan(Sce(tau, variant, normalize), targets, base, **options)


def ties(
    targets: Sequence[Any],
    *,
    base: Any,
    density: float = 0.6,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = True,
    **options: Any,
) -> Merge:
    """TIES: trim small differences, elect a sign, average what agrees (arXiv 2306.01708).

    Args:
        targets: as in :func:`linear`.
        base: the pivot.
        density: kept share of each target's differences, in (0, 1].
        weights: one per target.
        lam: scale.
        normalize: divide by the weights that agree.
        **options: as in :func:`linear`.
    """
    return Merge.plan(Ties(density, weights, lam, normalize), targets, base, **options)


def dare(
    targets: Sequence[Any],
    *,
    base: Any,
    density: float = 0.6,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = True,
    rescale: Literal["density", "l1"] = "density",
    consensus: Literal["linear", "ties"] = "ties",
    seed: int = 0,
    **options: Any,
) -> Merge:
    """DARE: drop differences at random, rescale the rest (arXiv 2311.03099).

    Args:
        targets: as in :func:`linear`.
        base: the pivot.
        density: kept share, in (0, 1].
        weights: one per target.
        lam: scale.
        normalize: divide by the weights.
        rescale: ``density`` (the paper) or ``l1`` (mergekit).
        consensus: ``linear`` sum or ``ties``.
        seed: with the names of tensor and target it fixes the mask, whatever the order.
        **options: as in :func:`linear`.
    """
    return Merge.plan(
        Dare(density, weights, lam, normalize, rescale, consensus, seed), targets, base, **options
    )


def slerp(targets: Sequence[Any], *, base: Any = None, t: Gradient = 0.5, **options: Any) -> Merge:
    """Spherical interpolation of two targets.

    Args:
        targets: two, as in :func:`linear`.
        base: gives configuration and tokenizer only.
        t: share of the second: a number, a list over the depth, or both by filters on names, such as
            ``{"self_attn": [0, 0.5, 1], "mlp": 0.3, "default": 0.5}``.
        **options: as in :func:`linear`.
    """
    return Merge.plan(Slerp(t), targets, base, **options)
