"""Which class a targeted attack aims at, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fusion_core.batching import map_batches
from fusion_core.errors import DataError, InputError, ShapeError
from fusion_core.modules import logits_of, untouched
from fusion_core.seeding import generator

Target = int | str | Callable[[Tensor], Tensor]


def target_map(
    target: Target,
    images: Tensor,
    labels: Tensor,
    surrogates: Sequence[nn.Module],
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """The class that each image shall be taken for.

    Args:
        target: a label for all; ``"random"`` = uniform over the labels other than the true one;
            ``"least-likely"`` = smallest mean probability of the surrogates on the clean image; or a function
            from labels to targets.
        images: ``(images, channels, height, width)`` in [0, 1].
        labels: int64 ``(images,)``.
        surrogates: logits ``(images, classes)`` each, on the device of their parameters.
        seed: of the random targets.
        batch_size: images per forward.

    Returns:
        int64 ``(images,)``.

    Raises:
        InputError: another word, or a label outside the classes.
        DataError: every target is the image's own label.
        ShapeError: a function that returns another number of targets.

    Example:
        >>> from torch import nn
        >>> x = torch.tensor([[[[0.1, 0.9, 0.5]]]])
        >>> target_map("least-likely", x, torch.tensor([1]), [nn.Flatten()])
        tensor([0])
    """

    def probabilities(part: Tensor) -> Tensor:
        found: list[Tensor] = []
        for model in surrogates:
            place = next((p.device for p in model.parameters()), part.device)
            found.append(logits_of(model(part.to(place))).float().softmax(1).cpu())
        return torch.stack(found).mean(0)

    with torch.no_grad(), untouched(*surrogates):
        if target == "least-likely":
            wanted = torch.cat(
                list(map_batches(lambda part: probabilities(part).argmin(1), images, batch_size))
            )
            return _checked(wanted, labels)
        classes = probabilities(images[:1]).shape[1]
    if target == "random":
        steps = torch.randint(1, max(classes, 2), (len(labels),), generator=generator(seed, "targets"))
        return _checked((labels.cpu() + steps) % classes, labels)
    if isinstance(target, str):
        raise InputError(f"target is {target!r}, wanted a label, 'random', 'least-likely' or a function")
    if isinstance(target, int):
        wanted = torch.full((len(labels),), target)
    else:
        wanted = torch.as_tensor(target(labels)).cpu().long()
        if wanted.shape != labels.shape:
            raise ShapeError(f"target gave shape {tuple(wanted.shape)}, wanted {tuple(labels.shape)}")
    if int(wanted.min()) < 0 or int(wanted.max()) >= classes:
        raise InputError(f"target is {int(wanted.max())}, wanted a label in [0, {classes - 1}]")
    return _checked(wanted, labels)


def _checked(wanted: Tensor, labels: Tensor) -> Tensor:
    if bool((wanted == labels.cpu()).all()):
        raise DataError("target is the label of every image, wanted another class for at least one")
    return wanted
