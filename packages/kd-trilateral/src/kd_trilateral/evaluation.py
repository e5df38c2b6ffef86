"""How good a student is on labelled rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.errors import DataError
from fusion_core.modules import logits_of, untouched
from kd_trilateral.forward import call_arguments
from kd_trilateral.losses import as_pair
from kd_trilateral.rowsource import Rows, moved


@torch.no_grad()
def evaluate(
    student: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    batch_size: int = 512,
    logits_from: Callable[[Any], Tensor] | None = None,
    ignore_index: int = -100,
) -> dict[str, float]:
    """Top-1 accuracy and negative log-likelihood, with the area under the ROC curve in a task of two classes.

    Args:
        student: used in evaluation mode; comes back untouched.
        data: see :class:`~kd_trilateral.rowsource.Rows`.
        task: ``"binary"`` reads a single logit.
        batch_size: rows per forward.
        logits_from: finds the logits in the student's output.
        ignore_index: label of rows that take no part.

    Raises:
        DataError: labels out of range, or none that takes part.

    Returns:
        ``accuracy`` in [0, 1], ``nll`` in nats, and ``auc`` in [0, 1] where there are two classes and both
        occur.

    Example:
        >>> evaluate(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))).keys()
        dict_keys(['accuracy', 'nll'])
    """
    source = Rows(data)
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with untouched(student):
        for _, x, y in source.batches(list(torch.arange(len(source)).split(batch_size))):
            args, kwargs = call_arguments(moved(x, device))
            found = (logits_from or logits_of)(student(*args, **kwargs))
            logits.append((as_pair(found) if task == "binary" else found).float())
            labels.append(y.to(device).long())
    z, y = torch.cat(logits), torch.cat(labels)
    keep = y != ignore_index
    z, y = z[keep], y[keep]
    if not len(y):
        raise DataError(f"every label is ignore_index {ignore_index}, wanted at least one row to measure on")
    if bool(((y < 0) | (y >= z.shape[1])).any()):
        raise DataError(f"labels run from {int(y.min())} to {int(y.max())}, wanted 0..{z.shape[1] - 1}")
    scores = {
        "accuracy": float((z.argmax(-1) == y).double().mean()),
        "nll": float(F.cross_entropy(z.double(), y)),
    }
    if z.shape[1] == 2 and 0 < int(y.sum()) < len(y):
        scores["auc"] = auc((z[:, 1] - z[:, 0]).cpu().numpy(), y.cpu().numpy())
    return scores


def auc(score: np.ndarray[Any, Any], positive: np.ndarray[Any, Any]) -> float:
    """Area under the ROC curve: the chance that a positive row scores higher than a negative one, ties half.

    Args:
        score: ``(rows,)``.
        positive: ``(rows,)`` 0/1 or boolean, both present.

    Example:
        >>> auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
        0.75
    """
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2.0)[place]
    chosen = positive.astype(bool)
    hits = int(chosen.sum())
    return float((rank[chosen].sum() - hits * (hits + 1) / 2.0) / (hits * (len(chosen) - hits)))
