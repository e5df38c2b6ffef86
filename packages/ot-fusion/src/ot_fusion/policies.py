"""How the map of a residual sum follows from the maps of the skip and of the branch.

Source: section 4.2 of the paper (residual connections) and the authors' code.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ot_fusion.errors import InputError, ShapeError

__all__ = ["Residual", "branch_shares", "merge_maps"]

Residual = Literal[
    "mean", "weighted_matrix", "weighted_scalar", "no_resid", "only_resid", "resid_as_identity"
]


def _share(resid: Tensor, branch: Tensor) -> Tensor:
    total = resid + branch
    return torch.where(total > 0, resid / torch.where(total > 0, total, 1.0), 0.5)


def branch_shares(policy: str, resid_size: Tensor | None, branch_size: Tensor | None) -> Tensor | float:
    """The share of the skip's map in the sum's: a number, or one per anchor channel.

    Args:
        policy: see :func:`merge_maps`.
        resid_size: mean absolute activation of the skip per anchor channel, ``(n1,)``.
        branch_size: likewise of the branch.

    Raises:
        InputError: an unknown policy, or a weighted one without activations.

    Example:
        >>> branch_shares("weighted_scalar", torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(0.7500)
    """
    fixed = {"mean": 0.5, "no_resid": 0.0, "only_resid": 1.0, "resid_as_identity": 0.5}
    if policy in fixed:
        return fixed[policy]
    if policy not in ("weighted_scalar", "weighted_matrix"):
        raise InputError(
            f"residual is {policy!r}, wanted mean, weighted_matrix, weighted_scalar, no_resid, only_resid or "
            "resid_as_identity"
        )
    if resid_size is None or branch_size is None:
        raise InputError(f"residual={policy!r} weighs by activations, and there are none; give data")
    if policy == "weighted_scalar":
        return _share(resid_size.mean(), branch_size.mean())
    return _share(resid_size, branch_size)


def merge_maps(
    policy: Residual,
    resid: Float[Tensor, "n0 n1"] | None,
    branch: Float[Tensor, "n0 n1"] | None,
    resid_acts: Float[Tensor, "samples n1"] | None = None,
    branch_acts: Float[Tensor, "samples n1"] | None = None,
) -> Float[Tensor, "n0 n1"] | None:
    """The map of ``skip + branch``.

    Args:
        policy: ``mean`` of both maps; ``weighted_scalar`` and ``weighted_matrix``: by the mean absolute
            activation of the anchor's skip and branch, over all channels or per channel (columns);
            ``no_resid``: the branch's map; ``only_resid``: the skip's; ``resid_as_identity``: the identity.
        resid: map of the skip; None is the identity.
        branch: map of the branch; None is the identity.
        resid_acts: anchor activations of the skip, ``(samples, n1)``, for the weighted policies; where skip
            and branch are both 0 they weigh the same.
        branch_acts: anchor activations of the branch.

    Returns:
        ``(n0, n1)``, or None where every map that counts is the identity.

    Raises:
        InputError: an unknown policy, or a weighted one without activations.
        ShapeError: maps of different sizes.

    Example:
        >>> merge_maps("mean", torch.eye(2), torch.ones(2, 2) / 2)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    sizes = [None if acts is None else acts.abs().mean(0) for acts in (resid_acts, branch_acts)]
    share = branch_shares(policy, *sizes)
    if policy == "resid_as_identity":
        known = resid if resid is not None else branch
        return None if known is None else torch.eye(*known.shape, dtype=known.dtype, device=known.device)
    if policy == "no_resid" or policy == "only_resid":
        return branch if policy == "no_resid" else resid
    known = resid if resid is not None else branch
    if known is None:
        return None
    eye = torch.eye(*known.shape, dtype=known.dtype, device=known.device)
    first, second = (eye if part is None else part for part in (resid, branch))
    if first.shape != second.shape:
        raise ShapeError(f"the maps of a sum have shapes {tuple(first.shape)} and {tuple(second.shape)}")
    return share * first + (1 - share) * second
