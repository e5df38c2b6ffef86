"""Which class a targeted attack wants for each image.

``random`` is uniform over the other labels; ``least-likely`` is the class that the surrogates' mean softmax
on the clean image gives least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaea.losses import wide
from fusion_core.errors import ConfigError, DataError, ShapeError

Target = Literal["label", "random", "least-likely"] | int | Callable[..., Tensor]
RULES = ("label", "random", "least-likely")
Labels = Int[Tensor, " batch"]


def target_labels(
    target: Target,
    labels: Labels,
    logits: Float[Tensor, "surrogates batch classes"],
    generator: torch.Generator | None = None,
) -> Labels:
    """The wanted class of each image.

    Args:
        target: ``"label"``: the labels are the wanted classes already; ``"random"``; ``"least-likely"``; one
            class for all; or a function of labels and logits that returns ``(batch,)`` classes.
        labels: ``(batch,)`` true classes (wanted ones for ``"label"``).
        logits: ``(surrogates, batch, classes)`` on the clean images.
        generator: for ``"random"``.

    Returns:
        int64 ``(batch,)`` on the labels' device.

    Raises:
        ConfigError: another rule, or ``"random"`` with one class or no generator.
        DataError: classes outside [0, classes), or every image wanted as what it is.
        ShapeError: the function returned another shape.

    Example:
        >>> z = torch.tensor([[[3.0, 1.0, 2.0]], [[3.0, 1.5, 2.0]]])
        >>> target_labels("least-likely", torch.tensor([0]), z)
        tensor([1])
    """
    classes, labels = logits.shape[-1], labels.long()
    if isinstance(target, str) and target == "label":
        return labels
    if isinstance(target, str) and target == "random":
        if classes < 2 or generator is None:
            raise ConfigError(f"target 'random' needs a generator and two classes, got {classes}")
        shift = torch.randint(1, classes, labels.shape, generator=generator, device=generator.device)
        wanted = (labels + shift.to(labels.device)) % classes
    elif isinstance(target, str) and target == "least-likely":
        wanted = wide(logits).softmax(-1).mean(0).argmin(-1).to(labels.device)
    elif isinstance(target, bool | str):
        raise ConfigError(f"target is {target!r}, wanted one of {list(RULES)}, a class or a function")
    elif isinstance(target, int):
        wanted = torch.full_like(labels, target)
    else:
        wanted = torch.as_tensor(target(labels, logits)).to(labels)
    if wanted.shape != labels.shape:
        raise ShapeError(f"target gave {tuple(wanted.shape)} classes, wanted ({labels.shape[0]},)")
    if bool(((wanted < 0) | (wanted >= classes)).any()):
        raise DataError(f"target gave classes up to {int(wanted.max())}, wanted 0 to {classes - 1}")
    if len(labels) and bool((wanted == labels).all()):
        raise DataError("target equals the label of every image, wanted another class for at least one")
    return wanted
